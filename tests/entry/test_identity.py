"""From the command line: other data make another run, and a teacher gets the normalization of its training."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import report
from engine.runtime.errors import UserError
from engine.runtime.files import read_json, write_json
from engine.runtime.tensors import load_checkpoint, save_checkpoint
from tests.conftest import TINY

SMALL = "--dataset folder --image_size 16 --gpu -1 --epochs 1 --batch_size 8"
STREAM = f"--method dafl --kd_steps 1 --ep_steps 1 {TINY['dafl'].replace('--kd_steps 1', '')}"
BANK = f"--method csd --kd_steps 1 --ep_steps 1 {TINY['csd']}"
CONTROL = "--method kd --kd_steps 1 --ep_steps 1"


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """{name: root} of class folders with noise in each class's colour.

    "moved" is a copy of "two" in another place. "taught" differs from "two" only in its training images.
    """
    made = {}
    for seed, (name, folder, classes) in enumerate(
        [("two", "two", 2), ("other", "other", 2), ("three", "three", 3), ("moved", "two", 2), ("taught", "two", 2)]
    ):
        root = made[name] = tmp_path_factory.mktemp("data") / folder
        for split in ("train", "test"):
            as_two = name == "moved" or (name, split) == ("taught", "test")
            random = np.random.default_rng([0 if as_two else seed, split == "test"])
            for label in range(classes):
                for k in range(8):
                    pixels = random.integers(0, 160, (16, 16, 3)) + np.eye(3, dtype=int)[label] * 80
                    path = root / split / f"class{label}" / f"{k}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return made


@pytest.fixture
def train(command, roots, tmp_path, monkeypatch):
    """train("two", flags): trains a teacher on one of ``roots``, by default with outputs in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(name, extra=""):
        monkeypatch.setattr("engine.data.splits._train_split_forbidden", False)
        command("train_scratch", f"--model resnet8 {SMALL} --data_root {roots[name]} {extra}")

    return call


