"""Scripts run as they are, shortened by flags that a user may add."""

import dataclasses
import functools
import importlib.util
import json

import pytest

import datafree_kd
import registry
from engine.loops.settings import DistillFlags
from engine.runtime.errors import resolve
from tests.conftest import ROOT, TINY, TINY_TASK, script_commands

SCRIPTS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("scripts/*/*.sh"))
SMALLER = "--epochs 1 --kd_steps 1 --ep_steps 1"


def generated():
    """{path: text} of the scripts that scripts/make_scripts.py generates."""
    spec = importlib.util.spec_from_file_location("make_scripts", ROOT / "scripts" / "make_scripts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {f"scripts/{name}": text for name, text in module.scripts().items()}


GENERATED = generated()


@functools.cache
def commands():
    """{script: [entry point, its flags..., "--behind"]}, where ``--behind`` stands for flags that a user adds."""
    return script_commands(SCRIPTS, "--behind")


@functools.cache
def parsed(script, extra=""):
    """(method, its class, flag groups) of a script's flags followed by ``extra``, as the entry point parses them."""
    return datafree_kd.parse(commands()[script][1:-1] + extra.split())


def first_of(script):
    """The script that makes the bank from which this script starts; None if this script makes its own bank."""
    bank = parsed(script)[2][1].init_bank
    return bank and BANKS[bank.removesuffix("/bank")]


@functools.cache
def shrunk(script):
    """The method and flag groups of a script whose flags are followed by those of the tiny task."""
    method = parsed(script)[0]
    name, _, groups = parsed(script, f"{TINY_TASK} {TINY[method]} {SMALLER} --save_dir run")
    return name, groups[0], dataclasses.replace(groups[1], init_bank=None), *groups[2:]


# CSD and DDA share their initial banks: both scripts fill one folder, and the headers name the script of CSD.
BANKS = {parsed(script)[2][1].save_dir: script for script in sorted(GENERATED, reverse=True) if "initBank" in script}
STUDENTS = [script for script in GENERATED if "initBank" not in script]
# One script for each set of flags (with those of the script of its bank) that still differs with the tiny task's flags.
DISTINCT = {(shrunk(script), (first := first_of(script)) and shrunk(first)): script for script in STUDENTS}.values()


def test_scripts_are_what_the_tables_say():
    for path, text in GENERATED.items():
        assert (ROOT / path).read_text() == text, f"run python scripts/make_scripts.py ({path})"


def test_the_published_names_exist():
    names = ("wrn402_wrn161", "resnet34_resnet18", "vgg11_resnet18", "wrn402_wrn401", "wrn402_wrn162")
    for method in registry.METHODS:
        for dataset in ("cifar10", "cifar100"):
            missing = [name for name in names if not (ROOT / f"scripts/{method}/{method}_{dataset}_{name}.sh").exists()]
            assert not missing, (method, dataset, missing)
    for method in ("csd", "dda"):
        assert (ROOT / f"scripts/{method}/{method}_cifar10_initBank_wrn402.sh").exists()


def test_the_published_numbers_are_of_known_methods():
    for table in registry.PUBLISHED.values():
        for name, values in table.items():
            method, *flags = name.split(" --")
            config = resolve(registry.METHODS[method]).Config
            known = {*config.__dataclass_fields__, *DistillFlags.__dataclass_fields__}
            assert len(values) == len(registry.PAIRS) and {flag.split()[0] for flag in flags} <= known, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_one_command_that_takes_further_flags(script):
    """Bash runs the script; its flags are valid; and it names the script that makes the bank from which it starts."""
    text, (entry, *flags) = (ROOT / script).read_text(), commands()[script]
    assert "set -euo pipefail" in text and len(text.splitlines()) < 20
    assert flags.count("--behind") == 1 and flags[-1] == "--behind" and entry in ("datafree_kd.py", "train_scratch.py")
    if entry == "datafree_kd.py":
        task = parsed(script)[2][0]
        assert task.dataset in registry.DATASETS and {task.teacher, task.student} <= registry.MODELS.keys()
    if script in GENERATED and (first := first_of(script)):
        assert f"First: bash {first}\n" in text


@pytest.mark.parametrize("script", DISTINCT)
def test_a_script_runs_to_a_student(script, command, teacher_file, tmp_path):
    """Runs the script of the bank, if there is one, and then the script, each with flags that shorten it."""

    def run(script, folder, more=""):
        small = f"{TINY_TASK} {TINY[parsed(script)[0]]} --teacher_ckpt {teacher_file} {SMALLER} --save_dir {folder} {more}"
        command("datafree_kd", [*commands()[script][1:-1], *small.split()])

    method, bank = parsed(script)[0], ""
    if first := first_of(script):
        run(first, tmp_path / "bank")
        bank = f"--init_bank {tmp_path / 'bank'}"
    run(script, tmp_path / "run", bank)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["method"] == method
