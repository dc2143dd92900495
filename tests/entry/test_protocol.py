"""scripts/protocol_c.sh runs every method with the same student steps, and leaves out runs that are done."""

import os
import shlex
import subprocess
import time

import pytest

import registry
from datafree_kd import parse
from tests.conftest import ROOT


def script(*words, **variables):
    environment = os.environ | {"VENV": "none", "AMP": "bf16", "IMAGE": "picture.jpg"} | variables
    done = subprocess.run(
        ["bash", "scripts/protocol_c.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture(scope="module")
def commands():
    """[(name of the run folder, seed, method, flag groups)] for all runs of the protocol."""
    code, lines, _ = script("--list", OUT="out")
    assert code == 0
    found = []
    for line in lines:
        method, _, groups = parse(shlex.split(line)[2:])
        found.append((*groups[1].save_dir.removeprefix("out/").split("/seed"), method, groups))
    return found


def test_every_method_has_a_run_and_some_have_three(commands):
    assert {method for _, _, method, _ in commands} == set(registry.METHODS)
    assert len({(name, seed) for name, seed, _, _ in commands}) == len(commands)
    often = {name for name, seed, _, _ in commands if seed == "2"}
    assert often == {"kd", "fast", "nayer", "csd", "dda"} == {name for name, seed, _, _ in commands if seed == "1"}


def test_every_student_makes_4000_steps_of_256_images(commands):
    for name, seed, _, (task, run, distill, config) in commands:
        schedule = distill.schedule()
        assert schedule.rounds * schedule.kd_steps == pytest.approx(4000, rel=0.0101), name
        assert (schedule.batch_size, task.teacher, task.student, run.amp) == (256, "resnet20", "wrn16_1", "bf16")
        assert run.seed == int(seed) and run.scale != 1


def test_settings_but_for_lengths_are_published(commands):
    lengths = {"g_steps", "init_g_steps", "init_rounds", "synthesis_batch_size", "images_per_class", "num_inference_steps"}
    controls = {"image", "images", "bn_mode", "diffusion_model"}
    for name, _, method, (*_, config) in commands:
        published = parse(["--method", method, *(["--image", "x"] if method == "one_image" else [])])[2][3]
        changed = {flag for flag, value in vars(config).items() if value != getattr(published, flag)}
        assert changed <= lengths | controls | {"fit_passes", "adv_steps", "reset_l0_round"}, name


def test_what_is_done_is_left_out(tmp_path):
    (tmp_path / "kd/seed0").mkdir(parents=True)
    (tmp_path / "kd/seed0/result.json").write_text("{}")
    _, lines, _ = script("--list", "kd", "noise", OUT=str(tmp_path))
    assert [line.split("--save_dir ")[1].strip() for line in lines] == [
        f"{tmp_path}/{run}" for run in ("noise/seed0", "kd/seed1", "kd/seed2")
    ]
    _, lines, _ = script("--list", "noise", "dfq", OUT=str(tmp_path), SEEDS="4", EXTRA="--compile no")
    assert len(lines) == 2 and all("--seed 4" in line and line.endswith("--compile no") for line in lines)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--list", "fasst"], "'fasst' found, names out of kd"),
        (["--job", "2"], "--job found"),
        (["--jobs", "0", "kd"], "--jobs '0' found, a whole number from 1 on wanted"),
        (["--jobs"], "--jobs '' found"),
    ],
)
def test_mistakes_are_one_line(words, message):
    code, lines, error = script(*words)
    assert code == 2 and not lines and message in error and len(error.splitlines()) == 1


def test_runs_that_fail_are_said(tmp_path):
    """A replacement of python fails for every command."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "error: $*" >&2\nexit 2\n')
    (tmp_path / "python").chmod(0o755)
    variables = {"OUT": str(tmp_path), "SEEDS": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}", "TEACHER": "nowhere.pth"}
    code, lines, error = script("kd", **variables)
    assert code == 2 and not lines and "the teacher nowhere.pth does not exist" in error
    code, lines, error = script("--jobs", "2", "kd", "noise", **variables | {"TEACHER": str(tmp_path / "python")})
    assert code == 1 and len(lines) == 2
    assert "kd/seed0: error: datafree_kd.py --method kd" in error and "noise/seed0: error: " in error
    assert "error: datafree_kd.py --method kd" in (tmp_path / "console/kd_seed0.txt").read_text()


def test_a_stopped_queue_stops_its_runs(tmp_path):
    """A replacement of python waits until it is stopped."""
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ntrap "touch {tmp_path}/stopped; exit" TERM\ntouch {tmp_path}/begun\nsleep 60 & wait\n'
    )
    (tmp_path / "python").chmod(0o755)
    variables = {"OUT": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "TEACHER": str(tmp_path / "python")}
    environment = os.environ | {"VENV": "none", "IMAGE": "picture.jpg", "SEEDS": "0"} | variables
    queue = subprocess.Popen(["bash", "scripts/protocol_c.sh", "kd"], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    assert "kd, seed 0" in queue.stdout.readline().decode()
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    queue.terminate()
    assert queue.wait(timeout=30) == 130 and (tmp_path / "stopped").exists()


@pytest.mark.parametrize(
    "name, variable", [("digits", "METHODS"), ("guidance", "RUNS"), ("prior", "RUNS"), ("recipe", "RUNS")]
)
def test_other_comparisons_name_what_they_know(name, variable):
    environment = os.environ | {"VENV": "none", variable: "bogus"}
    done = subprocess.run(["bash", f"scripts/compare_{name}.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: 'bogus' found, names out of ") and not done.stdout
