"""Before the first stage: mistakes are reported then, and no folder is made. Also runs without any real image."""

import json
import shutil

import pytest
import torch

from engine import report
from engine.loops.measures import Agreement
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_checkpoint, load_tensors, weights_digest
from tests.conftest import CPU, dataset_info, load_teacher

UNSEEN = "--no_test --dataset pens --num_classes 10 --image_size 16"
HUB = "there is no such directory, and no such model could be downloaded from the hub"
REFUSED = {
    "csd --init_bank {tmp}/nowhere": "no image bank",
    "dda --init_variants {tmp}/nowhere": "no image bank",
    "dda --stages augment": "stage synthesize .* is not started",
    "dda --stages distill": "is not started",
    "csd --redo nonsense": "--redo nonsense found, one of the stages synthesize, distill wanted",
    "noise --images {tmp}/nowhere": "--images .* contains no images",
    "noise --images {tmp}/garbage": "a.png",
    "nayer --label_embedding clip --text_model nobody/nothing": f"--text_model nobody/nothing: {HUB}",
    "dda --prior image_variation --diffusion_model nobody/nothing": f"--diffusion_model nobody/nothing: {HUB}",
    "dda --prior image_to_image --diffusion_model {tmp}/garbage": "this directory is not a complete model",
    "dda --embedding clip --embedding_model nobody/nothing": f"--embedding_model nobody/nothing: {HUB}",
    "diffdfkd --diffusion_model nobody/nothing": f"--diffusion_model nobody/nothing: {HUB}",
    "diffdfkd --diffusion_model {tmp}/garbage/a.safetensors": "a.safetensors",
    "diffdfkd --export_png {tmp}/garbage": "exists already and is not an empty folder",
    "csd --dataset cifar10 --data_root {tmp}/nowhere": "--no_test, which needs no real image",
    "csd --stages synthesize --dataset cifar10 --data_root {tmp}/nowhere": "--no_test, which needs no real image",
    "csd --no_test --dataset pens --num_classes 10": "'pens'; with --no_test, an unknown dataset needs --num_classes and --image_size",
    "csd --no_test --num_classes 7": "--num_classes 7: digits has 10 classes",
    "kd --no_test": "kd trains on real images; leave it out",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_refused_run_leaves_no_folder(arguments, distill, tmp_path):
    (tmp_path / "garbage").mkdir()
    for name in ("a.png", "a.safetensors"):
        (tmp_path / "garbage" / name).write_text("no picture and no model")
    method, _, flags = arguments.format(tmp=tmp_path).partition(" ")
    with pytest.raises(UserError, match=REFUSED[arguments]) as caught:
        distill(method, tmp_path / "run", flags)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_teacher_is_told_of_once_before_the_first_stage(distill, tmp_path):
    """Reported even if only images are made. An untrained teacher gives a warning, and a done run reports nothing again."""
    distill("csd", tmp_path, "--stages synthesize")
    first = (tmp_path / "log.txt").read_text().splitlines()
    assert (
        "teacher resnet8 normalizes with mean 0.305" in first[0] and "% on the 101 test images of digits, 16 px" in first[0]
    )
    assert (
        "warning: the teacher's accuracy is low (chance is 10.00 %)" in first[1]
        and "another order of the classes" in first[1]
    )
    distill("csd", tmp_path, "--stages synthesize")
    assert len((tmp_path / "log.txt").read_text().splitlines()) == len(first) + 1, "that it was done before, and no more"
    distill("csd", tmp_path)
    acc1 = json.loads((tmp_path / "result.json").read_text())["teacher_acc1"]
    assert f": {acc1:.2f} % on the 101" in first[0]


def test_without_a_real_image_a_bank_tells_of_agreement(distill, finished, teacher_file, tmp_path, capsys):
    """The student equals that of a run with a test split; its agreement with the teacher is recomputed here."""
    distill("csd", tmp_path / "runs" / "pens", UNSEEN)
    run = tmp_path / "runs" / "pens"
    result, log = json.loads((run / "result.json").read_text()), (run / "log.txt").read_text()
    assert (
        not [name for name in result if "acc1" in name]
        and "acc1" not in log
        and "acc1" not in (run / "metrics.jsonl").read_text()
    )
    assert "its accuracy is not known (--no_test)" in log and "agreement with the teacher" in log
    assert "test images" not in result["dataset_identity"]

    info = dataset_info("digits")
    stored = load_checkpoint(run / "student.pth")
    assert stored["mean"] == [0.5] * 3 and stored["agreement"] == result["agreement_last"]
    teacher = load_teacher("resnet8", info, CPU, str(teacher_file), (0.5,) * 3, (0.5,) * 3)
    student = load_teacher("resnet8", info, CPU, str(run / "student.pth"))
    images = torch.cat([load_tensors(file)["images"] for file in sorted((run / "bank").glob("*.safetensors"))])
    alike = teacher(images / 255).argmax(1) == student(images / 255).argmax(1)
    assert len(images) == 24 and result["agreement_last"] == pytest.approx(100 * alike.float().mean().item(), abs=1e-3)
    assert 0 <= result["agreement_last"] <= result["agreement_best"] <= 100

    for name, flags in (("tested", ""), ("untested", "--no_test")):
        shutil.copytree(finished("csd", flags), tmp_path / "runs" / name)
    digests = [
        weights_digest(load_checkpoint(tmp_path / "runs" / n / "student.pth")["state_dict"]) for n in ("tested", "untested")
    ]
    assert digests[0] == digests[1]

    capsys.readouterr()
    for flags in ("", "--wide", "--rounds --target 5 --budget 3", "--markdown --folders"):
        text = report.table(report.parse([str(tmp_path / "runs"), *flags.split()]))
        assert "agreement" in text and f"{result['agreement_last']:.2f}" in text
    lines = tmp_path / "lines.jsonl"
    assert report.write_lines(lines, report.collect([tmp_path / "runs"])) == 3 == len(report.collect([lines]))


def test_an_epoch_of_whole_rounds_is_told(distill, tmp_path):
    distill("dafl", tmp_path, "--epochs 1 --ep_steps 5 --kd_steps 2")
    assert "--ep_steps 5 is no multiple of --kd_steps 2: an epoch has 4 student steps" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "result.json").read_text())["student_steps"] == 4


