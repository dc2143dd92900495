"""Errors for small mistakes: garbage files, misspelt flags, another network's weights, another working directory."""

import os
import subprocess
import sys

import pytest
import torch

from datafree.diffusion.default_prior import DEFAULT_MODEL, EMBEDDED, default_prior
from engine.networks.build import find_checkpoint, matching_models, short_name, split_arguments
from engine.runtime.errors import UserError
from engine.runtime.files import PROJECT, shipped
from engine.runtime.tensors import load_checkpoint
from registry import DATASETS, METHODS, MODELS
from tests.conftest import ROOT, build_network, dataset_info, load_teacher, make_task

CPU = torch.device("cpu")


@pytest.mark.parametrize("data", [b"", b"eeee", b"some text, no checkpoint", bytes(100), bytes(range(256))])
def test_garbage_is_called_no_checkpoint(data, tmp_path):
    (tmp_path / "g.pth").write_bytes(data)
    with pytest.raises(UserError, match="g.pth cannot be read: it is not a complete file of torch.save; give a file with"):
        load_checkpoint(tmp_path / "g.pth")


def test_pickled_objects_are_still_called_so(tmp_path):
    torch.save({"state_dict": os.system}, tmp_path / "g.pth")
    with pytest.raises(UserError, match="it contains pickled objects other than tensors"):
        load_checkpoint(tmp_path / "g.pth")


@pytest.mark.parametrize("program", ["datafree_kd", "train_scratch"])
@pytest.mark.parametrize("kind, table", [("models", MODELS), ("datasets", DATASETS), ("methods", METHODS)])
def test_the_tables_are_listed(program, kind, table, command, capsys):
    with pytest.raises(SystemExit) as end:
        command(program, f"--list {kind}")
    assert not end.value.code and capsys.readouterr().out.split() == list(table)


@pytest.mark.parametrize("program", ["datafree_kd", "train_scratch"])
def test_a_list_of_nothing_names_the_kinds(program, command):
    with pytest.raises(UserError, match="--list needs a kind of names; give one of models, datasets, methods"):
        command(program, "--list")


def test_seed_and_seeds_are_not_both_given(command):
    with pytest.raises(UserError, match="--seed and --seeds found, one of them wanted"):
        command("datafree_kd", "--method kd --seed 3 --seeds 0,1")


def test_a_hint_names_one_spelling(command):
    for wrong in ("--g-stepz", "--g_stepz", "--g_stepz=3"):
        with pytest.raises(UserError, match=r"did you mean [^?]*--g_steps") as caught:
            command("datafree_kd", f"--method dafl {wrong} 3")
        assert "--g-steps" not in str(caught.value)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("resnet8", ("resnet8", {})),
        ("a.b:f()", ("a.b:f", {})),
        ("a.b:f(depth=3, kind='x', widths=(1, 2))", ("a.b:f", {"depth": 3, "kind": "x", "widths": (1, 2)})),
    ],
)
def test_arguments_of_a_factory(spec, expected):
    assert split_arguments(spec) == expected


@pytest.mark.parametrize(
    "text",
    [
        "f(3)",
        "f(depth=open('x'))",
        "f(**{'a': 1})",
        "f(depth=3",
        "f)(",
        "f(a=1)(b=2)",
        "f(a=1).g()",
        "f(a=1) + g()",
        "f(a=__import__('os'))",
    ],
)
def test_nothing_but_literals_by_name_is_taken(text):
    with pytest.raises(UserError, match="arguments must be given by name, with literal values") as caught:
        split_arguments(f"a.b:{text}")
    assert "\n" not in str(caught.value)


def test_torchvisions_own_factories():
    spec = "torchvision.models:get_model(name='resnet18')"
    assert build_network(spec, 7).fc.out_features == 7
    assert short_name(spec) == "torchvision_models_get_model_name_resnet18"
    with pytest.raises(UserError, match="failed: .*unexpected keyword argument 'dept'"):
        build_network("resnet8(dept=3)", 10)


