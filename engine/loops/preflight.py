"""Checks before the first stage of a run, so that mistakes are found at once and not after hours.

``check`` runs before the run folder is created. A run that it refuses leaves no folder. ``log_start`` runs afterwards and logs
the teacher's normalization and accuracy. Both run in the main process only. Random numbers drawn here do not affect the
stages, because each stage seeds its own random stream.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.data.datasets import DatasetInfo
from engine.data.image_bank import bank_digest, find_bank
from engine.data.splits import allow_train_split, data_identity, load_split
from engine.loops.distill import Schedule
from engine.loops.measures import evaluate
from engine.loops.session import Session, Stage, check_outputs
from engine.runtime.errors import UserError
from engine.runtime.run import require_run_folder
from engine.runtime.stage_record import StageRecord

MANY_STEPS = 20_000  # student steps or synthesis steps that take hours to days on a CPU


def data_identities(info: DatasetInfo, stages: Iterable[str], test: bool, train: bool) -> dict[str, str]:
    """Returns {stage: description of the data that its result depends on}.

    Only stage distill can depend on the real images of a split.

    Args:
        test, train: whether stage distill opens the test or training split.
    Raises:
        UserError: a split to be opened is missing or damaged.
    """
    real = ("train",) * train + ("test",) * test
    with _advice_to_do_without(train), allow_train_split(train):
        return {stage: data_identity(info, *(real if stage == "distill" else ())) for stage in stages}


def input_digests(method, flags: dict[str, Any], dependencies: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Returns {stage: {flag: digest of the files that the flag names}}.

    Files that cannot be read are left out. The stage that needs them reports the error.

    Args:
        method: ``datafree.base.Method``.
        flags: all flags of the command by name.
        dependencies: as for ``StageRecord``.
    """
    folders = {"init_bank": "bank", "init_variants": "variants"}
    found = {name: bank_digest(find_bank(Path(flags[name]), folder)) for name, folder in folders.items() if flags[name]}
    with suppress(UserError):
        found |= method.input_digests()
    return {
        stage: {name: digest for name, digest in found.items() if digest and name in needed}
        for stage, needed in dependencies.items()
    }


def check(
    session: Session,
    method,
    stages: Iterable[Stage],
    dependencies: dict[str, dict[str, Any]],
    inputs: dict[str, dict[str, str]],
    selected: list[str],
) -> tuple[Session, list[str]]:
    """Checks that the stages still to be run have the files that they need. Cheap: reads no more than necessary.

    Args:
        session: session without ``run`` and ``record``.
        method: ``datafree.base.Method``.
        stages: all stages of the run, in order.
        dependencies, inputs: as for ``StageRecord``.
        selected: names of the stages that this command runs.
    Returns:
        The session and the names of the selected stages that are not done. The session has the test split unless no stage is
        to be run or ``--no_test`` is given.
    Raises:
        UserError: something is missing or does not fit; the run folder is unchanged.
    """
    require_run_folder(session.path)
    record = StageRecord(session.path / "stages.json", dependencies, inputs)
    redone = record.from_on(session.flags["redo"]) if session.flags["redo"] else []
    if redone:
        record.forget(redone[0])
    record.check(selected)
    check_outputs(session.path, record, [stage for stage in stages if stage.name in selected and stage.name not in redone])
    todo = [name for name in selected if record.status(name) != "done"]
    new = [name for name in todo if record.status(name) == "new"]
    method.check_inputs(new)
    for stage in stages:
        if stage.name in new:
            stage.check(session, todo[: todo.index(stage.name)])
    if not todo or session.flags["no_test"]:
        return session, todo
    with _advice_to_do_without(method.reads_train_split):
        return replace(session, test=load_split(session.info, "test", session.device)), todo


