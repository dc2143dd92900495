"""Evaluation of any model: a run, an exported folder, a checkpoint."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from engine.runtime.errors import UserError
from engine.runtime.tensors import load_checkpoint
from tests.data.trees import write_folders


def test_evaluation_of_a_run_against_its_teacher(runs, measure, teacher_file, tmp_path, capsys):
    """A run folder is evaluated on its own dataset."""
    run = runs["resnet8"]
    measure(run, "--against", teacher_file, "--csv", tmp_path / "p.csv", "--json", tmp_path / "f.json")
    figures, result = json.loads((tmp_path / "f.json").read_text()), json.loads((run / "result.json").read_text())
    assert figures["acc1"] == result["acc1_last"] and figures["teacher_acc1"] == result["teacher_acc1"]
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()]
    assert rows[0] == ["image", "label", "predicted", "confidence", "teacher_predicted"]
    assert len(rows) - 1 == figures["images"] == sum(map(sum, figures["confusion"]))
    right = [row[1] == row[2] for row in rows[1:]]
    assert 100 * sum(right) / len(right) == pytest.approx(figures["acc1"], abs=1e-3)
    same = [row[2] == row[4] for row in rows[1:]]
    assert 100 * sum(same) / len(same) == pytest.approx(figures["agreement"], abs=1e-3)
    printed = capsys.readouterr().out
    assert f"acc1 {figures['acc1']:.2f} %" in printed and "acc1 by class" in printed and "agrees with" in printed


def test_an_evaluation_without_finite_figures_or_into_another_file_is_refused(runs, measure, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for flag, file, message in (
        ("--csv", tmp_path / "notes.txt", "was not written by this command"),
        ("--json", runs["resnet8"] / "args.json", "was not written by this command"),
        ("--json", runs["resnet8"] / "result.json", "is the name of a file of the run"),
        ("--std", "1e-320,1,1", "each at least 1e-06"),
        ("--mean", "a", "argument --mean: 'a' found, a number wanted"),
    ):
        before = file.read_bytes() if hasattr(file, "read_bytes") else b""
        with pytest.raises(UserError, match=message):
            measure(runs["resnet8"], "--dataset", "digits", flag, file)
        assert not before or file.read_bytes() == before
    state = load_checkpoint(runs["resnet8"] / "student.pth")
    state["state_dict"]["fc.weight"] = torch.full_like(state["state_dict"]["fc.weight"], 3e38)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="gives NaN or infinite logits"):
        measure(tmp_path / "w.pth", "--dataset", "digits", "--json", tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_other_classes_name_a_command_that_works(runs, measure, tmp_path):
    write_folders(tmp_path / "two", ["a", "b"], ["test"])
    file = runs["resnet8"] / "student.pth"
    with pytest.raises(UserError, match=re.escape(f"train_scratch.py --model resnet8 --resume {file} --dataset")):
        measure(file, "--dataset", "folder", "--data_root", tmp_path / "two")


def test_evaluation_of_an_exported_folder_on_folders_of_images(runs, export, measure, tmp_path, capsys):
    export(runs["resnet8"], tmp_path / "student")
    for label, name in ((3, "3"), (5, "5")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(3):
            pixels = np.random.default_rng(10 * label + k).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"pictures/{name}/{k}.png")
    measure(tmp_path / "student", "--images", tmp_path / "pictures", "--json", tmp_path / "f.json")
    figures = json.loads((tmp_path / "f.json").read_text())
    tested = [label for label, value in enumerate(figures["class_acc1"]) if value is not None]
    assert figures["images"] == 6 and tested == [3, 5]
    measure(tmp_path / "student", "--images", tmp_path / "pictures" / "3", "--csv", tmp_path / "p.csv")
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()]
    assert rows[0] == ["image", "predicted", "confidence"] and len(rows) == 4 and rows[1][0].endswith("0.png")
    said = capsys.readouterr().out.split("most frequent predictions\n")[1].split()
    assert "acc1" not in said and sum(map(int, said[1::2])) == 3 and set(said[::2]) == {row[1] for row in rows[1:]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("none --dataset digits", "there is no file or folder none; give one, a public name"),
        ("none --images {tmp}", "there is no file or folder none; give one, a public name"),
        ("{bare} --dataset digits", "does not record its architecture; give --arch NAME"),
        ("{tmp} --dataset digits", "has no finished run"),
        ("{bare} --dataset digits --images x", "give either --dataset NAME or --images FOLDER, not both"),
        ("none", "none is no run folder, .*; give --dataset NAME or --images FOLDER"),
    ],
)
def test_wrong_evaluations_are_one_line(arguments, message, measure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": torch.zeros(10, 4)}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=message) as caught:
        measure(*arguments.format(tmp=tmp_path, bare=tmp_path / "bare.pth").split())
    assert "\n" not in str(caught.value)
