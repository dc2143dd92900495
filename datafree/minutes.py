"""``--minutes``: chooses the ``--scale`` at which a run takes about the given time.

The times of single steps are measured on this machine in a few seconds, and the time of a run is computed from them.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from datafree.base import Method
from engine.data.image_bank import find_bank, open_bank
from engine.data.splits import load_split
from engine.data.transfer_set import TransferSet
from engine.loops.distill import Distillation, Schedule
from engine.loops.fill import Share
from engine.loops.pace import duration
from engine.loops.preflight import synthesis_steps
from engine.loops.session import INITIAL
from engine.runtime.errors import UserError
from engine.runtime.files import read_json
from engine.runtime.flags import Range
from engine.runtime.processes import seed_position
from engine.runtime.run import clock, require_run_folder
from engine.runtime.schema import require
from engine.runtime.stage_record import show
from models.classifier import eval_mode, weights_fixed

# Largest values of these flags in a trial.
TRIAL = {"g_steps": 2, "init_g_steps": 2, "g_loops": 1, "init_g_loops": 1, "num_inference_steps": 5}
STUDENT_STEPS, TEST_BATCH, VARIED, PATIENCE = 5, 500, 16, 10.0


@dataclasses.dataclass(frozen=True)
class UnitCost:
    """Cost of one unit of work, for example a student step, and the number of such units in a run.

    Args:
        what: name of the unit, in words.
        seconds: seconds that one unit takes.
        count: function from the flags of a run and its schedule to the number of units.
    """

    what: str
    seconds: float
    count: Callable[[dict[str, Any], Schedule], float]


def run_seconds(costs: list[UnitCost], groups: list) -> float:
    """Seconds that a run takes with the flags ``groups``."""
    flags, schedule = flat(groups), groups[2].schedule()
    return sum(cost.seconds * cost.count(flags, schedule) for cost in costs)


def flat(groups: list) -> dict[str, Any]:
    """All flags of all groups as one dictionary {name: value}."""
    return {name: value for group in groups for name, value in vars(group).items()}


def choose_scale(folder: Path, method: Method, groups: list, stages: list[str], at: Callable[[float], list]) -> float:
    """Returns the scale that an existing run was begun with, or else a scale chosen by a trial. The trial's time counts too.

    Args:
        folder: run folder, which may not exist yet.
        method, groups, stages: see ``measure``.
        at: function from a scale to the flags of the run at that scale.
    Raises:
        UserError: ``--scale`` is given too, the existing run was begun with another ``--minutes``, or the folder is no run
            folder.
    """
    minutes, scale = groups[1].minutes, groups[1].scale
    if scale != 1:
        raise UserError(
            f"--scale {scale:g} and --minutes {minutes:g} found; give one of them, because --minutes chooses --scale"
        )
    require_run_folder(folder)
    file = folder / "args.json"
    if file.exists():
        found = read_json(file)
        require(found, {"args": {"minutes?": float, "scale?": (float, Range(above=0))}}, str(file))
        begun = found["args"]
        if begun.get("minutes") != minutes:
            raise UserError(
                f"the run in {folder} was started with --minutes {show(begun.get('minutes'))} and --scale "
                f"{begun.get('scale', 1):g}, now --minutes {minutes:g} is given; give the former flags, or another "
                "--save_dir"
            )
        require(begun, {"scale": float}, str(file))
        return begun["scale"]
    began = clock(method.task.device)
    costs = measure(method, groups, stages)
    spent = clock(method.task.device) - began

    def seconds(scale: float) -> float:
        return spent + run_seconds(costs, at(scale))

    chosen = fitting_scale(seconds, 60 * minutes)
    told = ", ".join(f"{cost.what} {1000 * cost.seconds:.3g} ms" for cost in costs)
    print(
        f"--minutes {minutes:g}: --scale {chosen:g} is used, from measured times ({told}); the published lengths would take "
        f"about {duration(seconds(1.0))}"
    )
    return chosen


def trial_groups(groups: list) -> list:
    """The flags of a trial: those of the run, with only a few steps per round."""
    *common, config = groups
    short = {name: min(most, getattr(config, name)) for name, most in TRIAL.items() if getattr(config, name, None)}
    if hasattr(config, "strength"):  # --strength takes a share of the steps, and of a few steps none might be left
        short.pop("num_inference_steps", None)
    if getattr(config, "export_png", None):
        short["export_png"] = None
    return [*common, dataclasses.replace(config, **short)]


def measure(method: Method, groups: list, stages: list[str]) -> list[UnitCost]:
    """Runs one round of every kind twice and measures the time of the second one.

    Args:
        method: method that was built with ``groups``.
        groups: flags of the trial, see ``trial_groups``.
        stages: names of the stages that the run will execute.
    """
    flags, device, costs = flat(groups), method.task.device, []
    seed_position(flags["seed"], "minutes")
    for stage in method.stages():
        if stage.name not in stages:
            continue
        if stage.name in INITIAL:
            costs.append(initial_rate(stage, flags, method.task.info, device))
        elif stage.name == "augment":
            costs += variant_rates(stage, flags, method.task.info, device)
        else:
            costs += distillation_rates(method, groups)
    if not flags["no_test"]:
        tests = 1 + ("distill" in stages)  # before the first stage and, for the confusion matrix, at the end
        costs.append(UnitCost("test of the teacher", _seconds_of_a_test(method, method.teacher), lambda *_: tests))
    return costs


def initial_rate(stage, flags: dict[str, Any], info, device: torch.device) -> UnitCost:
    """Rate of an inversion or denoising step in a stage that fills the initial bank (``engine.loops.stages.FillBank``).

    Training between rounds, such as that of an adversarial student, is not counted.
    """
    maker = stage.maker(SimpleNamespace(seed=flags["seed"]))  # a maker needs only the seed of a session

    def first_batch() -> None:
        maker.make(0, Share(0, sys.maxsize), lambda count: None)

    def count(flags: dict[str, Any], schedule: Schedule) -> int:
        return synthesis_steps(flags, schedule, info, stage.name)

    generates = stage.name == "generate"
    steps = flags["num_inference_steps"] if generates else count({**flags, "init_rounds": 1}, None)
    what = "denoising step of a batch" if generates else "inversion step of the initial bank"
    return UnitCost(what, seconds_of(first_batch, device) / steps, count)


def variant_rates(stage, flags: dict[str, Any], info, device: torch.device) -> list[UnitCost]:
    """Rates of one variant, of one image in the filter, of one teacher's prediction for a variant, and of one training image of
    a prior that is trained on the bank.

    Args:
        stage: the ``engine.loops.stages.Augment`` of the run.
        flags: flags of the trial.
        info: dataset.
        device: device of the networks.
    """
    augmenter, embed = stage.augmenter(), stage.filter.build()
    varied = min(VARIED, stage.batch_size)
    labels = torch.arange(4 * varied) % info.num_classes
    images = torch.randint(256, (len(labels), 3, info.image_size, info.image_size), dtype=torch.uint8)
    some, theirs = images[:varied].to(device) / 255, labels[:varied].to(device)
    given = len(bank_labels(Path(flags["init_bank"]))) if flags["init_bank"] else None

    def sources(flags: dict[str, Any]) -> int:
        return flags["init_rounds"] * flags["init_batch_size"] if given is None else given

    def embedded(flags: dict[str, Any]) -> int:  # all images, and some of the sources again to find omega
        return (1 + stage.variants) * sources(flags) + min(sources(flags), 2000)

    variant = seconds_of(lambda: augmenter.augment(some, theirs, list(range(varied))), device) / varied
    filtered = seconds_of(lambda: embed(some), device) / varied
    predicted = seconds_of(lambda: stage.filter.metrics.labels(images), device) / len(images)
    costs = [
        UnitCost("variant", variant, lambda flags, _: stage.variants * sources(flags)),
        UnitCost("image in the filter", filtered, lambda flags, _: embedded(flags)),
        UnitCost("teacher's prediction", predicted, lambda flags, _: 2 * stage.variants * sources(flags)),
    ]
    if augmenter.fit_rounds:
        fitted = seconds_of(lambda: augmenter.fit(images, labels), device) / len(images)
        costs.append(
            UnitCost("image in the prior's training", fitted, lambda flags, _: flags["fit_passes"] * sources(flags))
        )
    return costs


def bank_labels(path: Path) -> torch.Tensor:
    """Labels (N,) of a finished image bank.

    Raises:
        UserError: the bank is missing or damaged.
    """
    folder = find_bank(path)
    if not (folder / "manifest.json").exists():
        raise UserError(f"no image bank at {folder} (it has no manifest.json); give another --init_bank")
    return open_bank(folder).read_all()["labels"]


def distillation_rates(method: Method, groups: list) -> list[UnitCost]:
    """Rates of a student step, of a synthesis step of stage distill, and of one measurement of accuracy."""
    flags, device, info, student = flat(groups), method.task.device, method.task.info, method.student
    schedule = dataclasses.replace(groups[2].schedule(), epochs=1, ep_steps=STUDENT_STEPS, kd_steps=STUDENT_STEPS)
    costs, synthesizer = [], method.synthesizer()

    def synthesis(flags: dict[str, Any], schedule: Schedule) -> int:
        return synthesis_steps(flags, schedule, info, "distill")

    if method.streams or method.images_per_round:
        with weights_fixed(student):
            seconds = seconds_of(lambda: synthesizer.synthesize(student), device)
        costs.append(UnitCost("synthesis step", seconds / max(1, synthesis(flags, schedule)), synthesis))
    distillation = Distillation(
        method.distillation_teacher(),
        student,
        method.objective().to(device),
        synthesizer,
        schedule,
        method.task.precision.fresh(),
    )
    if method.streams:
        batches = synthesizer.batches(schedule.batch_size, seed=flags["seed"])
    else:
        transfer = TransferSet(schedule.batch_size, info.image_size, device)
        size = schedule.batch_size, 3, info.image_size, info.image_size
        transfer.add(torch.randint(256, size, dtype=torch.uint8), torch.arange(schedule.batch_size) % info.num_classes)
        batches = transfer.batches(schedule.batch_size, method.student_view, seed=flags["seed"])
    bar = SimpleNamespace(update=lambda: None)
    per_step = seconds_of(lambda: distillation.student_steps(batches, 0, bar), device) / STUDENT_STEPS
    costs.append(UnitCost("student step", per_step, lambda _, schedule: schedule.rounds * schedule.kd_steps))
    if not flags["no_test"]:  # after each epoch and, for the confusion matrix, at the end
        costs.append(UnitCost("test", _seconds_of_a_test(method, student), lambda _, schedule: schedule.epochs + 1))
    return costs


@torch.no_grad()
def _seconds_of_a_test(method: Method, network: torch.nn.Module) -> float:
    test = load_split(method.task.info, "test", method.task.device)
    images, _ = next(iter(test.batches(TEST_BATCH)))
    with eval_mode(network):
        return seconds_of(lambda: network(images), method.task.device) * len(test) / len(images)


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the second call of a function; of the first call if it took longer than ``PATIENCE`` seconds."""
    for _ in range(2):
        began = clock(device)
        function()
        if (seconds := clock(device) - began) > PATIENCE:
            break
    return seconds


def fitting_scale(seconds: Callable[[float], float], wanted: float) -> float:
    """Largest scale up to 1, rounded to three digits, at which a run takes at most ``wanted`` seconds; by bisection.

    Args:
        seconds: increasing function from a scale to the seconds of a run.
        wanted: seconds that the run may take.
    Raises:
        UserError: even the shortest run takes longer.
    """
    if seconds(1.0) <= wanted:
        return 1.0
    low, high = math.log(1e-8), 0.0
    if (least := seconds(math.exp(low))) > wanted:
        raise UserError(
            f"--minutes {wanted / 60:g} found, but the shortest run takes about {least / 60:.2g} minutes here; give a larger "
            "--minutes"
        )
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(math.exp(middle)) <= wanted else (low, middle)
    return float(f"{math.exp(low):.3g}")
