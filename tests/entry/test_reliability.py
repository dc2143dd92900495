"""Files are written whole or damage is noticed, files are checked when read, and no student with NaN is saved."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import engine.loops.distill
from engine.data.image_bank import ImageBank, Manifest
from engine.runtime import checksums
from engine.runtime.errors import UserError, explain, one_line, run_command
from engine.runtime.files import parse_json, read_json
from engine.runtime.run import read_lines
from engine.runtime.schema import require
from engine.runtime.tensors import load_checkpoint, save_checkpoint, save_tensors
from tests.conftest import ROOT, outcome


def flip(file, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_short_campaign_finds_nothing():
    """``python -m tests.campaign`` runs longer campaigns, with whole runs too."""
    words = "-m tests.campaign --minutes 9 --batches 18 --seed 1 --fast --only payloads files kills"
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1].split()[1]) > 80


def test_a_null_in_a_line_counts_as_missing(tmp_path):
    (tmp_path / "times.jsonl").write_text('{"stage": "distill", "round": 0, "seconds": null}\n')
    assert read_lines(tmp_path / "times.jsonl") == [{"stage": "distill", "round": 0}]


def test_what_a_run_writes_is_on_the_list(finished):
    folder = finished("csd")
    assert {"student.pth", "distill.pth", "result.json", "confusion.json"} == set(checksums.listed(folder))
    names = {file.name for file in (folder / "bank").iterdir()}
    assert set(checksums.listed(folder / "bank")) == names - {checksums.LIST}
    last = {line.split("  ")[1]: line.split("  ")[0] for line in (folder / checksums.LIST).read_text().splitlines()}
    for name, digest in last.items():
        assert subprocess.run(["sha256sum", folder / name], capture_output=True, text=True).stdout.startswith(digest)


@pytest.mark.parametrize("name", ["student.pth", "result.json", "distill.pth", "bank/synthesize-000001.safetensors"])
def test_a_flipped_bit_is_noticed(name, distill, copied):
    folder = copied("csd")
    flip(folder / name)
    with pytest.raises(UserError, match=f"{name} is damaged: its SHA-256 is not the one in .*sha256.txt"):
        distill("csd", folder)


@pytest.mark.parametrize("name", ["student.pth", "result.json", "confusion.json"])
def test_a_lost_end_is_made_again_from_the_checkpoint(name, distill, copied, finished, capsys):
    folder = copied("csd")
    (folder / name).unlink()
    distill("csd", folder)
    assert f"distill: {name} is missing and is written again from distill.pth" in capsys.readouterr().out
    assert (folder / name).exists() and outcome(folder) == outcome(finished("csd"))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["distill.pth", "bank/synthesize-000001.safetensors", "bank/distill-000000.safetensors"])
def test_a_lost_file_of_a_done_stage_is_one_line(name, listed, distill, copied):
    folder = copied("csd")
    (folder / name).unlink()
    if not listed:
        ((folder / name).parent / checksums.LIST).unlink()
        name = re.sub(r"(bank/\w+)-\d+(.*)", r"some of \1-\\*\2", name)
    with pytest.raises(UserError, match=f"is done, but {name} is missing; .*--redo (synthesize|distill)$"):
        distill("csd", folder)


@pytest.mark.parametrize("listed", [True, False])
def test_a_bank_that_lost_images_is_no_bank_to_start_from(listed, distill, copied, tmp_path):
    folder = copied("csd")
    (folder / "bank/synthesize-000001.safetensors").unlink()
    if not listed:
        (folder / "bank" / checksums.LIST).unlink()
    with pytest.raises(UserError, match=r"000001.safetensors is missing|has \d+ of its \d+ shards synthesize-\*"):
        distill("csd", tmp_path / "other", f"--init_bank {folder}")


def test_a_bank_without_its_synthesizer_is_no_bank_to_start_from(distill, copied, tmp_path):
    folder = copied("fast")
    (folder / "bank/synthesizer.pth").unlink()
    with pytest.raises(UserError, match="synthesizer.pth is missing, and stage distill starts from it"):
        distill("fast", tmp_path / "other", f"--init_bank {folder}")


def test_a_kill_between_the_first_images_and_their_state_is_made_good(distill, finished, tmp_path, monkeypatch):
    def killed(path, state):
        if state["round"] == 1:
            raise KeyboardInterrupt
        save_checkpoint(path, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("engine.loops.fill.save_checkpoint", killed)
        distill("fast", tmp_path / "run")
    assert (tmp_path / "run/bank/synthesize-000000.safetensors").exists()
    distill("fast", tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(finished("fast"))


def test_a_shorter_bank_made_again_misses_nothing(distill, copied):
    folder = copied("csd")
    distill("csd", folder, "--init_rounds 1 --redo synthesize")
    distill("csd", folder, "--init_rounds 1")
    assert "synthesize-000001.safetensors" not in checksums.listed(folder / "bank")


def test_a_line_cut_off_by_a_kill_is_no_line(tmp_path):
    checksums.keep(tmp_path)
    save_checkpoint(tmp_path / "a.pth", {"x": 1})
    with open(tmp_path / checksums.LIST, "a") as file:
        file.write("0" * 30)
    save_checkpoint(tmp_path / "b.pth", {"x": 2})
    assert set(checksums.listed(tmp_path)) == {"a.pth", "b.pth"} and load_checkpoint(tmp_path / "b.pth") == {"x": 2}


def test_a_kill_between_the_list_and_the_file_leaves_the_old_file_right(tmp_path, monkeypatch):
    checksums.keep(tmp_path)
    save_checkpoint(tmp_path / "a.pth", {"x": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_checkpoint(tmp_path / "a.pth", {"x": 2})
    checksums._checked.clear()
    assert load_checkpoint(tmp_path / "a.pth") == {"x": 1}


def test_a_student_that_diverges_in_the_last_step_is_not_saved(distill, tmp_path, monkeypatch):
    """All losses are finite, so that only the weights show the divergence."""
    steps = engine.loops.distill.Distillation.student_steps

    def diverging(self, batches, round, bar):
        losses = steps(self, batches, round, bar)
        if round == 1:
            next(iter(self.student.parameters())).data.fill_(float("nan"))
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(engine.loops.distill.Distillation, "student_steps", diverging)
        with pytest.raises(
            UserError, match="distill.pth was not written, because .* became NaN or infinite; files written so far are"
        ):
            distill("csd", tmp_path / "run")
    assert not (tmp_path / "run/student.pth").exists() and load_checkpoint(tmp_path / "run/distill.pth")["round"] == 1


def test_a_training_that_diverges_is_not_saved(command, tmp_path):
    flags = "--model resnet8 --dataset digits --epochs 1 --batch_size 256 --gpu -1 --amp no --lr 1e12"
    with pytest.raises(UserError, match="became|not written"):
        command("train_scratch", f"{flags} --save_dir {tmp_path / 'run'} --output {tmp_path / 'w.pth'}")
    assert not (tmp_path / "w.pth").exists()


def test_weights_that_changed_since_are_not_called_trained(command, tmp_path):
    flags = "--model resnet8 --dataset digits --epochs 1 --batch_size 256 --gpu -1 --amp no"
    flags = f"{flags} --save_dir {tmp_path / 'run'} --output {tmp_path / 'w.pth'}"
    command("train_scratch", flags)
    flip(tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth has changed since its run wrote it"):
        command("train_scratch", flags)


@pytest.mark.parametrize("facts", [{}, {"acc1": "much"}, {"acc1": 3, "sha256": 3}])
def test_a_record_of_odd_facts_is_one_line(facts, command, tmp_path):
    flags = "--model resnet8 --dataset digits --epochs 1 --batch_size 600 --gpu -1 --amp no"
    flags = f"{flags} --save_dir {tmp_path / 'run'} --output {tmp_path / 'w.pth'}"
    command("train_scratch", flags)
    record = read_json(tmp_path / "run/stages.json")
    record["train"]["facts"] = facts
    (tmp_path / "run/stages.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="stages.json does not have the expected contents: (acc1|sha256) is"):
        command("train_scratch", flags)


def test_a_lost_record_makes_no_old_result_new(distill, copied):
    folder = copied("csd")
    (folder / "stages.json").unlink()
    before = (folder / "args.json").read_bytes()
    words = "holds bank/synthesize-000000.safetensors of a stage synthesize, which is not in its stages.json; restore"
    with pytest.raises(UserError, match=f"{words} .*--redo synthesize$"):
        distill("csd", folder, "--seed 1 --lr .5")
    with pytest.raises(UserError, match="holds bank/synthesize-000000.safetensors"):
        distill("csd", folder, "--seed 1 --redo distill")
    assert (folder / "args.json").read_bytes() == before and read_json(folder / "result.json")["seed"] == 0
    distill("csd", folder, "--seed 1 --redo synthesize")
    assert read_json(folder / "result.json")["seed"] == 1


def test_a_lost_record_of_a_training_is_one_line(command, tmp_path):
    flags = f"--model resnet8 --dataset digits --epochs 1 --batch_size 600 --gpu -1 --amp no --save_dir {tmp_path / 'run'}"
    command("train_scratch", f"{flags} --output {tmp_path / 'w.pth'}")
    (tmp_path / "run/stages.json").unlink()
    with pytest.raises(UserError, match="holds last.pth of a stage train, which is not in its stages.json; .* with --redo$"):
        command("train_scratch", f"{flags} --output {tmp_path / 'v.pth'} --seed 5")
    assert not (tmp_path / "v.pth").exists()


def test_a_bank_that_changed_before_the_resume_is_refused(distill, copied, interrupted, tmp_path):
    bank, run = copied("csd"), tmp_path / "run"
    with interrupted("engine.loops.distill.save_checkpoint", 2):
        distill("csd", run, f"--init_bank {bank}")
    shutil.rmtree(bank)
    distill("csd", bank, "--seed 1 --stages synthesize")
    words = "stage distill .* is incomplete with other files in --init_bank .*copied: they have changed since; restore them"
    with pytest.raises(UserError, match=words):
        distill("csd", run, f"--init_bank {bank}")
    record = read_json(run / "stages.json")
    del record["distill"]["inputs"]  # of an earlier version
    (run / "stages.json").write_text(json.dumps(record))
    distill("csd", run, f"--init_bank {bank}")
    shutil.rmtree(bank)
    distill("csd", run, f"--init_bank {bank}")  # done: the bank is not needed any more


@pytest.mark.parametrize("value", [7, "text"])
def test_a_figure_of_one_line_alone_does_not_stop_a_run(value, distill, copied):
    folder = copied("csd")
    record, lines = read_json(folder / "stages.json"), (folder / "metrics.jsonl").read_text().splitlines()
    record["synthesize"]["status"] = "incomplete"
    (folder / "stages.json").write_text(json.dumps(record))
    assert json.loads(lines[0])["stage"] == "synthesize"
    lines[0] = json.dumps(json.loads(lines[0]) | {"extra": value})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if value == 7:
        distill("csd", folder)
        facts = read_json(folder / "stages.json")["synthesize"]["facts"]
        assert facts == record["synthesize"]["facts"]
    else:
        with pytest.raises(UserError, match="line 1 of .*metrics.jsonl .*: extra is 'text', a finite number wanted"):
            distill("csd", folder)


ODD = {
    "round": (10**9, "round is 1000000000, a whole number from 0 to 2 wanted"),
    "accuracies": (["x"], r"accuracies\[0\] is 'x', a finite number wanted"),
    "student": (3, "student is 3, an object wanted"),
    "optimizer": ({"state": {}}, "optimizer.param_groups is missing"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_checkpoint_of_odd_values_is_one_line(name, distill, copied):
    folder = copied("csd")
    record = read_json(folder / "stages.json")
    record["distill"]["status"] = "incomplete"
    (folder / "stages.json").write_text(json.dumps(record))
    (folder / checksums.LIST).unlink()
    torch.save(torch.load(folder / "distill.pth") | {name: ODD[name][0]}, folder / "distill.pth")
    with pytest.raises(UserError, match=ODD[name][1]):
        distill("csd", folder)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, "NaN", "1e999", "-Infinity", '"a'])
def test_json_that_is_none(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json is not readable JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError):
        parse_json(text)


def test_tensors_of_odd_kinds(tmp_path):
    whole = torch.ones(3, 3)
    for odd in (
        whole.to(torch.float8_e4m3fn),
        whole.to_sparse(),
        whole.to("meta"),
        whole * float("nan"),
        torch.zeros(1).expand(2**40),
    ):
        torch.save({"a": odd}, tmp_path / "a.pth")
        with pytest.raises(UserError, match="a.pth has (a tensor|NaN)"):
            load_checkpoint(tmp_path / "a.pth")
    with pytest.raises(UserError, match="not written, because a became NaN"):
        save_tensors(tmp_path / "b.safetensors", {"a": whole / 0})


def test_a_column_of_another_kind_is_one_line(tmp_path):
    bank = ImageBank(tmp_path, Manifest("debug", 3, 4))
    for columns in (
        {"labels": torch.zeros(2)},
        {"labels": torch.zeros(1).long()},
        {"source_index": torch.tensor([-1, 0])},
        {"labels": None},
    ):
        tensors = {"images": torch.zeros(2, 3, 4, 4).byte(), "labels": torch.zeros(2).long()} | columns
        save_tensors(bank.shard("synthesize", 0), {name: tensor for name, tensor in tensors.items() if tensor is not None})
        with pytest.raises(UserError) as caught:
            bank.read("synthesize")
        assert "\n" not in str(caught.value)


def test_a_schema_names_the_place():
    schema = {"a": [{"b?": int}], "c": {int, None}}
    require({"a": [{}, {"b": None}, {"b": 3}], "c": None, "more": 1}, schema, "f")
    for value, message in (
        ({"a": [{"b": 1.5}], "c": 1}, r"f does not have the expected contents: a\[0\].b is 1.5, a whole number wanted"),
        ({"a": [], "c": "x"}, "c is 'x'"),
        ({"a": []}, "c is missing"),
        ([], "it is a list, an object wanted"),
    ):
        with pytest.raises(UserError, match=message):
            require(value, schema, "f")


def test_messages_are_one_line_whatever_is_in_a_name(command, forked):
    assert one_line("a\nb\u2028c\x1b[31m\udc80é") == r"a\nb\u2028c\x1b[31m\udc80é"
    words = ["--method", "csd\nx", "--gpu", "-1"]
    code, _, errors = forked(lambda: run_command(lambda: command("datafree_kd", words)))
    assert code == 2 and errors.count("\n") == 1 and r"csd\nx" in errors


def test_memory_that_cannot_be_had_is_one_line():
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nto")):
        assert explain(error).startswith("not enough memory") and "\n" not in explain(error)
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_another_number_of_threads_is_told(distill, copied, capsys):
    folder = copied("csd")
    record = read_json(folder / "stages.json")
    assert record["distill"]["threads"] == torch.get_num_threads()
    record["distill"] |= {"status": "incomplete", "threads": 64}
    (folder / "stages.json").write_text(json.dumps(record))
    distill("csd", folder)
    assert "distill: started with 64 CPU threads, resumed with" in capsys.readouterr().out


def test_a_failed_import_leaves_nothing(command, tmp_path):
    (tmp_path / "images/0").mkdir(parents=True)
    (tmp_path / "images/0/a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="a.png cannot be decoded"):
        command("datafree.bank", f"import {tmp_path / 'images'} {tmp_path / 'bank'} --dataset digits")
    assert [file.name for file in tmp_path.iterdir()] == ["images"]


def test_a_full_disk_is_one_line_that_names_the_file(distill, tmp_path, forked):
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        run_command(lambda: distill("csd", tmp_path / "run"))

    code, _, errors = forked(run)
    last = errors.splitlines()[-1]
    assert code == 2 and "Traceback" not in errors
    assert last.startswith("error: no space left while writing") and str(tmp_path / "run") in last
