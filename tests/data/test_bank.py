"""The image bank: shards are whole or absent, belong to one run, and return exactly the stored images."""

import errno
import gc
import itertools
import os
import re
import threading
from pathlib import Path

import pytest
import torch

from datafree import bank as bank_module
from datafree.bank import export_folders
from engine.data.image_bank import ImageBank, Manifest, MappedImages, prefetch, read_manifest, to_uint8
from engine.data.pictures import class_files, read_images
from engine.data.transfer_set import TransferSet
from engine.runtime.errors import UserError, explain_os_error
from engine.runtime.tensors import save_tensors

MANIFEST = Manifest("digits", 10, 8, "resnet8", "abc")


def filled(path, rounds=3, images=4):
    bank = ImageBank(path / "bank", MANIFEST)
    generator = torch.Generator().manual_seed(0)
    for round in range(rounds):
        pictures = torch.randint(0, 256, (images, 3, 8, 8), generator=generator, dtype=torch.uint8)
        bank.append("synthesize", round, pictures, torch.arange(images) + round)
    return bank


def test_what_is_appended_is_read(tmp_path):
    bank = filled(tmp_path)
    columns = bank.read("synthesize")
    assert columns["images"].shape == (12, 3, 8, 8) and columns["images"].dtype == torch.uint8
    assert columns["labels"].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5]
    again = ImageBank(tmp_path / "bank", MANIFEST)
    assert torch.equal(again.read("synthesize", 2)["images"][:], columns["images"][:8])


def test_float_images_are_rounded_to_nearest():
    assert to_uint8(torch.tensor([0.0, 0.5 / 255 + 1e-4, 1.0, 2.0])).tolist() == [0, 1, 255, 255]


def test_stages_do_not_mix(tmp_path):
    bank = filled(tmp_path)
    bank.append("distill", 0, torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    assert len(bank.read("synthesize")["labels"]) == 12 and len(bank.read("distill")["labels"]) == 2
    assert len(bank.read_all()["labels"]) == 14 and bank.rounds("synthesize") == [0, 1, 2]


@pytest.mark.parametrize(
    "other, word",
    [
        (Manifest("cifar10", 10, 8, "resnet8", "abc"), "dataset"),
        (Manifest("digits", 100, 8, "resnet8", "abc"), "num_classes"),
        (Manifest("digits", 10, 16, "resnet8", "abc"), "image_size"),
        (Manifest("digits", 10, 8, "resnet8", "def"), "teacher"),
    ],
)
def test_another_runs_bank_is_refused(tmp_path, other, word):
    filled(tmp_path)
    with pytest.raises(UserError, match=word):
        ImageBank(tmp_path / "bank", other)


def test_a_manifest_without_shards_is_replaced(tmp_path):
    """--redo deletes the shards; the next images may be of another teacher."""
    bank = filled(tmp_path, rounds=1)
    bank.shard("synthesize", 0).unlink()
    other = Manifest("digits", 10, 8, "resnet8", "def", method="noise")
    assert ImageBank(tmp_path / "bank", other).manifest == other == read_manifest(tmp_path / "bank")


def test_a_damaged_shard_is_named(tmp_path):
    bank = filled(tmp_path)
    shard = bank.shard("synthesize", 1)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="synthesize-000001"):
        bank.read("synthesize")
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        bank.read("synthesize", 3)