def log_start(session: Session, teacher, todo: list[str]) -> Session:
    """Logs the teacher's normalization and accuracy, scaled lengths and warnings, before the first stage.

    Args:
        teacher: ``models.classifier.Classifier``.
        todo: names of the stages to be run, at least one.
    Returns:
        The session with the teacher's accuracy. The test split is dropped, to free memory, unless stage distill is the first
        to run.
    """
    log, test = session.run.log, session.test
    line = f"teacher {teacher.name} normalizes with {teacher.normalization}"
    if test is None:
        log(f"{line}; its accuracy is not known (--no_test)")
    else:
        acc1 = evaluate(teacher, test)["acc1"]
        log(f"{line}: {acc1:.2f} % on the {len(test)} test images of {session.info.name}, {session.info.image_size} px")
        if acc1 < suspicious(session.info.num_classes):
            log(
                f"warning: the teacher's accuracy is low (chance is {100 / session.info.num_classes:.2f} %); likely causes "
                "are a checkpoint for other data, another normalization in training (--teacher_mean, --teacher_std), or "
                "another order of the classes"
            )
        session = replace(session, teacher_acc1=acc1, test=test if todo[0] == "distill" else None)
    if session.flags["scale"] != 1:
        chosen = f", chosen for --minutes {session.flags['minutes']:g}" if session.flags["minutes"] else ""
        log(
            f"published lengths are scaled by {session.flags['scale']:g} (--scale{chosen}): "
            f"{session.schedule.rounds * session.schedule.kd_steps} student steps in {session.schedule.epochs} epochs"
        )
    if (warmup := session.flags["warmup_epochs"]) > (epochs := session.schedule.epochs) and "distill" in todo:
        log(f"warning: --warmup_epochs {warmup} is greater than --epochs {epochs}: the learning rate never reaches --lr")
    wanted, steps = session.schedule.ep_steps, session.schedule.rounds_per_epoch * session.schedule.kd_steps
    if wanted != steps and "distill" in todo:
        log(
            f"--ep_steps {wanted} is no multiple of --kd_steps {session.schedule.kd_steps}: an epoch has {steps} student steps"
        )
    if session.device.type == "cpu" and (text := long_for_a_cpu(session.flags, session.schedule, session.info, todo)):
        log(text)
    return session


def suspicious(num_classes: int) -> float:
    """Returns the accuracy in % below which a teacher is suspicious: twice chance; for two classes, 75 %."""
    return 100 * min(2 / num_classes, (1 + 1 / num_classes) / 2)


def long_for_a_cpu(flags: dict[str, Any], schedule: Schedule, info: DatasetInfo, todo: list[str]) -> str:
    """Returns a log line with the number of steps and the flags that reduce it; "" for a short run or with ``--minutes``."""
    student = schedule.rounds * schedule.kd_steps if "distill" in todo else 0
    synthesis = sum(synthesis_steps(flags, schedule, info, stage) for stage in todo)
    if flags["minutes"] or max(student, synthesis) <= MANY_STEPS:
        return ""
    return (
        f"no GPU: {student} student steps and {synthesis} synthesis steps take hours to days on a CPU; --minutes N shortens "
        f"the run to about N minutes, --scale F makes it about F times as long as published (now {flags['scale']:g})"
    )


def synthesis_steps(flags: dict[str, Any], schedule: Schedule, info: DatasetInfo, stage: str) -> int:
    """Returns the number of inversion or denoising steps of a stage; 0 if the flags do not determine it."""
    g_steps = flags.get("g_steps", 0)
    if stage == "synthesize":
        return flags["init_rounds"] * flags.get("init_g_loops", 1) * flags.get("init_g_steps", g_steps)
    if stage == "generate":
        batches = -(-flags["images_per_class"] * info.num_classes // flags["diffusion_batch_size"])
        return batches * flags["num_inference_steps"]
    return schedule.rounds * flags.get("g_loops", 1) * g_steps if stage == "distill" else 0


@contextmanager
def _advice_to_do_without(needed: bool) -> Iterator[None]:
    """Adds advice to use ``--no_test`` to an error about real data, unless the method ``needed`` real images anyway."""
    try:
        yield
    except UserError as error:
        raise error if needed else UserError(f"{error}; or give --no_test, which needs no real image") from None
