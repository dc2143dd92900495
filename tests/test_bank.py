"""Image bank: whole or absent, of one run, exact."""

import errno
import os

import pytest
import torch

from datafree import bank as bank_module
from datafree.bank import ImageBank, Manifest, TransferSet, export_folders, import_folders, read_manifest, to_uint8
from engine.errors import UserError, explain_os_error
from engine.files import save_tensors

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
    assert torch.equal(again.read("synthesize", 2)["images"], columns["images"][:8])


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
    with pytest.raises(UserError, match="label 10 of 10 classes"):
        bank.read("synthesize")


def test_a_full_disk_leaves_the_bank_whole(tmp_path, monkeypatch):
    bank = filled(tmp_path)
    before = bank.read("synthesize")["images"]

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("engine.files.os.fsync", full)
    with pytest.raises(OSError) as caught:
        bank.append("synthesize", 3, torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    assert "no space left" in str(explain_os_error(caught.value))
    monkeypatch.undo()
    assert bank.rounds("synthesize") == [0, 1, 2] and torch.equal(bank.read("synthesize")["images"], before)
    assert not list((tmp_path / "bank").glob("*.tmp"))


def test_png_export_and_import_are_exact(tmp_path):
    bank = filled(tmp_path)
    assert export_folders(bank, tmp_path / "png") == 12
    images, labels, classes = import_folders(tmp_path / "png", 8)
    columns = bank.read("synthesize")
    order = torch.argsort(columns["labels"], stable=True)
    assert classes == 6 and torch.equal(labels, columns["labels"][order]) and torch.equal(images, columns["images"][order])


def test_class_folders_that_are_numbers_are_labels(tmp_path):
    from PIL import Image

    for name in ("10", "2", "0"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (int(name), 0, 0)).save(tmp_path / name / "a.png")
    images, labels, _ = import_folders(tmp_path, 8)
    assert labels.tolist() == [0, 2, 10] and images[:, 0, 0, 0].tolist() == [0, 2, 10]


def test_import_of_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        import_folders(tmp_path, 8)


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


def test_transfer_set_serves_every_image_once_a_pass():
    transfer = TransferSet(10, 4, torch.device("cpu"))
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4)
    transfer.add(images[:6], torch.arange(6))
    transfer.add(images[6:].float() / 255, torch.arange(6, 10))
    batches = transfer.batches(5, lambda x: x, seed=0)
    pairs = [next(batches) for _ in range(4)]
    for images, labels in pairs:
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
    seen = torch.cat([labels for _, labels in pairs]).tolist()
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))


def test_a_batch_larger_than_the_set_is_filled():
    transfer = TransferSet(3, 4, torch.device("cpu"))
    transfer.add(torch.zeros(3, 3, 4, 4), torch.arange(3))
    _, labels = next(transfer.batches(8, lambda x: x, seed=0))
    assert torch.bincount(labels).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_a_foreign_shard_name_is_passed_over(tmp_path):
    bank = filled(tmp_path)
    save_tensors(bank.path / "notes.safetensors", {"a": torch.zeros(1)})
    assert bank.rounds("synthesize") == [0, 1, 2]