def test_a_damaged_manifest_is_named(tmp_path):
    filled(tmp_path)
    (tmp_path / "bank" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json"):
        ImageBank(tmp_path / "bank", MANIFEST)


def test_a_label_out_of_range_is_refused(tmp_path):
    bank = filled(tmp_path)
    bank.append("synthesize", 3, torch.zeros(1, 3, 8, 8), torch.tensor([10]))
    with pytest.raises(UserError, match="label 10, 0 to 9 wanted"):
        bank.read("synthesize")


def test_a_full_disk_leaves_the_bank_whole(tmp_path, monkeypatch):
    bank = filled(tmp_path)
    before = bank.read("synthesize")["images"][:]

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("engine.runtime.files.os.fsync", full)
    with pytest.raises(OSError) as caught:
        bank.append("synthesize", 3, torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    assert "no space left" in str(explain_os_error(caught.value))
    monkeypatch.undo()
    assert bank.rounds("synthesize") == [0, 1, 2] and torch.equal(bank.read("synthesize")["images"][:], before)
    assert not list((tmp_path / "bank").glob("*.tmp")) and not list((tmp_path / "bank").glob(".*"))


def test_png_export_and_import_are_exact(tmp_path):
    bank = filled(tmp_path)
    assert export_folders(bank, tmp_path / "png") == 12
    files, labels = class_files(tmp_path / "png")
    columns = bank.read("synthesize")
    order = torch.argsort(columns["labels"], stable=True)
    assert torch.equal(labels, columns["labels"][order]) and torch.equal(read_images(files, 8), columns["images"][order])


def test_class_folders_that_are_numbers_are_labels(tmp_path):
    from PIL import Image

    for name in ("10", "2", "0"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (int(name), 0, 0)).save(tmp_path / name / "a.png")
    files, labels = class_files(tmp_path)
    assert labels.tolist() == [0, 2, 10] and read_images(files, 8)[:, 0, 0, 0].tolist() == [0, 2, 10]


def test_import_of_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        class_files(tmp_path)


def test_command_line_round_trip(tmp_path, monkeypatch, capsys):
    bank = filled(tmp_path)
    monkeypatch.setattr("sys.argv", ["bank", "export", str(bank.path), str(tmp_path / "png")])
    bank_module.main()
    monkeypatch.setattr(
        "sys.argv", ["bank", "import", str(tmp_path / "png"), str(tmp_path / "again"), "--dataset", "digits"]
    )
    bank_module.main()
    assert read_manifest(tmp_path / "again").image_size == 16
    assert "12 images" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        bank_module.main()


def test_import_for_a_folder_dataset_and_export_of_a_run(tmp_path, monkeypatch, capsys):
    from PIL import Image

    for name in ("ant", "bee", "cow"):
        for split in ("train", "test"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "data" / split / name / "a.png")
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "data" / "train" / "cow" / "b.png")
    (tmp_path / "data" / "train" / "ant" / "a.png").unlink()
    words = f"bank import {tmp_path / 'data' / 'train'} {tmp_path / 'run' / 'bank'} --dataset folder --data_root {tmp_path / 'data'}"
    monkeypatch.setattr("sys.argv", words.split())
    bank_module.main()
    columns = ImageBank(tmp_path / "run" / "bank", Manifest("data", 3, 64), create=False).read_all()
    assert columns["labels"].tolist() == [1, 2, 2] and columns["images"][2][0, 0, 0] == 200
    monkeypatch.setattr("sys.argv", ["bank", "export", str(tmp_path / "run"), str(tmp_path / "png")])
    bank_module.main()
    assert (tmp_path / "png" / "2" / "0000002.png").exists()
    monkeypatch.setattr("sys.argv", ["bank", "export", str(tmp_path), str(tmp_path / "other")])
    with pytest.raises(UserError, match="no image bank at .*; give a bank folder or a run folder that contains one"):
        bank_module.main()


def test_a_damaged_file_leaves_no_bank(tmp_path, monkeypatch):
    export_folders(filled(tmp_path), tmp_path / "png")
    (tmp_path / "png" / "5" / "0000011.png").write_bytes(b"no picture")
    words = ["bank", "import", str(tmp_path / "png"), str(tmp_path / "again"), "--dataset", "digits", "--shard_size", "5"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match="0000011.png"):
        bank_module.main()
    assert not (tmp_path / "again").exists()
    (tmp_path / "png" / "5" / "0000011.png").unlink()
    bank_module.main()
    assert len(ImageBank(tmp_path / "again", Manifest("digits", 10, 16)).read_all()["labels"]) == 11


def test_transfer_set_serves_every_image_once_a_pass():
    transfer = TransferSet(10, 4, torch.device("cpu"))
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4)
    transfer.add(images[:6], torch.arange(6))
    transfer.add(images[6:], torch.arange(6, 10))
    batches = transfer.batches(5, lambda x: x, seed=0)
    pairs = [next(batches) for _ in range(4)]
    for images, labels in pairs:
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
    seen = torch.cat([labels for _, labels in pairs]).tolist()
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))