def test_without_a_real_image_a_stream_tells_of_agreement_and_goes_on(
    distill, teacher_file, tmp_path, monkeypatch, interrupted
):
    """The student uses the normalization in the teacher's checkpoint."""
    monkeypatch.setattr(Agreement, "MOST", 20)
    stored = load_checkpoint(teacher_file) | {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.4, 0.4]}
    torch.save(stored, tmp_path / "t.pth")
    flags = f"{UNSEEN} --teacher_ckpt {tmp_path / 't.pth'}"
    distill("dafl", tmp_path / "whole", flags)
    student = load_checkpoint(tmp_path / "whole" / "student.pth")
    assert student["mean"] == pytest.approx([0.1, 0.2, 0.3]) and student["dataset"] == "pens"

    with interrupted("engine.loops.distill.save_checkpoint", 2):
        distill("dafl", tmp_path / "run", flags)
    distill("dafl", tmp_path / "run", flags)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert lines == (tmp_path / "run" / "metrics.jsonl").read_text() and lines.count('"agreement"') == 2


def test_a_test_split_that_comes_later_is_of_another_result(distill, copied):
    folder = copied("csd", "--no_test")
    with pytest.raises(UserError, match=r"is done with --data_root \(digits: 10 classes \w+, 16 px\), now .* test images"):
        distill("csd", folder)
    distill("csd", folder, "--redo distill")
    assert "acc1_last" in json.loads((folder / "result.json").read_text())