@pytest.fixture
def distill_from(command, roots, tmp_path, monkeypatch):
    """distill_from("two", flags): does a data-free run for one of ``roots`` in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(name, flags):
        command("datafree_kd", f"{flags} --teacher resnet8 --student resnet8 {SMALL} --data_root {roots[name]}")

    return call


def test_training_on_other_data_is_another_training(train, tmp_path, capsys):
    place = "--save_dir run --output teacher.pth"
    train("two", place)
    train("two", place)
    train("moved", place)
    assert capsys.readouterr().out.count("already trained") == 2
    for name, called in (("other", "other"), ("three", "three"), ("taught", "two")):
        with pytest.raises(UserError, match=rf"--data_root \(two: 2 classes .*, now \({called}: .*--save_dir.*--redo$"):
            train(name, place)
    train("three", f"{place} --redo")
    stored = load_checkpoint(tmp_path / "teacher.pth")
    assert (stored["dataset"], stored["num_classes"], stored["image_size"]) == ("three", 3, 16)
    assert stored["class_names"] == ["class0", "class1", "class2"] and stored["arch"] == "resnet8"


def test_each_tree_has_files_and_rows_of_its_own(train, distill_from, tmp_path, capsys):
    for name, extra in (("two", ""), ("three", ""), ("other", "--name mine")):
        train(name, extra)
        distill_from(name, f"{STREAM} {extra}")
    assert {p.name for p in Path("checkpoints/pretrained").iterdir()} == {
        f"{n}_resnet8.pth" for n in ("two", "three", "mine")
    }
    assert {p.name for p in Path("checkpoints/scratch").iterdir()} == {f"{n}_resnet8" for n in ("two", "three", "mine")}
    runs = {n: Path(f"checkpoints/dafl/{n}_resnet8_resnet8_seed0") for n in ("two", "three", "mine")}
    assert set(Path("checkpoints/dafl").iterdir()) == set(runs.values())
    for name, run in runs.items():
        result = read_json(run / "result.json")
        assert result["dataset"] == name and re.match(rf"\({name}: .* test images \w{{12}}\)$", result["dataset_identity"])
        assert result["settings"]["teacher_ckpt"] == f"(weights {result['teacher_digest']})" and result["published"] is None
        student = load_checkpoint(run / "student.pth")
        assert student["class_names"] == [f"class{k}" for k in range(3 if name == "three" else 2)]
        assert student["dataset"] == name and len(student["mean"]) == len(student["std"]) == 3
    table = report.rows_of(report.group(report.collect([Path("checkpoints")])))
    assert sorted((r["dataset"], r["method"]) for r in table) == sorted((n, m) for n in runs for m in ("real data", "dafl"))


@pytest.mark.parametrize("flags", [STREAM, BANK, CONTROL], ids=["streams", "bank", "control"])
def test_a_run_on_other_data_is_never_taken_for_done(flags, train, distill_from, tmp_path, capsys):
    train("two", "--output teacher.pth")
    flags += " --teacher_ckpt teacher.pth --save_dir run"
    distill_from("two", flags)
    distill_from("moved", flags)
    assert "distill: already done" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is done with --data_root \(two: .*, now \(other: .*--redo"):
        distill_from("other", flags)
    with pytest.raises(UserError, match=r"test images \w+\), now \(two: "):
        distill_from("other", flags + " --name two")
    if flags.startswith(CONTROL):
        with pytest.raises(UserError, match="train images"):
            distill_from("taught", flags)
    else:
        distill_from("taught", flags)


def test_images_that_are_made_depend_on_classes_alone(train, distill_from, tmp_path, capsys):
    """A bank made for one dataset also serves another one of the same name and classes, on which the student is tested."""
    train("two", "--output teacher.pth")
    distill_from("two", f"{BANK} --teacher_ckpt teacher.pth --save_dir run --stages synthesize")
    distill_from("other", f"{BANK} --teacher_ckpt teacher.pth --save_dir run --name two")
    assert "synthesize: already done" in capsys.readouterr().out and Path("run/result.json").exists()


def test_a_run_of_an_earlier_version_is_refused(train, distill_from, tmp_path):
    train("two", "--output teacher.pth --save_dir teacher")
    flags = f"{STREAM} --teacher_ckpt teacher.pth --save_dir run"
    distill_from("two", flags)
    for file, again in (
        ("run/stages.json", lambda: distill_from("two", flags)),
        ("teacher/stages.json", lambda: train("two", "--output teacher.pth --save_dir teacher")),
    ):
        record = read_json(Path(file))
        for entry in record.values():
            del entry["depends_on"]["data_root"]
        write_json(Path(file), record)
        with pytest.raises(UserError, match=r"earlier version, which did not record --data_root, now \(two: .*--redo"):
            again()


def test_a_teacher_is_normalized_as_it_was_trained(command, tmp_path, capsys):
    """The checkpoint gives the normalization and a flag overrides it; the log names the source; a change is refused."""
    task = "--dataset digits --gpu -1"
    odd = "0.1,0.1,0.1", "0.05,0.05,0.05"
    command(
        "train_scratch",
        f"--model resnet8 {task} --epochs 6 --mean {odd[0]} --std {odd[1]} --output {tmp_path}/t.pth --save_dir {tmp_path}/t",
    )
    trained = read_json(tmp_path / "t" / "result.json")["acc1_last"]
    assert load_checkpoint(tmp_path / "t.pth")["mean"] == [0.1] * 3

    def evaluated(extra=""):
        capsys.readouterr()
        command("train_scratch", f"--model resnet8 {task} --evaluate_only --resume {tmp_path}/t.pth {extra}")
        out = capsys.readouterr().out
        return float(re.search(r"acc1 ([\d.]+) %", out)[1]), out

    acc1, out = evaluated()
    assert acc1 == pytest.approx(trained, abs=0.01)
    assert "mean 0.1,0.1,0.1 (from the checkpoint), std 0.05,0.05,0.05 (from the checkpoint)" in out
    acc1, out = evaluated("--mean 0.305,0.305,0.305 --std 0.319,0.319,0.319")
    assert acc1 < trained - 10 and "(from the flag)" in out
    save_checkpoint(tmp_path / "small.pth", load_checkpoint(tmp_path / "t.pth") | {"image_size": 8})
    with pytest.raises(
        UserError, match="small.pth was trained at 8 px, but the images of digits have 16 px; give --image_size 8"
    ):
        command("train_scratch", f"--model resnet8 {task} --evaluate_only --resume {tmp_path}/small.pth")

    run = (
        f"{STREAM} {task} --epochs 1 --batch_size 8 --teacher resnet8 --student resnet8 --teacher_ckpt {tmp_path}/t.pth "
        f"--save_dir {tmp_path}/run"
    )
    command("datafree_kd", run)
    assert read_json(tmp_path / "run" / "result.json")["teacher_acc1"] == pytest.approx(trained, abs=0.01)
    assert (
        "teacher resnet8 normalizes with mean 0.1,0.1,0.1 (from the checkpoint)"
        in (tmp_path / "run" / "log.txt").read_text()
    )
    command("datafree_kd", f"{run} --teacher_mean {odd[0]}")  # the same values, given by flag
    with pytest.raises(UserError, match="--teacher_mean 0.1,0.1,0.1, now 0.5,0.5,0.5"):
        command("datafree_kd", f"{run} --teacher_mean 0.5,0.5,0.5")
    student = load_checkpoint(tmp_path / "run" / "student.pth")
    assert student["mean"] == pytest.approx([0.305] * 3) and student["num_classes"] == 10 and student["image_size"] == 16
