"""What is looked at before the first stage of a run, so that nothing is found out after hours of it.

``check`` comes before the run folder is made, so that a run that it refuses leaves none. ``tell`` comes after, and writes
the teacher's accuracy and how it normalizes. Both are the main process's, and where all is done before there is nothing to
look at. No random number drawn here reaches a stage: each begins at a position of its own.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from engine.data.datasets import DatasetInfo
from engine.data.splits import allow_train_split, data_identity, load_split
from engine.loops.distill import Schedule
from engine.loops.evaluate import evaluate
from engine.loops.session import Session, Stage, settle
from engine.runtime.errors import UserError
from engine.runtime.run import require_run_folder
from engine.runtime.stage_record import StageRecord

MANY_STEPS = 20_000  # of the student or of synthesis: hours to days on a CPU


def data_identities(info: DatasetInfo, stages: Iterable[str], test: bool, train: bool) -> dict[str, str]:
    """On which data each stage's result depends, in words: stage distill on those of the splits that it opens.

    Args:
        test, train: whether it opens them.
    Raises:
        UserError: one of them is missing or damaged.
    """
    real = ("train",) * train + ("test",) * test
    with _advice_to_do_without(train), allow_train_split(train):
        return {stage: data_identity(info, *(real if stage == "distill" else ())) for stage in stages}


def check(
    session: Session, method, stages: Iterable[Stage], dependencies: dict[str, dict[str, Any]], selected: list[str]
) -> tuple[Session, list[str]]:
    """Opens, cheaply, what the stages that are still to do will want.

    Args:
        session: without ``run`` and ``record``.
        method: ``datafree.base.Method``.
        stages: of the run, in order.
        dependencies: of ``StageRecord``.
        selected: names of the stages that this command is to run.
    Returns:
        The session, with the test split where there is something to do, and the names of the stages that are to be done.
    Raises:
        UserError: something is missing or does not fit; the run folder is as it was.
    """
    require_run_folder(session.path)
    record = StageRecord(session.path / "stages.json", dependencies)
    if session.flags["redo"]:
        record.forget(session.flags["redo"])
    record.check(selected)
    settle(session.path, record, [stage for stage in stages if stage.name in selected])
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


def tell(session: Session, teacher, todo: list[str]) -> Session:
    """Logs what is to be known before the first stage.

    Args:
        teacher: ``models.classifier.Classifier``.
        todo: names of the stages that are to be done, some.
    Returns:
        The session with the teacher's accuracy, and without the test split if other stages want the memory first.
    """
    log, test = session.run.log, session.test
    line = f"teacher {teacher.name} normalizes with {teacher.normalization}"
    if test is None:
        log(f"{line}; its accuracy is not known (--no_test)")
    else:
        acc1 = evaluate(teacher, test)["acc1"]
        log(f"{line}: {acc1:.2f} % on the {len(test)} test images of {session.info.name}")
        if acc1 < suspicious(session.info.num_classes):
            log(
                f"warning: chance is {100 / session.info.num_classes:.2f} %; likely causes are a checkpoint of other data, "
                "another normalization in its training (--teacher_mean, --teacher_std), or another order of the classes"
            )
        session = replace(session, teacher_acc1=acc1, test=test if todo[0] == "distill" else None)
    if session.flags["scale"] != 1:
        chosen = f", chosen for --minutes {session.flags['minutes']:g}" if session.flags["minutes"] else ""
        log(
            f"published lengths are scaled by {session.flags['scale']:g} (--scale{chosen}): "
            f"{session.schedule.rounds * session.schedule.kd_steps} student steps in {session.schedule.epochs} epochs"
        )
    if (warmup := session.flags["warmup_epochs"]) > (epochs := session.schedule.epochs) and "distill" in todo:
        log(f"warning: --warmup_epochs {warmup} are more than --epochs {epochs}: the learning rate never gets to --lr")
    if session.device.type == "cpu" and (text := long_for_a_cpu(session.flags, session.schedule, session.info, todo)):
        log(text)
    return session


def suspicious(num_classes: int) -> float:
    """The accuracy in % below which a teacher is hardly one: twice chance, of two classes halfway from chance to 100 %."""
    return 100 * min(2 / num_classes, (1 + 1 / num_classes) / 2)


def long_for_a_cpu(flags: dict[str, Any], schedule: Schedule, info: DatasetInfo, todo: list[str]) -> str:
    """A line that says how many steps there are and what makes them fewer; "" where there are not many, or --minutes chose."""
    student = schedule.rounds * schedule.kd_steps if "distill" in todo else 0
    synthesis = sum(synthesis_steps(flags, schedule, info, stage) for stage in todo)
    if flags["minutes"] or max(student, synthesis) <= MANY_STEPS:
        return ""
    return (
        f"no GPU: {student} student steps and {synthesis} of synthesis take hours to days on a CPU; --minutes N shortens the run "
        f"to about N minutes, --scale F (now {flags['scale']:g}) all its lengths by one rule"
    )


def synthesis_steps(flags: dict[str, Any], schedule: Schedule, info: DatasetInfo, stage: str) -> int:
    """Steps of inversion or denoising that the flags of a run ask for in a stage; 0 where they do not tell."""
    g_steps = flags.get("g_steps", 0)
    if stage == "synthesize":
        return flags["init_rounds"] * flags.get("init_g_loops", 1) * flags.get("init_g_steps", g_steps)
    if stage == "generate":
        batches = -(-flags["images_per_class"] * info.num_classes // flags["diffusion_batch_size"])
        return batches * flags["num_inference_steps"]
    return schedule.rounds * flags.get("g_loops", 1) * g_steps if stage == "distill" else 0


@contextmanager
def _advice_to_do_without(needed: bool) -> Iterator[None]:
    """Adds to an error about the test split that a run can do without, unless it needs real images anyway."""
    try:
        yield
    except UserError as error:
        raise error if needed else UserError(f"{error}; or give --no_test, which needs no real image") from None
