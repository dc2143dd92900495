"""--minutes chooses the scale of a run once, from the speed measured on this machine."""

import json
import time
from types import SimpleNamespace

import pytest

from datafree import minutes
from engine.runtime.errors import UserError

TASK = "--dataset digits --teacher resnet8 --student resnet8 --batch_size 8 --gpu -1"
SMALL = "--nz 8 --init_batch_size 6 --synthesis_batch_size 6"


@pytest.fixture
def slow_clock(monkeypatch):
    """A clock of this process's CPU time. Rates are measured as a tenth, so that a run takes a tenth of the given minutes."""
    measured = minutes.seconds_of
    monkeypatch.setattr(minutes, "clock", lambda device: time.process_time())
    monkeypatch.setattr(minutes, "seconds_of", lambda *args: 10 * measured(*args))


def test_the_largest_scale_that_fits():
    assert minutes.fitting_scale(lambda scale: 1000 * scale, 50) == pytest.approx(0.05, rel=0.01)
    assert minutes.fitting_scale(lambda scale: 1000 * scale, 2000) == 1  # never longer than the published run
    with pytest.raises(UserError, match="--minutes 1 found, but the shortest run takes"):
        minutes.fitting_scale(lambda scale: 100 + scale, 60)


def test_the_time_of_the_trial_counts(monkeypatch, tmp_path):
    times = iter([5.0, 25.0])
    monkeypatch.setattr(minutes, "clock", lambda device: next(times))
    step = minutes.UnitCost("step", 1.0, lambda flags, _: 100 * flags["scale"])
    monkeypatch.setattr(minutes, "measure", lambda *_: [step])
    method, run = SimpleNamespace(task=SimpleNamespace(device=None)), SimpleNamespace(minutes=1.0, scale=1.0)

    def at(scale):
        return [SimpleNamespace(), SimpleNamespace(scale=scale), SimpleNamespace(schedule=lambda: None)]

    assert minutes.choose_scale(tmp_path / "run", method, [None, run], [], at) == pytest.approx(0.4, rel=0.01)


@pytest.mark.parametrize(
    "method, extra, counts",
    [
        (
            "csd",
            SMALL,
            [200_000, 20_000, 200_000, 101, 2],
        ),  # steps of both inversions and of the student, tests of both networks
        ("dda", SMALL, [200_000, 2400, 6800, 4800, 96_000, 40_000, 400_000, 201, 2]),  # also variants, filter, prior
        ("diffdfkd", "", [3125 * 20, 240 * 200, 241, 2]),  # 50,000 images in batches of 16
        ("diffdfkd", "--no_test --images_per_class 8", [5 * 20, 240 * 200]),
        ("dfq", "--nz 8", [8000, 80_000, 201, 2]),
    ],
)
def test_what_a_run_has_of_everything(method, extra, counts, teacher_file):
    """Counts of all kinds of work in a run of published length, computed from the flags."""
    from datafree.base import build_method
    from datafree_kd import parse
    from engine.runtime.processes import join_processes
    from registry import DATASETS, MODELS

    line = f"--method {method} {TASK} --teacher_ckpt {teacher_file} {extra}"
    name, method_class, groups = parse(line.split())
    trial = minutes.trial_groups(groups)
    built = build_method(name, method_class, trial, trial[2].schedule(), join_processes(-1), DATASETS, MODELS)
    rates = minutes.measure(built, trial, [stage.name for stage in built.stages()])
    assert [rate.count(minutes.flat(groups), groups[2].schedule()) for rate in rates] == counts
    assert all(rate.seconds > 0 for rate in rates)
    total = minutes.run_seconds(rates, groups)
    assert total == pytest.approx(sum(rate.seconds * count for rate, count in zip(rates, counts)))


