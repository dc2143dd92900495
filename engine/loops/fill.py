"""The loop that fills a bank: a maker makes rounds of images, one shard per round, in one process or several.

If the rounds of a maker are independent, process p of W makes rounds p, p + W, ... Otherwise a round depends on the round
before, and all processes make each round together, each process a share of it. The main process writes the shards in order.
For a maker with dependent rounds, ``synthesizer.pth`` beside the shards holds the state that the next round starts from.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.data.image_bank import ImageBank
from engine.data.pictures import grid
from engine.loops.measures import check_finite
from engine.loops.pace import log_time_left
from engine.runtime.compilation import CompileTarget
from engine.runtime.errors import UserError
from engine.runtime.processes import Processes
from engine.runtime.run import Run, progress
from engine.runtime.schema import COUNT, require
from engine.runtime.stage_record import StageRecord
from engine.runtime.tensors import load_checkpoint, save_checkpoint

STATE = "synthesizer.pth"
PICTURE_EVERY = 10  # rounds


class Share(NamedTuple):
    """A process's share of the parts of a round: every ``count``-th part, starting at part ``rank``."""

    rank: int = 0
    count: int = 1

    def of(self, parts: list) -> Iterator[tuple[int, Any]]:
        """Yields (index, part) for this process's parts."""
        return ((index, part) for index, part in enumerate(parts) if index % self.count == self.rank)


@dataclass
class Part:
    """A part of the images of a round, in host memory.

    Args:
        columns: "images" (n, 3, H, W) uint8, "labels" (n,) and any further columns.
        figures: losses and other figures of the round, for the log.
    """

    columns: dict[str, Tensor]
    figures: dict[str, float] = field(default_factory=dict)