def test_the_network_that_fits_is_named(tmp_path):
    info = dataset_info("digits")
    torch.save(build_network("resnet20_he", 10).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=" wanted: .*; resnet20_he would fit$"):
        load_teacher("resnet8", info, CPU, str(tmp_path / "a.pth"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="give the architecture that it was trained with$"):
        load_teacher("resnet8", info, CPU, str(tmp_path / "b.pth"))


@pytest.mark.parametrize("name", ["wrn40_1", "resnet32x4", "vgg11", "efficientnet_b0_imagenet"])
def test_a_network_fits_its_own_weights(name):
    state = build_network(name, 10).state_dict()
    shapes = {key: tensor.shape for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    assert name in matching_models({n: MODELS[n] for n in (name, "resnet8", "wrn16_1", "vgg8")}, shapes, 10)


def test_defaults_are_looked_for_here_and_beside_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "checkpoints/priors/glyphs_digits_16.safetensors"
    assert shipped(name) == PROJECT / name == EMBEDDED and EMBEDDED.exists()
    mine = type(PROJECT)(name)
    mine.parent.mkdir(parents=True), mine.write_text("one's own comes first")
    assert shipped(name) == mine
    assert shipped("nowhere/x.pth") == type(PROJECT)("nowhere/x.pth")
    monkeypatch.setattr("engine.runtime.files.PROJECT", tmp_path / "project")
    weights = tmp_path / "project" / "checkpoints" / "pretrained" / "digits_resnet8.pth"
    with pytest.raises(UserError, match="no teacher checkpoint checkpoints/pretrained/digits_resnet8.pth"):
        find_checkpoint("resnet8", "digits", None)
    weights.parent.mkdir(parents=True), weights.write_text("")
    assert find_checkpoint("resnet8", "digits", None) == weights


def test_the_advice_on_a_missing_checkpoint_fits_the_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="or give its path with --resume$"):
        command("train_scratch", "--model wrn16_2 --dataset digits --evaluate_only")
    with pytest.raises(UserError, match="nowhere.pth does not exist"):
        command("train_scratch", "--model wrn16_2 --dataset digits --evaluate_only --output nowhere.pth")
    with pytest.raises(UserError, match="or give its path, and --arch wrn16_2$"):
        command("engine.evaluate", "wrn16_2 --dataset digits")
    with pytest.raises(UserError, match="there is no file or folder nowhere.pth; give one"):
        command("engine.evaluate", "nowhere.pth --dataset digits")


def test_from_another_directory_the_shipped_prior_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task = make_task(class_names=tuple("0123456789"))
    assert default_prior(task) == str(EMBEDDED) and not capsys.readouterr().out


@pytest.mark.parametrize(
    "names, size, offered",
    [
        (tuple("0123456789"), 32, True),
        (("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), 16, True),
        (tuple(f"digit_{i}" for i in range(10)), 28, True),
        (None, 28, True),
        (tuple("abcdefghij"), 16, False),
        (tuple("1234567890"), 16, False),
    ],
)
def test_the_prior_of_digits_is_offered_where_classes_may_be_digits(names, size, offered, capsys):
    task = make_task(image_size=size, class_names=names)
    assert default_prior(task) == DEFAULT_MODEL
    assert ("give --diffusion_model" in capsys.readouterr().out) == offered


END = """
import sys
from engine.runtime.errors import UserError, run_command
import threading, time
def main():
    print("unflushed", end="")
    {body}
threading.Thread(target=time.sleep, args=(20,)).start()  # an orderly end would wait for it
run_command(main, lambda: print(", left", end=""))
"""


@pytest.mark.parametrize(
    "body, code, out, err",
    [
        ("pass", 0, "unflushed, left", ""),
        ("raise UserError('wrong')", 2, "unflushed", "error: wrong\n"),
        ("raise OSError(28, 'full', 'x')", 2, "unflushed", "error: no space left"),
        (
            "raise RuntimeError('Connection closed by peer')",
            2,
            "unflushed",
            "error: process 0 lost the connection to another process",
        ),
        ("raise KeyboardInterrupt", 130, "unflushed", "\nstopped"),
        ("1 / 0", 1, "unflushed", "Traceback"),
    ],
)
def test_a_process_started_with_others_ends_at_once_flushed_and_with_its_exit_code(body, code, out, err):
    words = [sys.executable, "-c", END.format(body=body)]
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stdout) == (code, out) and done.stderr.startswith(err)