@pytest.mark.parametrize(
    "method, extra",
    [
        ("csd", SMALL),
        ("dda", SMALL + " --fit_batch_size 6 --pixel_channels 8 --variants 2 --omega -1"),
        ("diffdfkd", "--num_inference_steps 2 --diffusion_batch_size 4 --lca_every 0"),
        ("dfq", "--nz 8"),
        ("kd", ""),
    ],
)
@pytest.mark.usefixtures("slow_clock")
def test_every_kind_of_method_is_measured_and_runs_for_no_longer(method, extra, command, teacher_file, tmp_path, capsys):
    line = f"--method {method} {TASK} --teacher_ckpt {teacher_file} {extra} --save_dir {tmp_path / 'run'} --minutes .2"
    began = time.process_time()
    command("datafree_kd", line)
    assert time.process_time() - began < 12
    args = json.loads((tmp_path / "run/args.json").read_text())["args"]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert 0 < args["scale"] < 1 and args["minutes"] == 0.2 and result["scale"] == args["scale"]
    assert "--scale, chosen for --minutes 0.2" in (tmp_path / "run/log.txt").read_text()
    assert f"--minutes 0.2: --scale {args['scale']:g}" in capsys.readouterr().out


@pytest.mark.usefixtures("slow_clock")
def test_a_resume_keeps_the_scale(command, teacher_file, tmp_path, monkeypatch):
    line = f"--method noise {TASK} --teacher_ckpt {teacher_file} --save_dir {tmp_path / 'run'} --minutes "
    command("datafree_kd", line + ".2")
    before = (tmp_path / "run/result.json").read_text()
    monkeypatch.setattr(minutes, "measure", lambda *_: pytest.fail("measured again"))
    command("datafree_kd", line + ".2")
    assert (tmp_path / "run/result.json").read_text() == before
    with pytest.raises(UserError, match="was started with --minutes 0.2 and --scale .*, now --minutes 9 is given"):
        command("datafree_kd", line + "9")


def test_a_new_seed_gets_the_scale_of_the_runs_with_other_seeds(command, teacher_file, tmp_path, monkeypatch):
    found = {"args": {"minutes": 1.0, "scale": 0.25}, "command": "", "versions": {}}
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0/args.json").write_text(json.dumps(found))
    monkeypatch.setattr(minutes, "measure", lambda *_: pytest.fail("measured again"))
    scales = []
    monkeypatch.setattr("datafree_kd.run", lambda name, method, groups: scales.append(groups[1].scale) or tmp_path)
    command(
        "datafree_kd", f"--method noise {TASK} --teacher_ckpt {teacher_file} --save_dir {tmp_path} --seeds 2,0 --minutes 1"
    )
    assert scales == [0.25, 0.25]


@pytest.mark.parametrize(
    "args, message",
    [
        ({"foo": 1}, "contains files, but not those of a run"),
        ([], "contains files, but not those of a run"),
        ({"args": 3}, "args.json does not have the expected contents: args is 3, an object wanted"),
        ({"args": {"minutes": 1}}, "args.json does not have the expected contents: scale is missing"),
        ({"args": {"minutes": 1, "scale": "x"}}, "args.scale is 'x', a finite number above 0 wanted"),
    ],
)
def test_a_folder_with_other_args_is_one_line(args, message, command, teacher_file, tmp_path):
    if isinstance(args, dict) and "args" in args:
        args |= {"command": "", "versions": {}}
    (tmp_path / "args.json").write_text(json.dumps(args))
    with pytest.raises(UserError, match=message):
        command("datafree_kd", f"--method noise {TASK} --teacher_ckpt {teacher_file} --save_dir {tmp_path} --minutes 1")


@pytest.mark.parametrize(
    "method, extra, message",
    [
        ("noise", "--minutes 1 --scale .5", "give one of them"),
        ("noise", "--minutes 0", "above 0"),
        ("dda", "--minutes 1 --init_bank nowhere", "no image bank at nowhere .*; give another --init_bank"),
    ],
)
def test_what_minutes_cannot_do(method, extra, message, command, teacher_file, tmp_path):
    with pytest.raises(UserError, match=message):
        command(
            "datafree_kd", f"--method {method} {TASK} --teacher_ckpt {teacher_file} --save_dir {tmp_path / 'run'} {extra}"
        )
    assert not (tmp_path / "run").exists()