def test_a_batch_larger_than_the_set_is_filled():
    transfer = TransferSet(3, 4, torch.device("cpu"))
    transfer.add(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.arange(3))
    _, labels = next(transfer.batches(8, lambda x: x, seed=0))
    assert torch.bincount(labels).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_a_foreign_shard_name_is_passed_over(tmp_path):
    bank = filled(tmp_path)
    save_tensors(bank.path / "notes.safetensors", {"a": torch.zeros(1)})
    assert bank.rounds("synthesize") == [0, 1, 2]


def test_mapped_images_index_like_a_tensor():
    parts = [torch.randint(0, 256, (n, 3, 2, 2), dtype=torch.uint8) for n in (3, 0, 1, 4)]
    mapped, whole = MappedImages.of(parts), torch.cat(parts)
    assert len(mapped) == 8 and mapped.shape == whole.shape and mapped.dtype == whole.dtype and mapped.device == whole.device
    for index in (0, -1, slice(2, 5), slice(None), slice(1, 8, 3), torch.tensor([7, 0, 7]), torch.tensor([[1, 2], [3, -1]])):
        assert torch.equal(mapped[index], whole[index])
    mask = torch.tensor([True, False, True, True, False, False, False, True])
    kept = mapped[mask]
    assert isinstance(kept, MappedImages) and len(kept) == 4 and torch.equal(kept[:], whole[mask])
    assert torch.equal(kept[torch.tensor([3, 0])], whole[mask][[3, 0]])
    assert [len(part) for part in mapped.split(3)] == [3, 3, 2] and torch.equal(torch.cat([*mapped.split(3)]), whole)
    for wrong in (8, torch.tensor([8])):
        with pytest.raises(IndexError):
            mapped[wrong]


def test_an_appended_shard_comes_back_mapped(tmp_path):
    bank = filled(tmp_path)
    images, labels = bank.append("distill", 0, torch.full((2, 3, 8, 8), 0.5), torch.tensor([1, 2]))
    assert isinstance(images, MappedImages) and images[:].unique().tolist() == [128] and labels.tolist() == [1, 2]


def test_a_shard_of_another_size_is_named(tmp_path):
    bank = filled(tmp_path)
    save_tensors(bank.shard("synthesize", 3), {"images": torch.zeros(1, 3, 4, 4).byte(), "labels": torch.zeros(1).long()})
    with pytest.raises(
        UserError, match="synthesize-000003.*images is a tensor torch.uint8 of 1 x 3 x 4 x 4, .* any x 3 x 8 x 8 wanted"
    ):
        bank.read("synthesize")


def served(bank, home, monkeypatch, steps=9, **shares):
    """Labels and images of some batches, and the next random number; the last shard is added like that of a round."""
    monkeypatch.setattr("engine.data.image_bank.memory_limit", lambda device: 0 if home == "mapped" else 2**40)
    transfer = TransferSet(14, 8, torch.device("cpu"))
    assert transfer.mapped == (home == "mapped") and transfer.description.endswith(
        "memory-mapped" if home == "mapped" else "in host memory"
    )
    columns = bank.read("synthesize")
    keep = torch.arange(12) != 5
    transfer.add(columns["images"][keep], columns["labels"][keep])
    transfer.add(*bank.append("distill", 0, torch.full((2, 3, 8, 8), 0.5), torch.tensor([8, 9])))
    batches = transfer.batches(5, lambda x: x + torch.randint(0, 2, (1,)).byte(), seed=3, **shares)
    torch.manual_seed(1)
    found = list(itertools.islice(batches, steps))
    return [labels for _, labels in found], [images for images, _ in found], torch.rand(1)


