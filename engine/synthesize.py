"""Stage synthesize: rounds of synthesis into the image bank, one shard a round.

Beside the shards, ``bank/synthesizer.pth`` holds the state of a synthesizer that has one, from which this stage and later
stage distill go on.
"""

from engine.errors import UserError
from engine.evaluate import check_finite
from engine.files import load_checkpoint, save_checkpoint
from engine.pictures import grid
from engine.run import Run, progress
from engine.seeding import seed_position
from engine.stages import Stages
from models.classifier import weights_fixed

STATE = "synthesizer.pth"


def synthesize(run: Run, stages: Stages, bank, synthesizer, student, *, rounds: int, seed: int) -> None:
    """Makes ``rounds`` shards of the bank; goes on after the last whole one."""
    stages.begin("synthesize")
    present = bank.rounds("synthesize")
    start = next((r for r in range(rounds) if r not in set(present)), rounds)
    file = bank.path / STATE
    if synthesizer.state_dict():
        saved = load_checkpoint(file, "synthesizer") if file.exists() else {"round": 0}
        start = min(start, saved["round"])
        if start == saved["round"] > 0:
            synthesizer.load_state_dict(saved["synthesizer"])
        elif start:
            raise UserError(f"{bank.path} misses round {start} of {saved['round']}; make it again with --redo synthesize")
    run.rewind("synthesize", start)
    bar = progress(rounds, "synthesize", "round", start)
    for round in range(start, rounds):
        seed_position(seed, "synthesize", round)
        with weights_fixed(student):
            batch = synthesizer.synthesize(student)
        figures = {name: float(value) for name, value in batch.scalars.items()}
        check_finite(figures, f"round {round} of stage synthesize", "lower --lr_g or the loss weights, and run again")
        run.metrics("synthesize", round, figures)  # before the shard: a repeated round rewinds it
        bank.append("synthesize", round, batch.images, batch.labels)
        if state := synthesizer.state_dict():
            save_checkpoint(file, {"round": round + 1, "synthesizer": state})
        if round % 10 == 0:
            run.picture("bank", grid(batch.images[:64]), round)
        stages.update("synthesize", rounds=round + 1)
        bar.set_postfix({name.removeprefix("loss_"): f"{value:.3g}" for name, value in figures.items()}, refresh=False)
        bar.update()
    bar.close()
    columns = bank.read("synthesize", rounds)
    run.picture("bank", grid(columns["images"][:64]), rounds)
    stages.update("synthesize", done=True, images=len(columns["labels"]))
    run.log(f"synthesize: {len(columns['labels'])} images in {bank.path} ({stages.seconds()['synthesize']:.0f} s)")
