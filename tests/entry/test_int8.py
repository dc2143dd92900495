"""int8 graphs of a teacher: they compute the right logits, and the result lines make the table."""

import json

import numpy as np
import pytest
import torch

from datafree.int8 import Graph, export_onnx, quantize, read_lines, rows, write_lines
from engine.data.image_bank import ImageBank, Manifest
from engine.data.splits import load_split
from engine.runtime.errors import UserError
from tests.conftest import dataset_info, load_teacher, make_classifier

pytest.importorskip("onnxruntime")


def line(**values):
    base = {
        "dataset": "digits",
        "teacher": "t",
        "teacher_digest": "d",
        "seed": 0,
        "acc1_fp32": 99.0,
        "test_images": 10,
        "calibration": "random noise",
        "images": 5,
        "weight_bits": 8,
        "acc1": 50.0,
    }
    return base | values


def test_a_graph_computes_what_the_network_does_and_quantized_about_that(tmp_path):
    torch.manual_seed(0)
    classifier = make_classifier().eval()
    images = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        wanted = classifier(images)
    export_onnx(classifier, tmp_path / "whole.onnx")
    assert torch.allclose(Graph(tmp_path / "whole.onnx")(images), wanted, atol=1e-5)
    assert Graph(tmp_path / "whole.onnx")(images[:3]).shape == (3, 10)
    errors = {}
    for bits in (8, 4):
        quantize(tmp_path / "whole.onnx", tmp_path / f"{bits}.onnx", images.numpy(), bits)
        errors[bits] = float((Graph(tmp_path / f"{bits}.onnx")(images) - wanted).norm() / wanted.norm())
    assert 0 < errors[8] < 0.1 and errors[8] < errors[4] < 1, errors
    quantize(tmp_path / "whole.onnx", tmp_path / "dark.onnx", np.zeros((4, 3, 16, 16), np.float32), 8)
    dark = float((Graph(tmp_path / "dark.onnx")(images) - wanted).norm() / wanted.norm())
    assert dark > 2 * errors[8], "the calibration images make no difference"


def test_lines_replace_those_of_the_same_conditions(tmp_path):
    file = tmp_path / "int8.jsonl"
    write_lines(file, [line(), line(calibration="bank", method="m", acc1=90.0)])
    write_lines(file, [line(acc1=60.0), line(weight_bits=4, acc1=20.0)])
    eight, four = rows(read_lines(file))
    assert (eight["random noise"], eight["bank"], eight["float32"]) == ("60.00", "90.00 (m)", "99.00")
    assert (four["weights"], four["random noise"], four["bank"]) == ("4 bit", "20.00", "")
    file.write_text("{}\n")
    with pytest.raises(UserError, match="line 1 of"):
        read_lines(file)


@pytest.mark.parametrize("wrong", [{"acc1": "high"}, {"images": None}, {"calibration": "photos"}, {"weight_bits": "8"}])
def test_a_file_of_other_lines_is_refused_before_the_measurements(wrong, command, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(line() | wrong) + "\n")
    (tmp_path / "t.md").write_text("no table")
    flags = f"--dataset none --teacher none --bank {tmp_path} --lines"
    with pytest.raises(UserError, match=f"line 1 of .*{next(iter(wrong))}"):
        command("datafree.int8", f"{flags} {tmp_path / 'r.jsonl'}")
    with pytest.raises(UserError, match="has no lines <!-- table:int8 -->"):
        command("datafree.int8", f"{flags} {tmp_path / 'new.jsonl'} --into {tmp_path / 't.md'}")


def test_the_command_measures_a_teacher_on_digits(command, tmp_path, teacher_file):
    bank = ImageBank(tmp_path / "bank", Manifest("digits", 10, 16, method="m"))
    bank.append("synthesize", 0, torch.rand(20, 3, 16, 16), torch.arange(20) % 10)
    table = tmp_path / "t.md"
    table.write_text("<!-- table:int8 -->\n<!-- /table:int8 -->\n")
    flags = f"--dataset digits --teacher resnet8 --teacher_ckpt {teacher_file} --bank {tmp_path / 'bank'}"
    command("datafree.int8", f"{flags} --lines {tmp_path / 'r.jsonl'} --into {table} --test_images 70")
    lines = [json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {(found["calibration"], found["weight_bits"]) for found in lines} == {
        (kind, bits) for kind in ("random noise", "bank", "real images") for bits in (8, 4)
    }
    assert {(found["images"], found["test_images"]) for found in lines} == {
        (20, 70)
    } and "| digits | resnet8 |" in table.read_text()


def test_a_graph_without_training_images(command, tmp_path, teacher_file, monkeypatch, capsys):
    def only_the_test_split(info, split, device):
        if split == "train":
            raise UserError("no training images")
        return load_split(info, split, device)

    monkeypatch.setattr("datafree.int8.load_split", only_the_test_split)
    ImageBank(tmp_path / "bank", Manifest("digits", 10, 16)).append(
        "synthesize", 0, torch.rand(20, 3, 16, 16), torch.arange(20) % 10
    )
    flags = f"--dataset digits --teacher resnet8 --teacher_ckpt {teacher_file} --bank {tmp_path / 'bank'} --test_images 70"
    command("datafree.int8", f"{flags} --output {tmp_path / 'int8.onnx'}")
    said = capsys.readouterr().out
    assert "left out of the comparison: no training images" in said and "| 8 bit |" in said and "int8.onnx\n" in said
    images = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        wanted = load_teacher("resnet8", dataset_info("digits", "data"), torch.device("cpu"), str(teacher_file))(images)
    error = float((Graph(tmp_path / "int8.onnx")(images) - wanted).norm() / wanted.norm())
    assert 0 < error < 0.2
    (tmp_path / "mine.onnx").write_text("mine")
    with pytest.raises(UserError, match="--output .*mine.onnx exists already"):
        command("datafree.int8", f"{flags} --output {tmp_path / 'mine.onnx'}")
    assert (tmp_path / "mine.onnx").read_text() == "mine"


def test_a_bank_of_another_teacher_is_refused(command, tmp_path, teacher_file):
    ImageBank(tmp_path / "bank", Manifest("digits", 10, 16, "x", "other")).append(
        "synthesize", 0, torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
    )
    flags = f"--dataset digits --teacher resnet8 --teacher_ckpt {teacher_file} --bank {tmp_path / 'bank'}"
    with pytest.raises(UserError, match="give a bank of this teacher"):
        command("datafree.int8", f"{flags} --lines {tmp_path / 'r.jsonl'}")
