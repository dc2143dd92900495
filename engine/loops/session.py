"""The session of a run, which every stage receives, and the loop that runs the stages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.data.datasets import DatasetInfo
from engine.data.image_bank import ImageBank, Manifest, find_bank
from engine.data.splits import Split
from engine.loops.distill import Schedule
from engine.runtime import checksums
from engine.runtime.compilation import Compiler
from engine.runtime.errors import UserError
from engine.runtime.files import delete_files, outputs
from engine.runtime.processes import Processes, seed_position
from engine.runtime.run import Run
from engine.runtime.stage_record import StageRecord, read_record

INITIAL = ("synthesize", "generate")  # stages that fill the initial bank; a method has at most one of them


@dataclass(frozen=True)
class Session:
    """One run of one method, as seen by one of its processes.

    Args:
        path: run folder.
        run, record: run folder writer and stage record of the main process; None in the other processes, which only read the
            folder.
        info: description of the dataset.
        manifest: manifest that the banks of this run must match.
        schedule: lengths and learning rate of stage distill.
        flags: all flags of the command by name.
        published: function settings -> accuracy in % that the paper reports for such a run, or None.
        test: test split; None if it is not open.
        teacher_acc1: accuracy of the teacher on the test split in %; None: not measured.
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
        """Returns the bank in a folder of this run, created if missing; None in all processes but the main one.

        Args:
            folder: name of the bank's folder in the run folder.
            external_prior: name of the pretrained model besides the teacher that makes its images, or "none".
        """
        if not self.processes.main:
            return None
        return ImageBank(self.path / folder, replace(self.manifest, external_prior=external_prior))

    def has_own_images(self) -> bool:
        """Whether the run folder has an initial bank of its own, which stays there in a run with ``--init_bank``."""
        return any(outputs(self.path, f"bank/{stage}-*.safetensors") for stage in INITIAL)

    def finished(self, stage: str) -> "Finished":
        """Returns the finished bank of a stage: of this run, or the one given by ``--init_bank`` or ``--init_variants``.

        Args:
            stage: name of the stage that fills the bank.
        Raises:
            UserError: the stage is not done, or the bank does not fit this run.
        """
        flag, folder = ("init_variants", "variants") if stage == "augment" else ("init_bank", "bank")
        given = self.flags[flag]
        path = find_bank(Path(given), folder) if given else self.path / folder
        made = read_record(path.parent / "stages.json")
        if given and stage in INITIAL:
            stage = next((name for name in INITIAL if name in made), stage)
        entry = made.get(stage)
        if entry and entry["status"] != "done" or not given and not entry:
            advice = (
                f"run it first with --stages {stage}, or give --{flag}"
                if not given
                else "finish it with the command that started it"
            )
            raise UserError(f"stage {stage} in {path.parent} is {'incomplete' if entry else 'not started'}; {advice}")
        bank = ImageBank(path, self.manifest, create=False)
        entry = entry or {"seconds": None, "depends_on": {}, "facts": {}}
        wanted, found = noted_files(entry["facts"], f"{folder}/{stage}-*.safetensors"), len(bank.rounds(stage))
        if found < wanted:
            raise UserError(
                f"{path} has {found} of its {wanted} shards {stage}-*; restore the others from a copy, or make the bank "
                "again"
            )
        return Finished(stage, bank, entry["seconds"], entry["depends_on"], entry["facts"])

    def check_shared(self) -> None:
        """Checks that this process sees the run folder of the main process.

        Raises:
            UserError: the folder is not visible, because the file system is not shared.
        """
        if not (self.path / "args.json").exists():
            raise UserError(
                f"process {self.processes.rank} does not see {self.path.resolve()}, where the main process writes; give a "
                "--save_dir on a file system that all machines share"
            )


