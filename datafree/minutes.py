"""``--minutes``: the scale at which a run takes about so long, from rates measured on this machine in a few seconds."""

import dataclasses
import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from datafree.base import Method
from engine.data.splits import load_split
from engine.data.transfer_set import TransferSet
from engine.loops.distill import Distillation, Schedule
from engine.loops.pace import duration
from engine.loops.preflight import synthesis_steps
from engine.runtime.errors import UserError
from engine.runtime.files import read_json
from engine.runtime.processes import seed_position
from engine.runtime.stage_record import show
from models.classifier import eval_mode, weights_fixed

MEASURED = ("synthesize", "distill")  # stages
TRIAL = {"g_steps": 5, "init_g_steps": 5, "g_loops": 1, "init_g_loops": 1}  # of a round, at most
STUDENT_STEPS, TEST_BATCH = 5, 500


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds a student step, a step of synthesis by stage, and a measurement of accuracy after an epoch."""

    student: float
    synthesis: dict[str, float]
    epoch: float

    def seconds(self, flags: dict[str, Any], schedule: Schedule, info) -> float:
        """Of a whole run with these flags."""
        made = sum(rate * synthesis_steps(flags, schedule, info, stage) for stage, rate in self.synthesis.items())
        passes = schedule.epochs + 3  # the teacher's before the first round, and both networks' at the end
        return made + schedule.rounds * schedule.kd_steps * self.student + passes * self.epoch


def choose_scale(folder: Path, method: Method, groups: list, stages: list[str], at: Callable[[float], list]) -> float:
    """The scale that a run folder was begun with, else one by the rates of a trial.

    Args:
        folder: of the run, which may not exist yet.
        method, groups, stages: as of ``measure``.
        at: scale -> the flags of the run.
    Raises:
        UserError: ``--scale`` is given too, or the run was begun otherwise.
    """
    minutes, scale = groups[1].minutes, groups[1].scale
    if scale != 1:
        raise UserError(f"--scale {scale:g} and --minutes {minutes:g} found; give one of them, --minutes chooses --scale")
    begun = read_json(folder / "args.json")["args"] if (folder / "args.json").exists() else None
    if begun:
        if begun.get("minutes") != minutes:
            raise UserError(
                f"the run in {folder} was begun with --minutes {show(begun.get('minutes'))} and --scale "
                f"{begun.get('scale', 1):g}, now --minutes {minutes:g} is asked for; give what it was begun with, or another "
                "--save_dir"
            )
        return begun["scale"]
    rates = measure(method, groups, stages)

    def seconds(scale: float) -> float:
        groups = at(scale)
        flags = {name: value for group in groups for name, value in vars(group).items()}
        return rates.seconds(flags, groups[2].schedule(), method.task.info)

    chosen = fitting_scale(seconds, 60 * minutes)
    parts = {"student step": rates.student} | {
        f"synthesis step of stage {stage}": rate for stage, rate in rates.synthesis.items()
    }
    told = ", ".join(f"{1000 * rate:.0f} ms a {what}" for what, rate in parts.items())
    print(
        f"--minutes {minutes:g}: --scale {chosen:g}, by {told}; the published lengths would take about {duration(seconds(1.0))}"
    )
    return chosen


def trial_groups(groups: list) -> list:
    """The flags of a run with rounds of a few steps."""
    *common, config = groups
    short = {name: min(most, getattr(config, name)) for name, most in TRIAL.items() if getattr(config, name, None)}
    return [*common, dataclasses.replace(config, **short)]


def measure(method: Method, groups: list, stages: list[str]) -> Rates:
    """A round of every kind twice, the second by the clock.

    Args:
        method: built with ``trial_groups``, which ``groups`` are.
        stages: of the run.
    Raises:
        UserError: it has a stage whose length is not known here.
    """
    if unknown := [stage for stage in stages if stage not in MEASURED]:
        raise UserError(
            f"--minutes measures the stages {' and '.join(MEASURED)}, and this run has {unknown[0]}; give --scale instead"
        )
    task_flags, run_flags, distill_flags, _ = groups
    flags = {name: value for group in groups for name, value in vars(group).items()}
    device, info, student = method.task.device, method.task.info, method.student
    schedule = dataclasses.replace(distill_flags.schedule(), epochs=1, ep_steps=STUDENT_STEPS, kd_steps=STUDENT_STEPS)
    one_round = {**flags, "init_rounds": 1}
    seed_position(run_flags.seed, "minutes")
    synthesis = {}
    if "synthesize" in stages:
        first = method.initial_synthesizer()
        with weights_fixed(student):
            synthesis["synthesize"] = seconds_of(lambda: first.synthesize(student), device)
        synthesis["synthesize"] /= synthesis_steps(one_round, schedule, info, "synthesize")
    synthesizer = method.synthesizer()
    if method.streams or method.images_per_round:
        with weights_fixed(student):
            synthesis["distill"] = seconds_of(lambda: synthesizer.synthesize(student), device)
        synthesis["distill"] /= max(1, synthesis_steps(one_round, schedule, info, "distill"))
    distillation = Distillation(
        method.answering_teacher(),
        student,
        method.objective().to(device),
        synthesizer,
        schedule,
        method.task.precision.fresh(),
    )
    if method.streams:
        batches = synthesizer.batches(schedule.batch_size, seed=run_flags.seed)
    else:
        transfer = TransferSet(schedule.batch_size, info.image_size, device)
        size = schedule.batch_size, 3, info.image_size, info.image_size
        transfer.add(torch.randint(256, size, dtype=torch.uint8), torch.arange(schedule.batch_size) % info.num_classes)
        batches = transfer.batches(schedule.batch_size, method.student_view, seed=run_flags.seed)
    steps = _Counter()
    per_round = seconds_of(lambda: distillation.student_steps(batches, 0, steps), device)
    return Rates(per_round / STUDENT_STEPS, synthesis, 0.0 if task_flags.no_test else _seconds_of_a_test(method))


class _Counter:
    """Takes the place of a progress bar."""

    def update(self) -> None:
        """Nothing."""


@torch.no_grad()
def _seconds_of_a_test(method: Method) -> float:
    test = load_split(method.task.info, "test", method.task.device)

    def some() -> None:
        for images, _ in islice(test.batches(TEST_BATCH), 2):
            method.student(images)

    with eval_mode(method.student):
        return seconds_of(some, method.task.device) * max(1, len(test) / (2 * TEST_BATCH))


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a second call."""
    function()
    began = _now(device)
    function()
    return _now(device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def fitting_scale(seconds: Callable[[float], float], wanted: float) -> float:
    """The largest scale up to 1, of three digits, at which a run takes up to ``wanted`` seconds; by bisection.

    Args:
        seconds: scale -> seconds, growing.
    Raises:
        UserError: the shortest run of all takes longer.
    """
    if seconds(1.0) <= wanted:
        return 1.0
    low, high = math.log(1e-8), 0.0
    if (least := seconds(math.exp(low))) > wanted:
        raise UserError(
            f"--minutes {wanted / 60:g} is less than the shortest run takes here, about {duration(least)}; give more"
        )
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(math.exp(middle)) <= wanted else (low, middle)
    return float(f"{math.exp(low):.3g}")
