"""What every stage of a run is given, and how the stages are gone through."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.data.bank import ImageBank, Manifest, find_bank
from engine.data.datasets import DatasetInfo
from engine.data.splits import Split
from engine.loops.distill import Schedule
from engine.runtime import sums
from engine.runtime.compilation import Compiler
from engine.runtime.errors import UserError
from engine.runtime.files import delete_files
from engine.runtime.processes import Processes, seed_position
from engine.runtime.run import Run
from engine.runtime.stage_record import StageRecord, read_record

INITIAL = ("synthesize", "generate")  # the stages that fill the initial bank; a method has one of them or none


@dataclass(frozen=True)
class Session:
    """One run of one method, in one of its processes.

    Args:
        path: the run folder.
        run, record: the main process's; None in the others, which read what it has written to the folder.
        info: the dataset.
        manifest: what the banks of this run must be.
        flags: every flag of the command by name.
        published: settings -> the paper's accuracy for such a run, in %, or None.
        test: the test split, where it has been opened and the first stage is the one that wants it.
        teacher_acc1: the teacher's accuracy on the test split in %; None: not measured.
    """

    path: Path
    run: Run | None
    record: StageRecord | None
    info: DatasetInfo
    manifest: Manifest
    schedule: Schedule
    flags: dict[str, Any]
    device: torch.device
    compiler: Compiler
    processes: Processes = Processes()
    published: Callable[[dict[str, Any]], float | None] = lambda settings: None
    test: Split | None = None
    teacher_acc1: float | None = None

    @property
    def seed(self) -> int:
        return self.flags["seed"]

    def new_bank(self, folder: str, external_prior: str) -> ImageBank | None:
        """The bank in a folder of this run, made if there is none; None in the processes that only compute."""
        if not self.processes.main:
            return None
        return ImageBank(self.path / folder, replace(self.manifest, external_prior=external_prior))

    def finished(self, stage: str, flag: str, folder: str) -> "Finished":
        """The bank that a stage left in this run, or in the run or folder that ``--<flag>`` names.

        Raises:
            UserError: the stage is not done, or the bank does not fit this run.
        """
        given = self.flags[flag]
        path = find_bank(Path(given), folder) if given else self.path / folder
        made = read_record(path.parent / "stages.json")
        if given and stage in INITIAL:
            stage = next((name for name in INITIAL if name in made), stage)
        entry = made.get(stage)
        if entry and entry["status"] != "done" or not given and not entry:
            advice = (
                f"run it first with --stages {stage}, or give --{flag}" if not given else "finish it with its own command"
            )
            raise UserError(f"stage {stage} in {path.parent} is {'incomplete' if entry else 'not begun'}; {advice}")
        bank = ImageBank(path, self.manifest, create=False)
        entry = entry or {"seconds": None, "depends_on": {}, "facts": {}}
        wanted, found = noted_files(entry["facts"], f"{folder}/{stage}-*.safetensors"), len(bank.rounds(stage))
        if found < wanted:
            raise UserError(f"{path} has {found} of its {wanted} shards {stage}-*; restore the others, or make it again")
        return Finished(stage, bank, entry["seconds"], entry["depends_on"], entry["facts"])

    def check_shared(self) -> None:
        """In a process that only computes: that it sees the folder in which the main one writes.

        Raises:
            UserError: it does not.
        """
        if not (self.path / "args.json").exists():
            raise UserError(
                f"process {self.processes.rank} does not see {self.path.resolve()}, where the main one writes; give a "
                "--save_dir on a file system that all machines share"
            )


@dataclass(frozen=True)
class Finished:
    """A bank that a stage left: its shards, the seconds it took (None: not known), its flags, and what was noted of it."""

    stage: str
    bank: ImageBank
    seconds: float | None
    depends_on: dict[str, Any]
    facts: dict[str, Any]

    @property
    def columns(self) -> dict[str, Any]:
        """images (N, 3, H, W) uint8, labels (N,), and any further column.

        Raises:
            UserError: there are none.
        """
        stage = next((name for name in (*INITIAL, "augment") if self.bank.rounds(name)), self.stage)
        columns = self.bank.read(stage)
        if not len(columns["labels"]):
            raise UserError(f"the image bank {self.bank.path} is empty; make images with --stages {self.stage}")
        return columns


class Stage:
    """A part of a run that is done once and then skipped.

    Attributes:
        name: in ``stages.json`` and ``--stages``.
        outputs: patterns below the run folder of what it writes, which ``--redo`` deletes.
        checkpoint: that of them, without a pattern, from which the others can be made again once it is done; "": none.
    """

    name: str
    outputs: tuple[str, ...]
    checkpoint: str = ""

    def check(self, session: Session, before: list[str]) -> None:
        """Looks, in the main process and before the run folder is made, for what the stage opens later.

        Args:
            session: without ``run`` and ``record``.
            before: names of the stages that this command runs before this one.
        Raises:
            UserError: something is missing, or does not fit this run.
        """

    def prepare(self, session: Session) -> None:
        """What the main process does before all processes run the stage."""

    def run(self, session: Session) -> None:
        """The stage; the main process marks it as done."""
        raise NotImplementedError


def choose_stages(name: str, known: list[str], flags) -> tuple[list[str], list[str]]:
    """The stages of this run, and those that ``--stages`` selects. A bank given by a flag takes the place of its stage.

    Args:
        name: of the method.
        known: names of the method's stages.
        flags: ``engine.loops.settings.RunFlags``.
    Raises:
        UserError: a flag names a stage that the run does not have.
    """
    for flag, replaced in (("init_bank", ("synthesize", "generate")), ("init_variants", ("augment",))):
        if getattr(flags, flag):
            if not set(replaced) & set(known):
                raise UserError(f"--{flag}: {name} has no stage {' or '.join(replaced)} that it could take the place of")
            known = [stage for stage in known if stage not in replaced]
    if flags.redo and flags.redo not in known:
        raise UserError(f"--redo {flags.redo}: this run has the stages {', '.join(known)}")
    if wrong := [stage for stage in flags.stages or () if stage not in known]:
        raise UserError(f"--stages {','.join(wrong)}: this run has the stages {', '.join(known)}")
    return known, [stage for stage in known if stage in (flags.stages or known)]


def settle(path: Path, record: StageRecord, stages: Iterable[Stage]) -> list[str]:
    """Looks whether the outputs of done stages are there and whole; one that can be finished once more is no longer done.

    Args:
        path: the run folder.
    Returns:
        What is to be said of it, a line a stage.
    Raises:
        UserError: an output is damaged, or is gone and cannot be had but by making the stage again.
    """
    said = []
    for stage in stages:
        if record.status(stage.name) != "done":
            continue
        gone = sums.missing(path, stage.outputs) or fewer(path, stage.outputs, record.record[stage.name]["facts"])
        names = ", ".join(("some of " if "*" in file.name else "") + str(file.relative_to(path)) for file in gone[:3])
        again = {path / name for name in stage.outputs if "*" not in name and name != stage.checkpoint}
        if gone and not (stage.checkpoint and set(gone) <= again and (path / stage.checkpoint).exists()):
            advice = f"restore it from a copy, or make it again with --redo {stage.name}"
            raise UserError(f"stage {stage.name} in {path} is done, but {names} is gone; {advice}")
        for file in sums.present(path, stage.outputs):
            sums.check(file)
        if gone:
            record.reopen(stage.name)
            said.append(f"{stage.name}: {names} is gone; it is made again from {stage.checkpoint}")
    return said


def noted_files(facts: dict[str, Any], pattern: str) -> int:
    """How many files of that pattern a done stage had written; 0 where that is not known."""
    return (facts.get("files") or {}).get(pattern, 0)


def fewer(path: Path, patterns: Iterable[str], facts: dict[str, Any]) -> list[Path]:
    """Outputs of which there are fewer than a done stage had written: what is gone together with its list of digests."""
    return [path / each for each in patterns if len(list(path.glob(each))) < noted_files(facts, each)]


def run_stages(session: Session, stages: tuple[Stage, ...], selected: list[str], redo: str | None) -> None:
    """Runs the selected stages that are not done, as the main process finds."""
    processes = session.processes
    plan = processes.broadcast(_plan(session, stages, selected, redo) if processes.main else None)
    for stage in stages:
        if plan.get(stage.name) == "done" and processes.main:
            session.run.log(f"{stage.name}: done before, skipped ({session.path})")
        if plan.get(stage.name) != "todo":
            continue
        if processes.main:
            stage.prepare(session)
        processes.broadcast()  # what the main process has written is there
        session.check_shared()
        seed_position(session.seed, stage.name)
        stage.run(session)
        if processes.main:
            session.record.update(stage.name, files={each: len(list(session.path.glob(each))) for each in stage.outputs})


def _plan(session: Session, stages: tuple[Stage, ...], selected: list[str], redo: str | None) -> dict[str, str]:
    """{selected stage: "todo" or "done"}, after what is to be made again is deleted."""
    record = session.record
    if redo:
        gone = record.from_on(redo)
        record.check([name for name in record.dependencies if name not in gone])  # before anything is deleted
        delete_files(session.path, [pattern for stage in stages if stage.name in gone for pattern in stage.outputs])
        record.discard(redo)
    record.check(selected)
    for line in settle(session.path, record, [stage for stage in stages if stage.name in selected]):
        session.run.log(line)
    now = torch.get_num_threads()
    for name in selected:
        if record.status(name) == "incomplete" and (begun := record.threads(name)) not in (None, now):
            session.run.log(
                f"{name}: begun with {begun} CPU threads, goes on with {now}: sums are added in another order, so bits may "
                f"differ from an unbroken run's; OMP_NUM_THREADS={begun} repeats them"
            )
    return {name: "done" if record.status(name) == "done" else "todo" for name in selected}