@dataclass(frozen=True)
class Finished:
    """The bank of a finished stage.

    Args:
        stage: name of the stage.
        bank: the bank with its shards.
        seconds: duration of the stage; None: unknown.
        depends_on: flags and inputs that the images depend on.
        facts: further entries of the stage in ``stages.json``, for example the teacher's accuracy on the images.
    """

    stage: str
    bank: ImageBank
    seconds: float | None
    depends_on: dict[str, Any]
    facts: dict[str, Any]

    @property
    def columns(self) -> dict[str, Any]:
        """All images (N, 3, H, W) uint8, labels (N,) and any further columns of the bank.

        Raises:
            UserError: the bank has no initial images.
        """
        stage = next((name for name in (*INITIAL, "augment") if self.bank.rounds(name)), self.stage)
        columns = self.bank.read(stage)
        if not len(columns["labels"]):
            raise UserError(
                f"{self.bank.path} has no images of stage {self.stage}; make them with --stages {self.stage}, or give "
                "another --init_bank"
            )
        return columns


class Stage:
    """Base class of the stages of a run. A stage that is done is skipped by later commands.

    Attributes:
        name: name of the stage in ``stages.json`` and ``--stages``.
        outputs: file patterns, relative to the run folder, of the files that the stage writes; ``--redo`` deletes them.
        checkpoint: the output file from which lost outputs of a done stage can be restored; "": there is no such file. Only
            outputs with a fixed name, without "*", can be restored.
    """

    name: str
    outputs: tuple[str, ...]
    checkpoint: str = ""

    def check(self, session: Session, before: list[str]) -> None:
        """Checks the inputs of the stage. Called in the main process, before the run folder is created.

        Args:
            session: session without ``run`` and ``record``.
            before: names of the stages that this command runs before this one.
        Raises:
            UserError: an input is missing or does not fit this run.
        """

    def prepare(self, session: Session) -> None:
        """Prepares the stage in the main process, before all processes run it."""

    def run(self, session: Session) -> None:
        """Runs the stage; the main process marks it as done."""
        raise NotImplementedError

    def summary(self, path: Path) -> str:
        """Returns the main result of the done stage in run folder ``path``, for the log; "" by default."""
        return ""


def choose_stages(name: str, known: list[str], flags) -> tuple[list[str], list[str]]:
    """Returns (names of the stages of this run, names of those that ``--stages`` selects).

    A stage whose bank is given by ``--init_bank`` or ``--init_variants`` is left out of both.

    Args:
        name: name of the method.
        known: names of the method's stages.
        flags: ``engine.loops.settings.RunFlags``.
    Raises:
        UserError: a flag names a stage that the run does not have.
    """
    for flag, replaced in (("init_bank", INITIAL), ("init_variants", ("augment",))):
        if getattr(flags, flag):
            if not set(replaced) & set(known):
                raise UserError(f"--{flag} found, but {name} has no stage {' or '.join(replaced)} to replace; leave it out")
            known = [stage for stage in known if stage not in replaced]
    if flags.redo and flags.redo not in known:
        raise UserError(f"--redo {flags.redo} found, one of the stages {', '.join(known)} wanted")
    if wrong := [stage for stage in flags.stages or () if stage not in known]:
        raise UserError(f"--stages {','.join(wrong)} found, stages out of {', '.join(known)} wanted")
    return known, [stage for stage in known if stage in (flags.stages or known)]


def check_outputs(path: Path, record: StageRecord, stages: Iterable[Stage]) -> list[str]:
    """Checks that the outputs of done stages exist and are undamaged, and that new stages have none.

    If an output is missing that can be restored from the stage's checkpoint, the stage is marked as incomplete.

    Args:
        path: run folder.
        record: stage record of the run; may be changed in memory.
        stages: stages to check.
    Returns:
        Log lines, one for each stage that is no longer done.
    Raises:
        UserError: an output is damaged, or is missing and can only be made by running the whole stage again; or there are
            outputs of a stage that is not recorded.
    """
    said = []
    for stage in stages:
        if record.status(stage.name) == "new":
            require_no_outputs(path, stage.name, stage.outputs)
        if record.status(stage.name) != "done":
            continue
        gone = checksums.missing(path, stage.outputs) or fewer(path, stage.outputs, record.record[stage.name]["facts"])
        names = ", ".join(("some of " if "*" in file.name else "") + str(file.relative_to(path)) for file in gone[:3])
        again = {path / name for name in stage.outputs if "*" not in name and name != stage.checkpoint}
        if gone and not (stage.checkpoint and set(gone) <= again and (path / stage.checkpoint).exists()):
            advice = f"restore it from a copy, or run the stage again with --redo {stage.name}"
            raise UserError(f"stage {stage.name} in {path} is done, but {names} is missing; {advice}")
        for file in checksums.present(path, stage.outputs):
            checksums.check(file)
        if gone:
            record.reopen(stage.name)
            said.append(f"{stage.name}: {names} is missing and is written again from {stage.checkpoint}")
    return said


