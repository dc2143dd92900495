"""Stage generate: images drawn one by one position into the image bank, in rounds, by one process or several.

Position p decides an image's class, its seed and the batch it is drawn in, so neither a restart nor the number of processes
changes anything: process r draws batches r, r + W, ... of a round, and the main one writes the round as a shard when all of
it is there. Beside the shards, ``generator.pth`` holds what a generator has learned at the last round's beginning.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.bank import to_uint8
from engine.data.pictures import grid
from engine.loops.evaluate import check_finite
from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path, claim_folder, digest, load_checkpoint, save_checkpoint
from engine.runtime.processes import Processes
from engine.runtime.run import Run, progress
from engine.runtime.seeding import position_seed, seed_position
from engine.runtime.stage_record import Stages

STATE = "generator.pth"


@dataclass(frozen=True)
class Order:
    """What is to be drawn.

    Args:
        images: how many in all.
        num_classes: C; every C positions in a row hold every class once, in an order of their own.
        round_size: images a round, a shard of the bank.
        batch_size: images drawn together, within a round.
        seed: of the run.
        export: folder for full-size PNG files ``<class id>/<position>.png``, or None.
    """

    images: int
    num_classes: int
    round_size: int
    batch_size: int
    seed: int
    export: Path | None = None

    @property
    def rounds(self) -> int:
        return -(-self.images // self.round_size)

    def positions(self, round: int) -> range:
        """Of one round."""
        return range(round * self.round_size, min((round + 1) * self.round_size, self.images))

    def batches(self, round: int) -> list[range]:
        """The positions of a round's batches."""
        positions = self.positions(round)
        return [positions[start : start + self.batch_size] for start in range(0, len(positions), self.batch_size)]

    def labels(self, positions: range) -> Tensor:
        """(len(positions),) class ids."""
        return torch.tensor([self._cycle(p // self.num_classes)[p % self.num_classes] for p in positions])

    def _cycle(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(position_seed(self.seed, "generate", "order", number))
        return torch.randperm(self.num_classes, generator=generator).tolist()


def generate(
    run: Run | None,
    stages: Stages | None,
    bank,
    make_generator: Callable[[], Any],
    order: Order,
    processes: Processes = Processes(),
) -> None:
    """Fills ``bank`` with ``order.images`` images; goes on after the last whole round.

    Args:
        run, stages, bank: the main process's; None in the others.
        make_generator: builds what draws, if anything is left to do. It has ``generate(labels, seeds, repeats)``,
            ``measure(images, labels)``, ``wants_to_learn(images)``, ``fit(images, labels)``, ``state_dict()`` and
            ``load_state_dict(state)``.
    """
    start, state = processes.broadcast(_begin(run, stages, bank, order) if processes.main else None)
    generator = make_generator() if start < order.rounds else None
    if state:
        generator.load_state_dict(state)
    bar = progress(order.images, "generate", "img", min(start * order.round_size, order.images)) if processes.main else None
    for round in range(start, order.rounds):
        _learn(run, bank, generator, order, round, processes)
        parts = dict(_draw(generator, order, round, processes, bar))
        parts = {index: part for found in processes.gather(parts) for index, part in found.items()}
        if processes.main:
            images, labels = torch.cat([parts[i] for i in sorted(parts)]), order.labels(order.positions(round))
            figures = generator.measure(images, labels)
            check_finite(figures, f"round {round} of stage generate", "lower --guidance_lr, --bn or --oh, and run again")
            # before the shard: a repeated round rewinds it
            run.metrics("generate", round, {"images": len(images)} | figures)
            bank.append("generate", round, images, labels)
            if round % 10 == 0:
                run.picture("bank", grid(images[:64]), round)
            stages.update("generate", images=order.positions(round).stop)
            bar.n = order.positions(round).stop
            bar.set_postfix({"teacher_acc1": f"{figures['teacher_acc1']:.1f}"}, refresh=False)
    if processes.main:
        bar.close()
        run.picture("bank", grid(bank.read("generate", order.rounds)["images"][:64]), order.rounds)
        means = means_of_rounds(run)
        stages.update("generate", done=True, images=order.images, **means)
        seconds = stages.seconds()["generate"]
        run.log(
            f"generate: {order.images} images in {bank.path}, of which the teacher names {means['teacher_acc1']:.1f} % as "
            f"wanted ({seconds:.0f} s, {order.images / max(seconds, 1e-3):.2f} images/s)"
        )


def _begin(run: Run, stages: Stages, bank, order: Order) -> tuple[int, dict]:
    """The first round that is not there, and what the generator had learned by then."""
    if order.export:
        claim_folder(order.export, digest(stages.dependencies["generate"]))
    stages.begin("generate")
    present = set(bank.rounds("generate"))
    start = next((round for round in range(order.rounds) if round not in present), order.rounds)
    run.rewind("generate", start)
    file = run.path / STATE
    if start == order.rounds or not file.exists():
        return start, {}
    saved = load_checkpoint(file, "generator's state")
    if saved["round"] not in (start - 1, start):
        raise UserError(f"{bank.path} misses round {start} of {saved['round']}; make it again with --redo generate")
    return start, saved["generator"]


def _learn(run: Run | None, bank, generator, order: Order, round: int, processes: Processes) -> None:
    """Before a round the generator learns from those before it, in the main process; once a round, whatever is killed."""
    if not generator.wants_to_learn(order.positions(round).start):
        return
    state = None
    if processes.main:
        file = run.path / STATE
        saved = load_checkpoint(file, "generator's state")["round"] if file.exists() else -1
        if saved < round:
            columns = bank.read("generate", round)
            seed_position(order.seed, "generate", "learn", round)
            figures = {name: float(value) for name, value in generator.fit(columns["images"], columns["labels"]).items()}
            check_finite(figures, f"round {round} of stage generate", "give --adv 0, or fewer --adv_steps")
            run.log(f"generate: before round {round}, " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
            save_checkpoint(file, {"round": round, "generator": generator.state_dict()})
        state = generator.state_dict()
    state = processes.broadcast(state)
    if not processes.main:
        generator.load_state_dict(state)


def _draw(generator, order: Order, round: int, processes: Processes, bar) -> Iterator[tuple[int, Tensor]]:
    """(index, images (B, 3, H, W) uint8) of this process's batches of a round."""
    for index, positions in enumerate(order.batches(round)):
        if index % processes.count != processes.rank:
            continue
        seeds = [position_seed(order.seed, "generate", p) for p in positions]
        batch = generator.generate(order.labels(positions), seeds, [p // order.num_classes for p in positions])
        if order.export:
            export(order.export, batch.full, batch.labels, positions)
        if bar is not None:
            bar.update(min(len(positions) * processes.count, max(0, order.positions(round).stop - bar.n)))
        yield index, to_uint8(batch.images).cpu()


def export(folder: Path, images: Tensor, labels: Tensor, positions: range) -> None:
    """Writes images (B, 3, R, R) in [0, 1] as ``<folder>/<class id>/<position>.png``."""
    from PIL import Image

    for image, label, position in zip(to_uint8(images).cpu(), labels.tolist(), positions, strict=True):
        with atomic_path(folder / str(label) / f"{position:07d}.png") as temporary:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")


def means_of_rounds(run: Run) -> dict[str, float]:
    """What was measured of the images of the bank so far, each round by its number of images."""
    lines = run.history("generate")
    count = max(sum(line["images"] for line in lines), 1)
    names = [name for name in (lines[0] if lines else {}) if name not in ("stage", "round", "images")]
    return {name: round(sum(line["images"] * line[name] for line in lines) / count, 4) for name in names}
