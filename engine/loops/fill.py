"""The loop that fills a bank: rounds of images from a maker, one shard a round, by one process or several.

Where a maker's rounds are independent, process p of W makes rounds p, p + W, ... Else a round goes on from the one before, and
all processes make it together, each its share. The main process writes the shards in their order. Beside them,
``synthesizer.pth`` holds the state from which the next round of a dependent maker goes on.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.data.bank import ImageBank
from engine.data.pictures import grid
from engine.loops.evaluate import check_finite
from engine.loops.pace import tell_time_left
from engine.runtime.compilation import Hot
from engine.runtime.errors import UserError
from engine.runtime.files import load_checkpoint, save_checkpoint
from engine.runtime.processes import Processes
from engine.runtime.run import Run, progress
from engine.runtime.schema import COUNT, require
from engine.runtime.stage_record import StageRecord

STATE = "synthesizer.pth"
PICTURE_EVERY = 10  # rounds


class Share(NamedTuple):
    """Of the parts of a round, this process makes every ``count``-th, from ``rank`` on."""

    rank: int = 0
    count: int = 1

    def of(self, parts: list) -> Iterator[tuple[int, Any]]:
        """(index, part) of this process's parts."""
        return ((index, part) for index, part in enumerate(parts) if index % self.count == self.rank)


@dataclass
class Part:
    """Some images of a round, in host memory: "images" (n, 3, H, W) uint8, "labels" (n,) and any further column; figures."""

    columns: dict[str, Tensor]
    figures: dict[str, float] = field(default_factory=dict)


class Maker:
    """Makes the images of a bank, round by round.

    Attributes:
        independent: a round depends on its number alone, not on the rounds before it.
        unit: what a progress bar counts, with ``size(round)``.
        advice: what to do where a figure is no longer a number.
    """

    independent: bool = True
    unit: str = "round"
    advice: str = "lower the learning rate or the loss weights, and run again"

    def size(self, round: int) -> int:
        """Units of one round."""
        return 1

    def learn(self, round: int, made: Callable[[], dict[str, Any]]) -> dict[str, float] | None:
        """Called in the main process before the first round it makes, and before every round if they are dependent.

        Args:
            made: reads the columns of the rounds so far.
        Returns:
            Figures for the log; None where nothing was learned.
        """
        return None

    def make(self, round: int, share: Share, show: Callable[[int], None]) -> dict[int, Part]:
        """This process's share of a round's parts, by number.

        Args:
            show: call it with the number of units made.
        """
        raise NotImplementedError

    def report(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Figures of a finished round, in the main process."""
        return {}

    def hot(self) -> list[Hot]:
        """What a round spends its time on."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What the next round depends on: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes ``state_dict``."""


def fill(
    run: Run | None,
    record: StageRecord | None,
    bank: ImageBank | None,
    stage: str,
    rounds: int,
    make_maker: Callable[[], Maker],
    processes: Processes = Processes(),
) -> None:
    """Fills ``bank`` with ``rounds`` shards; goes on after the last whole one.

    Args:
        run, record, bank: the main process's; None in the others.
        make_maker: builds the maker; called only if a round is missing.
    Raises:
        UserError: a figure became NaN, or the state that the next round goes on from is gone.
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
        named = f", of which the teacher names {share:.1f} % as wanted" if share is not None else ""
        run.log(
            f"{stage}: {images} images in {bank.path}{named} ({seconds:.0f} s, {images / max(seconds, 1e-3):.1f} images/s)"
        )


def _first_missing(record: StageRecord, bank: ImageBank, stage: str, rounds: int) -> int:
    """The first round to make: the first that is not there, or the one that the saved state is of."""
    record.begin(stage)
    present, file = set(bank.rounds(stage)), bank.path / STATE
    start = next((round for round in range(rounds) if round not in present), rounds)
    if file.exists() and start < (saved := load_state(file)["round"]):
        raise UserError(f"{bank.path} misses round {start} of {saved}; make it again with --redo {stage}")
    return min(start, saved) if file.exists() else start


def load_state(file: Path) -> dict[str, Any]:
    """The "round" that comes next, and the "synthesizer" whose state that is.

    Raises:
        UserError: it is damaged.
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
                raise UserError(f"{bank.path / STATE}, from which round {start} goes on, is gone; use --redo {stage}")
            maker.load_state_dict(load_state(bank.path / STATE)["synthesizer"])
        elif not maker.independent:  # who is killed between the first round's images and its state makes that round again
            save_checkpoint(bank.path / STATE, {"round": 0, "synthesizer": {}})
    sizes = [maker.size(round) for round in range(rounds)]
    bar = progress(sum(sizes), stage, maker.unit, sum(sizes[:start]))
    step = processes.count if maker.independent else 1
    for first in range(start, rounds, step):
        if first == start or not maker.independent:
            _learn(run, bank, stage, first, maker, processes)
            bar.unpause()  # its rate is that of the images
        if first == start:
            began = time.monotonic()
        mine, share = (
            (first + processes.rank, Share()) if maker.independent else (first, Share(processes.rank, processes.count))
        )
        scale = step if maker.independent else processes.count  # the others are about as far
        made = maker.make(mine, share, lambda n: bar.update(min(n * scale, bar.total - bar.n))) if mine < rounds else {}
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
            tell_time_left(run.log, f"time left of stage {stage}", (time.monotonic() - began) / made * left)
    bar.close()


def _learn(run: Run | None, bank: ImageBank | None, stage: str, round: int, maker: Maker, processes: Processes) -> None:
    """The main process learns from the rounds so far; the others take over its state."""
    figures = maker.learn(round, lambda: bank.read(stage, round)) if processes.main else None
    if processes.main and figures:
        check_finite(figures, f"round {round} of stage {stage}", maker.advice)
        run.log(f"{stage}: before round {round}, " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    state = processes.broadcast(maker.state_dict() if figures is not None and processes.count > 1 else None)
    if state and not processes.main:
        maker.load_state_dict(state)


def _write(run: Run, bank: ImageBank, stage: str, round: int, maker: Maker, parts: list[Part]) -> dict[str, float]:
    """One round into the bank; returns its figures."""
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    figures = parts[0].figures | maker.report(columns)
    check_finite(figures, f"round {round} of stage {stage}", maker.advice)
    if figures:
        run.metrics(
            stage, round, {"images": len(columns["labels"])} | figures
        )  # before the shard: a repeated round rewinds it
    bank.append(stage, round, **columns)
    if not maker.independent:
        save_checkpoint(bank.path / STATE, {"round": round + 1, "synthesizer": maker.state_dict()})
    if round % PICTURE_EVERY == 0:
        run.picture(bank.path.name, shown(run, columns["images"], columns["labels"]), round)
    return figures


def shown(run: Run, images: Tensor, labels: Tensor) -> Tensor:
    """The first images as a picture, with the names of their classes where these are known."""
    return grid(images[:64], labels=labels[:64], names=run.class_names)


def means_of_rounds(run: Run, stage: str) -> dict[str, float]:
    """The figures of a stage so far, each round's by its number of images."""
    lines = [line for line in run.history(stage) if "images" in line]
    count = max(sum(line["images"] for line in lines), 1)
    names = [name for name in (lines[0] if lines else {}) if name not in ("stage", "round", "images")]
    return {name: round(sum(line["images"] * line[name] for line in lines) / count, 4) for name in names}
