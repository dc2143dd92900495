"""Exports of a bank: arrays and image folders that hold exactly its images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.image_bank import ImageBank, Manifest
from engine.runtime.errors import UserError
from engine.runtime.files import write_json
from engine.runtime.tensors import weights_digest
from tests.conftest import build_network, dataset_info
from tests.data.trees import write_folders


@pytest.fixture
def bank(tmp_path, teacher_file):
    network = build_network("resnet8", 10)
    network.load_state_dict(torch.load(teacher_file, weights_only=True)["state_dict"])
    manifest = Manifest("digits", 10, 16, "resnet8", weights_digest(network.state_dict()), "m", "prior")
    made = ImageBank(tmp_path / "run" / "bank", manifest)
    generator = torch.Generator().manual_seed(0)
    for round in range(2):
        images = torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
        made.append("synthesize", round, images, torch.arange(6) + round)
    return made


def arrays(folder):
    about = json.loads((folder / "about.json").read_text())
    parts = [[np.load(folder / f"{kind}-{k:05d}.npy") for k in range(len(about["shards"]))] for kind in ("images", "labels")]
    assert [len(labels) for labels in parts[1]] == about["shards"]
    return about, *map(np.concatenate, parts)


def test_arrays_are_normalized_or_the_bytes(bank, command, tmp_path):
    columns = bank.read_all()
    command("datafree.bank", f"export {tmp_path / 'run'} {tmp_path / 'u'} --format npy --dtype uint8")
    about, images, labels = arrays(tmp_path / "u")
    assert images.dtype == np.uint8 and np.array_equal(images, columns["images"][:].numpy()) and about["method"] == "m"
    assert labels.tolist() == columns["labels"].tolist() and about["external_prior"] == "prior"
    flags = "--format npy --teacher_mean .1,.2,.3 --teacher_std .5,.25,.125"
    command("datafree.bank", f"export {tmp_path / 'run'} {tmp_path / 'f'} {flags}")
    about, images, _ = arrays(tmp_path / "f")
    assert images.dtype == np.float32 and about["mean"] == [0.1, 0.2, 0.3] and about["dtype"] == "float32"
    back = images * np.array(about["std"]).reshape(3, 1, 1) + np.array(about["mean"]).reshape(3, 1, 1)
    assert np.abs(back * 255 - columns["images"][:].numpy()).max() < 1e-3


def test_a_bank_that_lost_a_shard_is_not_exported(bank, command, tmp_path):
    bank.shard("synthesize", 1).unlink()
    with pytest.raises(UserError, match="synthesize-000001.safetensors is missing; restore it from a copy"):
        command("datafree.bank", f"export {tmp_path / 'run'} {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_arrays_take_the_normalization_of_the_teacher(bank, command, tmp_path, teacher_file):
    torch.save(torch.load(teacher_file, weights_only=True) | {"mean": [0.4] * 3, "std": [0.2] * 3}, tmp_path / "t.pth")
    flags = f"--format npy --teacher resnet8 --teacher_ckpt {tmp_path / 't.pth'}"
    command("datafree.bank", f"export {tmp_path / 'run'} {tmp_path / 'f'} {flags}")
    assert arrays(tmp_path / "f")[0]["mean"] == pytest.approx([0.4] * 3)


def test_arrays_come_in_shards_by_size(tmp_path, command):
    made = ImageBank(tmp_path / "bank", Manifest("digits", 10, 256))
    made.append("synthesize", 0, torch.zeros(12, 3, 256, 256), torch.zeros(12, dtype=torch.long))
    command("datafree.bank", f"export {tmp_path / 'bank'} {tmp_path / 'u'} --format npy --dtype uint8 --shard_mb 1")
    assert json.loads((tmp_path / "u" / "about.json").read_text())["shards"] == [5, 5, 2]
    assert (tmp_path / "u" / "images-00000.npy").stat().st_size < 1.01e6


def test_an_image_folder_says_what_is_known_of_each(bank, command, tmp_path, teacher_file):
    out = tmp_path / "folder"
    flags = f"--format imagefolder --teacher resnet8 --teacher_ckpt {teacher_file}"
    command("datafree.bank", f"export {tmp_path / 'run'} {out} {flags}")
    lines = [json.loads(text) for text in (out / "metadata.jsonl").read_text().splitlines()]
    columns = bank.read_all()
    assert [line["label"] for line in lines] == columns["labels"].tolist() and lines[3]["class_name"] == "3"
    assert {(line["method"], line["external_prior"]) for line in lines} == {("m", "prior")}
    for position, line in enumerate(lines):
        pixels = torch.from_numpy(np.array(Image.open(out / line["file_name"]))).permute(2, 0, 1)
        assert torch.equal(pixels, columns["images"][position])
        top = line["teacher_top5"]
        assert len({entry["label"] for entry in top}) == 5
        assert [e["probability"] for e in top] == sorted((e["probability"] for e in top), reverse=True)
    command("datafree.bank", f"export {tmp_path / 'run'} {tmp_path / 'plain'} --format imagefolder")
    assert "teacher_top5" not in (tmp_path / "plain" / "metadata.jsonl").read_text()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--dtype uint8", "--dtype is only for --format npy; leave it out"),
        ("--format imagefolder --shard_mb 3", "--shard_mb is only for --format npy"),
        ("--teacher resnet8", "--teacher is only for --format npy or imagefolder"),
        ("--format npy --shard_mb 0", "--shard_mb 0 found"),
        ("--format npy --teacher_ckpt x.pth", "without --teacher"),
        ("--format npy --teacher_std 1,2", "--teacher_std"),
        ("--format npy --teacher_std 1,2,0", "a number above 0 wanted"),
        ("--format jpeg", "--format"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(bank, command, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        command("datafree.bank", f"export {tmp_path / 'run'} {tmp_path / 'out'} {flags}")
    assert not (tmp_path / "out").exists()


def test_a_bank_of_class_folders_has_their_names_and_normalization(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "pictures", ["a b", "c"], ["test"])
    for place in ("run/bank", "loose"):
        made = ImageBank(tmp_path / place, Manifest("pictures", 2, 16))
        made.append("synthesize", 0, torch.zeros(2, 3, 16, 16), torch.arange(2))
    write_json(tmp_path / "run" / "args.json", {"args": {"dataset": "folder", "data_root": "pictures"}})
    for bank, flags in (("run", ""), ("loose", "--dataset folder --data_root pictures")):
        command("datafree.bank", f"export {bank} {bank}_i --format imagefolder {flags}")
        lines = (tmp_path / f"{bank}_i" / "metadata.jsonl").read_text().splitlines()
        assert [json.loads(line)["class_name"] for line in lines] == ["a b", "c"]
        command("datafree.bank", f"export {bank} {bank}_n --format npy {flags}")
        assert arrays(tmp_path / f"{bank}_n")[0]["mean"] == list(dataset_info("folder", "pictures").mean)


def test_a_bank_of_a_run_without_real_images_is_normalized_as_in_the_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = ImageBank(tmp_path / "run" / "bank", Manifest("secret", 2, 16))
    made.append("synthesize", 0, torch.zeros(2, 3, 16, 16), torch.arange(2))
    write_json(tmp_path / "run" / "args.json", {"args": {"dataset": "secret", "data_root": "data", "no_test": True}})
    command("datafree.bank", "export run n --format npy")
    assert arrays(tmp_path / "n")[0]["mean"] == [0.5] * 3


def test_another_teacher_is_refused(bank, command, tmp_path):
    torch.manual_seed(1)
    torch.save(build_network("resnet8", 10).state_dict(), tmp_path / "other.pth")
    flags = f"--format imagefolder --teacher resnet8 --teacher_ckpt {tmp_path / 'other.pth'}"
    with pytest.raises(UserError, match="was made with the teacher"):
        command("datafree.bank", f"export {tmp_path / 'run'} {tmp_path / 'out'} {flags}")