class Maker:
    """Base class: makes the images of a bank, round by round.

    Attributes:
        independent: whether a round depends only on its number, not on the rounds before it.
        unit: unit of the progress bar; ``size(round)`` is the number of units of a round.
        advice: advice to the user if a loss becomes NaN or infinite.
    """

    independent: bool = True
    unit: str = "round"
    advice: str = "lower the learning rate or the loss weights, and run again"

    def size(self, round: int) -> int:
        """Returns the number of progress units of a round."""
        return 1

    def learn(self, round: int, made: Callable[[], dict[str, Any]]) -> dict[str, float] | None:
        """Trains the maker's own model, if it has one, on the images made so far.

        Called in the main process before the first round that a command makes; with dependent rounds, before every round.

        Args:
            round: number of the next round.
            made: function that reads the columns of the rounds so far.
        Returns:
            Figures for the log; None if nothing was trained.
        """
        return None

    def make(self, round: int, share: Share, show: Callable[[int], None]) -> dict[int, Part]:
        """Makes this process's share of a round; returns {number of the part: part}.

        Args:
            round: number of the round.
            share: share of the parts that this process makes.
            show: progress function; call it with the number of units made since the last call.
        """
        raise NotImplementedError

    def report(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Returns further figures of a finished round. Called in the main process."""
        return {}

    def compile_targets(self) -> list[CompileTarget]:
        """Returns the functions that take most of a round's time, to be compiled."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that the next round depends on: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from ``state_dict``."""


def fill(
    run: Run | None,
    record: StageRecord | None,
    bank: ImageBank | None,
    stage: str,
    rounds: int,
    make_maker: Callable[[], Maker],
    processes: Processes = Processes(),
) -> None:
    """Fills ``bank`` with ``rounds`` shards; continues after the last complete shard.

    Args:
        run, record, bank: run folder writer, stage record and bank of the main process; None in the other processes.
        stage: name of the stage.
        rounds: number of rounds.
        make_maker: function that builds the maker; called only if a round is missing.
        processes: processes that make the images together.
    Raises:
        UserError: a figure became NaN or infinite, or the state that the next round starts from is missing.
    """
    start = processes.broadcast(_first_missing(record, bank, stage, rounds) if processes.main else None)
    if start < rounds:
        _make_rounds(run, record, bank, stage, range(start, rounds), make_maker(), processes)
    if processes.main:
        columns = bank.read(stage, rounds)
        images, means = len(columns["labels"]), means_of_rounds(run, stage)
        run.picture(bank.path.name, shown(run, columns["images"], columns["labels"]), rounds)
        record.update(stage, done=True, images=images, **means)
        seconds, share = record.seconds()[stage], means.get("teacher_acc1")
        named = f", the teacher classifies {share:.1f} % of them as their labels" if share is not None else ""
        run.log(
            f"{stage}: {images} images in {bank.path}{named} ({seconds:.0f} s, {images / max(seconds, 1e-3):.1f} images/s)"
        )


def _first_missing(record: StageRecord, bank: ImageBank, stage: str, rounds: int) -> int:
    """Returns the first round to make: the first missing shard, or the earlier round that the saved state belongs to."""
    record.begin(stage)
    present, file = set(bank.rounds(stage)), bank.path / STATE
    start = next((round for round in range(rounds) if round not in present), rounds)
    if file.exists() and start < (saved := load_state(file)["round"]):
        raise UserError(
            f"{bank.path} lacks the shard of round {start}, although {saved} rounds were made; run the stage again with "
            f"--redo {stage}"
        )
    return min(start, saved) if file.exists() else start


def load_state(file: Path) -> dict[str, Any]:
    """Loads ``synthesizer.pth``: {"round": number of the next round, "synthesizer": state of the maker}.

    Raises:
        UserError: the file is damaged.
    """
    state = load_checkpoint(file, "synthesizer")
    require(state, {"round": COUNT, "synthesizer": dict}, str(file))
    return state


def _make_rounds(
    run: Run | None, record: StageRecord | None, bank: ImageBank | None, stage: str, wanted: range, maker: Maker,
    processes: Processes,
) -> None:  # fmt: skip
    start, rounds = wanted.start, wanted.stop
    if processes.main:
        run.rewind(stage, start)
        if start and not maker.independent:
            if not (bank.path / STATE).exists():
                raise UserError(
                    f"{bank.path / STATE} is missing, and round {start} needs it; run the stage again with --redo {stage}"
                )
            maker.load_state_dict(load_state(bank.path / STATE)["synthesizer"])
        elif not maker.independent:  # a kill between the first shard and its state repeats that round
            save_checkpoint(bank.path / STATE, {"round": 0, "synthesizer": {}})
    sizes = [maker.size(round) for round in range(rounds)]
    bar = progress(sum(sizes), stage, maker.unit, sum(sizes[:start]))
    step = processes.count if maker.independent else 1
    for first in range(start, rounds, step):
        if first == start or not maker.independent:
            _learn(run, bank, stage, first, maker, processes)
            bar.unpause()  # excludes the training time from the bar's speed
        if first == start:
            began = time.monotonic()
        mine = first + processes.rank if maker.independent else first
        share = Share() if maker.independent else Share(processes.rank, processes.count)
        show = lambda n: bar.update(min(n * processes.count, bar.total - bar.n))  # the other processes are about as far
        made = maker.make(mine, share, show) if mine < rounds else {}
        found = processes.gather((mine, made))
        if not processes.main:
            continue
        for round in range(first, min(first + step, rounds)):
            parts = {index: part for number, some in found if number == round for index, part in some.items()}
            figures = _write(run, bank, stage, round, maker, [parts[index] for index in sorted(parts)])
            record.update(stage, rounds=round + 1)
            bar.n = sum(sizes[: round + 1])
            bar.set_postfix({name.removeprefix("loss_"): f"{value:.3g}" for name, value in figures.items()}, refresh=False)
            bar.refresh()
        if first == start:
            made, left = (sum(sizes[part]) for part in (slice(start, first + step), slice(first + step, None)))
            log_time_left(run.log, f"time left in stage {stage}", (time.monotonic() - began) / made * left)
    bar.close()


def _learn(run: Run | None, bank: ImageBank | None, stage: str, round: int, maker: Maker, processes: Processes) -> None:
    """Calls ``maker.learn`` in the main process, logs its figures and copies the maker's state to the other processes."""
    figures = maker.learn(round, lambda: bank.read(stage, round)) if processes.main else None
    if processes.main and figures:
        check_finite(figures, f"round {round} of stage {stage}", maker.advice)
        run.log(f"{stage}: before round {round}, " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    state = processes.broadcast(maker.state_dict() if figures is not None and processes.count > 1 else None)
    if state and not processes.main:
        maker.load_state_dict(state)


def _write(run: Run, bank: ImageBank, stage: str, round: int, maker: Maker, parts: list[Part]) -> dict[str, float]:
    """Writes one round to the bank, with its metrics and state; returns its figures."""
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    figures = parts[0].figures | maker.report(columns)
    check_finite(figures, f"round {round} of stage {stage}", maker.advice)
    if figures:  # written before the shard: ``rewind`` removes the line of a repeated round
        run.metrics(stage, round, {"images": len(columns["labels"])} | figures)
    bank.append(stage, round, **columns)
    if not maker.independent:
        save_checkpoint(bank.path / STATE, {"round": round + 1, "synthesizer": maker.state_dict()})
    if round % PICTURE_EVERY == 0:
        run.picture(bank.path.name, shown(run, columns["images"], columns["labels"]), round)
    return figures


def shown(run: Run, images: Tensor, labels: Tensor) -> Tensor:
    """Returns the first 64 images as one picture, with class names if these are known."""
    return grid(images[:64], labels=labels[:64], names=run.class_names)


def means_of_rounds(run: Run, stage: str) -> dict[str, float]:
    """Returns the mean figures of a stage so far that all its lines have, weighted by the number of images per round."""
    lines = [line for line in run.history(stage) if "images" in line]
    count = max(sum(line["images"] for line in lines), 1)
    found = [name for name in (lines[0] if lines else {}) if name not in ("stage", "round", "images")]
    names = [name for name in found if all(name in line for line in lines)]
    return {name: round(sum(line["images"] * line[name] for line in lines) / count, 4) for name in names}
