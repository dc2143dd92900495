"""Scripts run as written, shrunk by the flags that a user may add."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import registry
from engine.loops.settings import DistillFlags
from engine.runtime.names import resolve
from tests.conftest import ROOT, TINY, TINY_TASK

SCRIPTS = sorted(p.relative_to(ROOT) for p in ROOT.glob("scripts/*/*.sh"))


def arguments(script):
    """The flags of a script's one python command."""
    text = (ROOT / script).read_text()
    line = re.search(r"^python datafree_kd\.py (.*?)\"\$@\"$", text, re.DOTALL | re.MULTILINE)
    assert line, f'{script} does not end in one datafree_kd.py command with "$@" last'
    return line[1].replace("\\\n", " ").strip()


def generated():
    """{path: text} by the tables of scripts/make_scripts.py."""
    spec = importlib.util.spec_from_file_location("make_scripts", ROOT / "scripts" / "make_scripts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {Path("scripts", name): text for name, text in module.scripts().items()}


GENERATED = generated()


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


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_is_short_and_stops_at_errors(script):
    text = (ROOT / script).read_text()
    assert "set -euo pipefail" in text and len(text.splitlines()) < 20


@pytest.mark.parametrize("script", [s for s in GENERATED if "initBank" not in str(s)], ids=str)
def test_a_script_runs_to_a_student(script, command, teacher_file, tmp_path):
    """Its own flags, then ours: a bank by the script that it names first, then the student."""
    first = re.search(r"First: bash (\S+)", (ROOT / script).read_text())
    method = re.search(r"--method (\w+)", (ROOT / script).read_text())[1]
    small = f"{TINY_TASK} {TINY[method]} --teacher_ckpt {teacher_file} --epochs 1 --kd_steps 1 --ep_steps 1"
    if first:
        command("datafree_kd", f"{arguments(first[1])} {small} --save_dir {tmp_path / 'bank'}")
        small += f" --init_bank {tmp_path / 'bank'}"
    command("datafree_kd", f"{arguments(script)} {small} --save_dir {tmp_path / 'run'}")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["method"] == method


def test_a_script_runs_in_bash(teacher_file, tmp_path):
    environment = os.environ | {"VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    small = f"{TINY_TASK} {TINY['dda']} --teacher_ckpt {teacher_file}".split()
    for name, extra in (("initBank_wrn402", []), ("wrn402_wrn161", ["--init_bank", str(tmp_path / "initBank_wrn402")])):
        script = f"scripts/dda/dda_cifar10_{name}.sh"
        done = subprocess.run(
            ["bash", script, *small, "--save_dir", str(tmp_path / name), *extra],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "wrn402_wrn161" / "result.json").exists()