def test_every_home_serves_the_same_bits(tmp_path, monkeypatch):
    """Order, augmentation and later random numbers do not depend on where the images are stored."""
    bank = filled(tmp_path)
    host, mapped = (served(bank, home, monkeypatch) for home in ("host", "mapped"))
    for kind in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(host[kind], mapped[kind], strict=True))
    assert torch.equal(host[2], mapped[2])
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in mapped[1])
    assert {8, 9} <= set(torch.cat(mapped[0]).tolist()) and len(torch.cat(mapped[0])[:13].unique()) == 8


@pytest.mark.parametrize("home", ["host", "mapped"])
def test_processes_share_every_batch(home, tmp_path, monkeypatch):
    bank = filled(tmp_path)
    whole = served(bank, home, monkeypatch)[0]
    shares = [served(bank, home, monkeypatch, rank=rank, count=2)[0] for rank in range(2)]
    for labels, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(first, labels[0::2]) and torch.equal(second, labels[1::2])


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_runs_ahead_and_ends(monkeypatch):
    made, two_ahead = [], threading.Event()

    def items():
        for i in itertools.count():
            made.append(i)
            if i == 4:
                two_ahead.set()
            yield i

    ahead = prefetch(items())
    assert not made and not prefetching()
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    assert two_ahead.wait(20) and made == [0, 1, 2, 3, 4] and len(prefetching()) == 1
    ahead.close()
    assert not prefetching()
    forgotten = prefetch(itertools.count())
    next(forgotten)
    del forgotten
    gc.collect()
    assert not prefetching()


@pytest.mark.parametrize("limit", [0, 2**40])
def test_batches_for_another_device_are_pinned_in_the_thread(limit, monkeypatch):
    """The device "meta" stands for a GPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(threading.current_thread().name) or self)
    monkeypatch.setattr("engine.data.image_bank.memory_limit", lambda device: limit)
    transfer = TransferSet(6, 4, torch.device("meta"))
    transfer.add(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), torch.arange(6))
    images, labels = next(transfer.batches(4, lambda images: images, seed=0))
    assert images.device.type == labels.device.type == "meta" and images.shape == (4, 3, 4, 4)
    assert len(pinned) >= 2 and all(name.startswith("prefetch") for name in pinned)


def test_an_error_while_reading_ahead_reaches_the_caller():
    def items():
        yield 1
        raise UserError("the disk is gone")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(UserError, match="the disk is gone"):
        next(ahead)
    assert not prefetching()


def anonymous():
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def test_memory_does_not_grow_with_a_mapped_bank(tmp_path, monkeypatch, forked):
    """Anonymous memory of a bank of 150 MB with batches of 6 MB; as a control, the same bank held in host memory."""
    bank = ImageBank(tmp_path / "bank", Manifest("digits", 10, 64))
    images = torch.randint(0, 256, (3050, 3, 64, 64), dtype=torch.uint8)
    for round in range(4):
        save_tensors(bank.shard("synthesize", round), {"images": images, "labels": torch.zeros(3050, dtype=torch.long)})

    def serve():
        for limit in (0, 2**40):
            monkeypatch.setattr("engine.data.image_bank.memory_limit", lambda device: limit)
            before = anonymous()
            columns = bank.read("synthesize")
            transfer = TransferSet(len(columns["labels"]), 64, torch.device("cpu"))
            transfer.add(**columns)
            batches = transfer.batches(128, lambda x: x, seed=0)
            print(max(anonymous() for _ in itertools.islice(batches, 50)) - before)
            batches.close()

    _, found, errors = forked(serve)
    mapped, held = map(int, found.split())
    assert mapped < 80 and held > 125, f"{mapped} and {held} MiB of anonymous memory {errors}"
