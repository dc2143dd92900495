"""--scale makes every length of a run shorter or longer by one rule."""

import dataclasses

import pytest

import registry
from datafree_kd import parse
from engine.runtime.errors import UserError


def flags(method, extra=""):
    """{name: value} of the flags of a command, and the number of student steps that they give."""
    groups = parse(["--method", method, *extra.split()])[2]
    schedule = groups[2].schedule()
    return {k: v for group in groups for k, v in dataclasses.asdict(group).items()}, schedule.rounds * schedule.kd_steps


@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_a_scaled_run_has_f_times_the_student_steps(method):
    published, steps = flags(method)
    for scale in (0.04, 0.25, 4):
        found, scaled = flags(method, f"--scale {scale}")
        assert scaled == pytest.approx(scale * steps, rel=0.02)
        assert found["epochs"] == round(published["epochs"] * scale**0.5)
        changed = {name for name in found if found[name] != published[name]}
        kept = {
            "lr",
            "lr_g",
            "batch_size",
            "synthesis_batch_size",
            "T",
            "bn",
            "oh",
            "adv",
            "g_loops",
            "init_g_loops",
            "weight_decay",
        }
        assert not changed & kept and found["scale"] == scale


def test_what_scales_by_the_root_and_what_stays():
    def at(scale, method, *names):
        found = flags(method, f"--scale {scale}")[0]
        return [found[name] for name in names]

    assert at(0.01, "dda", "init_rounds", "init_g_steps", "epochs", "kd_steps", "g_steps", "fit_passes") == [
        40,
        50,
        20,
        200,
        20,
        4,
    ]
    assert at(0.25, "fast", "init_rounds", "epochs", "kd_steps", "g_steps", "reset_l0_round") == [10, 100, 200, 10, 60]
    assert at(0.25, "nayer", "init_rounds", "init_g_loops", "g_steps", "g_loops", "g_life", "epochs") == [
        10,
        10,
        30,
        2,
        10,
        150,
    ]
    assert at(0.25, "dfq", "g_steps", "kd_steps", "ep_steps", "epochs") == [1, 10, 200, 100]
    assert at(0.25, "diffdfkd", "images_per_class", "num_inference_steps", "warmup_epochs") == [2500, 20, 10]
    assert at(4, "adi", "g_steps", "epochs") == [2000, 400]
    assert at(1e-9, "csd", "init_rounds", "g_steps", "epochs", "kd_steps", "ep_steps", "warmup_epochs") == [1, 1, 1, 1, 0, 0]


def test_epochs_of_many_rounds_are_scaled_in_whole_rounds():
    assert flags("dfq", "--scale .05")[0]["ep_steps"] == 90
    found, _ = flags("fast", "--scale .25 --kd_steps 30 --ep_steps 90")
    assert (found["kd_steps"], found["ep_steps"]) == (30, 90)
    found, _ = flags("dafl", "--scale .25 --kd_steps 20")
    assert (found["kd_steps"], found["ep_steps"]) == (20, 200)


def test_a_length_that_is_given_is_taken_as_it_is():
    found, _ = flags("csd", "--scale .01 --epochs 100 --g_steps=200")  # also if it is the published value
    assert (found["epochs"], found["g_steps"], found["kd_steps"], found["init_rounds"]) == (100, 200, 200, 40)


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_a_scale_is_a_positive_number(scale):
    with pytest.raises(UserError, match="--scale .* found, a number .*wanted"):
        parse(["--method", "kd", "--scale", scale])


def test_the_run_records_its_scale_and_what_it_came_to(finished):
    import json

    folder = finished("deepinv", "--scale .25")
    args = json.loads((folder / "args.json").read_text())["args"]
    result = json.loads((folder / "result.json").read_text())
    assert args["scale"] == result["scale"] == 0.25
    assert args["g_steps"] == 2  # given by TINY
    assert "scaled by 0.25 (--scale)" in (folder / "log.txt").read_text()