def require_no_outputs(path: Path, stage: str, patterns: Iterable[str], redo: str = "--redo {stage}") -> None:
    """Raises a UserError if the folder of a run has outputs of a stage that its ``stages.json`` does not list.

    A manifest is no such output, because it is written before the stage begins.
    """
    for file in (file for pattern in patterns for file in outputs(path, pattern) if file.name != "manifest.json"):
        raise UserError(
            f"{path} holds {file.relative_to(path)} of a stage {stage}, which is not in its stages.json; restore stages.json "
            f"from a copy, give another --save_dir, or run the stage again with {redo.format(stage=stage)}"
        )


def noted_files(facts: dict[str, Any], pattern: str) -> int:
    """Returns the recorded number of files with a pattern that a done stage wrote; 0: unknown."""
    return (facts.get("files") or {}).get(pattern, 0)


def fewer(path: Path, patterns: Iterable[str], facts: dict[str, Any]) -> list[Path]:
    """Returns the output patterns with fewer files than a done stage wrote.

    This also finds files that were lost together with the ``sha256.txt`` that lists them.
    """
    return [path / each for each in patterns if len(outputs(path, each)) < noted_files(facts, each)]


def run_stages(session: Session, stages: tuple[Stage, ...], selected: list[str], redo: str | None) -> None:
    """Runs the selected stages that are not done.

    The main process decides which stages these are. ``redo`` names a stage to delete first, together with all later ones.
    """
    processes = session.processes
    plan = processes.broadcast(_plan(session, stages, selected, redo) if processes.main else None)
    for stage in stages:
        if plan.get(stage.name) == "done" and processes.main:
            session.run.log(f"{stage.name}: already done, skipped ({session.path}){stage.summary(session.path)}")
        if plan.get(stage.name) != "todo":
            continue
        if processes.main:
            stage.prepare(session)
        processes.broadcast()  # waits until the main process has written its files
        session.check_shared()
        seed_position(session.seed, stage.name)
        stage.run(session)
        if processes.main:
            session.record.update(stage.name, files={each: len(outputs(session.path, each)) for each in stage.outputs})


def _plan(session: Session, stages: tuple[Stage, ...], selected: list[str], redo: str | None) -> dict[str, str]:
    """Deletes the outputs of the stages to redo; returns {selected stage: "todo" or "done"}."""
    record = session.record
    if redo:
        gone = record.from_on(redo)
        record.check([name for name in record.dependencies if name not in gone])  # before anything is deleted
        delete_files(session.path, [pattern for stage in stages if stage.name in gone for pattern in stage.outputs])
        record.discard(redo)
    record.check(selected)
    for line in check_outputs(session.path, record, [stage for stage in stages if stage.name in selected]):
        session.run.log(line)
    now = torch.get_num_threads()
    for name in selected:
        if record.status(name) == "incomplete" and (begun := record.threads(name)) not in (None, now):
            session.run.log(
                f"{name}: started with {begun} CPU threads, resumed with {now}: sums are computed in another order, so the "
                f"results may differ in the last bits from an uninterrupted run; OMP_NUM_THREADS={begun} gives the same bits"
            )
    return {name: "done" if record.status(name) == "done" else "todo" for name in selected}
