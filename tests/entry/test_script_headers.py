"""The header of a script gives our accuracy if the results of this repository contain runs with its settings."""

import importlib.util
import json

import pytest

import datafree_kd
from engine.runtime.flags import stage_flags
from tests.conftest import ROOT

TASK = "--dataset cifar10 --teacher wrn40_2 --student wrn16_1 "


@pytest.fixture(scope="module")
def make_scripts():
    spec = importlib.util.spec_from_file_location("make_scripts", ROOT / "scripts" / "make_scripts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(command, bank_command="", **values):
    """The result that a run of ``command`` writes, with a bank by ``bank_command``."""
    groups = datafree_kd.parse(command.split())[2]
    banks = datafree_kd.parse((bank_command or command).split())[2]
    made = stage_flags("synthesize", *banks) | stage_flags("augment", *groups) | stage_flags("distill", *groups)
    names = {"method": command.split()[1], "dataset": "cifar10", "teacher": "wrn40_2", "student": "wrn16_1"}
    base = names | {
        "machine": "a machine",
        "seed": 0,
        "acc1_last": 70.0,
        "seconds": {"distill": 5400.0},
        "settings": json.loads(json.dumps(made)),
    }
    return base | values


def test_runs_with_the_settings_of_a_script_are_told(make_scripts):
    command = f"--method fast {TASK}"
    runs = [result(command, seed=k, acc1_last=70.0 + 2 * k) for k in range(2)]
    found = make_scripts.measured(runs, command, command)
    assert found == "\n# Ours (last epoch): 71.00 ± 1.41 %, seeds 0, 1; 1.5 h on a machine."


@pytest.mark.parametrize("other", ["--epochs 2", "--batch_size 8", "--synthesis_batch_size 8"])
def test_runs_with_other_settings_are_not(make_scripts, other):
    command = f"--method fast {TASK}"
    assert not make_scripts.measured([result(f"{command} {other}")], command, command)
    assert not make_scripts.measured([result(command, student="wrn16_2")], command, command)


def test_the_bank_of_a_script_is_its_own(make_scripts):
    """A run from a bank of other settings does not count."""
    command, bank = f"--method cmi {TASK}", f"--method cmi {TASK} --init_rounds 7"
    assert make_scripts.measured([result(command, bank)], command + " --init_bank a/bank", bank)
    assert not make_scripts.measured([result(command, command)], command, bank)


@pytest.mark.parametrize("method", ["dafl", "zskt", "dfad", "dfq", "adi", "diffdfkd"])
def test_headers_name_the_pair_for_which_settings_were_published(make_scripts, method):
    pair = "wrn40_2 -> wrn16_2" if method == "diffdfkd" else "wrn40_2 -> wrn16_1"
    texts = {name: text for name, text in make_scripts.of_method(method, "paper", []) if "initBank" not in name}
    assert len(texts) >= 10 and all(f"# Settings: published for CIFAR-10, {pair}" in text for text in texts.values())


def test_the_scripts_hold_what_the_results_say(make_scripts, monkeypatch):
    monkeypatch.setattr(make_scripts, "results", lambda: [result(f"--method dafl {TASK}")])
    told = [name for name, text in make_scripts.scripts().items() if "# Ours" in text]
    assert told == ["dafl/dafl_cifar10_wrn402_wrn161.sh"]
