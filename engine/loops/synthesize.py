"""Stage synthesize: rounds of synthesis into the image bank, one shard a round, by one process or several.

Beside the shards, ``bank/synthesizer.pth`` holds the state of a synthesizer that has one, from which this stage and later
stage distill go on. The rounds of one that has none are functions of their numbers: process r makes every W-th, and the main
one writes them in their order.
"""

from typing import Any

from torch import Tensor

from engine.data.bank import to_uint8
from engine.data.pictures import grid
from engine.loops.evaluate import check_finite
from engine.runtime.errors import UserError
from engine.runtime.files import load_checkpoint, save_checkpoint
from engine.runtime.processes import Processes
from engine.runtime.run import Run, progress
from engine.runtime.seeding import seed_position
from engine.runtime.stage_record import Stages
from models.classifier import weights_fixed

STATE = "synthesizer.pth"


def synthesize(
    run: Run | None,
    stages: Stages | None,
    bank,
    synthesizer,
    student,
    *,
    rounds: int,
    seed: int,
    processes: Processes = Processes(),
) -> None:
    """Makes ``rounds`` shards of the bank; goes on after the last whole one.

    Args:
        run, stages, bank: the main process's; None in the others.
    """
    alone = bool(synthesizer.state_dict())
    if processes.main:
        start = _begin(run, stages, bank, synthesizer, rounds)
        if alone and processes.count > 1:
            run.log("synthesize: a round goes on from the one before, so the main process makes them alone")
        bar = progress(rounds, "synthesize", "round", start)
    if alone:
        if not processes.main:
            return
        processes = Processes()
    start = processes.broadcast(start if processes.main else None)
    for first in range(start, rounds, processes.count):
        mine = first + processes.rank
        made = _make(synthesizer, student, mine, seed) if mine < rounds else None
        found = filter(None, processes.gather(made))
        for round, (images, labels, figures) in enumerate(found, first):
            check_finite(figures, f"round {round} of stage synthesize", "lower --lr_g or the loss weights, and run again")
            run.metrics("synthesize", round, figures)  # before the shard: a repeated round rewinds it
            bank.append("synthesize", round, images, labels)
            if state := synthesizer.state_dict():
                save_checkpoint(bank.path / STATE, {"round": round + 1, "synthesizer": state})
            if round % 10 == 0:
                run.picture("bank", grid(images[:64]), round)
            stages.update("synthesize", rounds=round + 1)
            bar.set_postfix({name.removeprefix("loss_"): f"{value:.3g}" for name, value in figures.items()}, refresh=False)
            bar.update()
    if processes.main:
        bar.close()
        columns = bank.read("synthesize", rounds)
        run.picture("bank", grid(columns["images"][:64]), rounds)
        stages.update("synthesize", done=True, images=len(columns["labels"]))
        run.log(f"synthesize: {len(columns['labels'])} images in {bank.path} ({stages.seconds()['synthesize']:.0f} s)")


def _begin(run: Run, stages: Stages, bank, synthesizer, rounds: int) -> int:
    """The first round that is not there; the synthesizer takes up what it was then."""
    stages.begin("synthesize")
    present = set(bank.rounds("synthesize"))
    start = next((r for r in range(rounds) if r not in present), rounds)
    if synthesizer.state_dict():
        file = bank.path / STATE
        saved = load_checkpoint(file, "synthesizer") if file.exists() else {"round": 0}
        start = min(start, saved["round"])
        if start == saved["round"] > 0:
            synthesizer.load_state_dict(saved["synthesizer"])
        elif start:
            raise UserError(f"{bank.path} misses round {start} of {saved['round']}; make it again with --redo synthesize")
    run.rewind("synthesize", start)
    return start


def _make(synthesizer, student, round: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A round's images (B, 3, H, W) uint8 and labels (B,), both in host memory, and its figures."""
    seed_position(seed, "synthesize", round)
    with weights_fixed(student):
        batch = synthesizer.synthesize(student)
    figures = {name: float(value) for name, value in batch.scalars.items()}
    return to_uint8(batch.images).cpu(), batch.labels.cpu(), figures
