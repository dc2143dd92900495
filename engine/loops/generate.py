"""Images drawn one by one position, as a maker of the initial bank.

Position p decides an image's class, its seed and the batch it is drawn in, so neither a restart nor the number of processes
changes anything.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.bank import to_uint8
from engine.loops.fill import Maker, Part, Share
from engine.runtime.compilation import Hot
from engine.runtime.files import atomic_path
from engine.runtime.seeding import position_seed, seed_position


@dataclass(frozen=True)
class Order:
    """What is to be drawn.

    Args:
        images: how many in all.
        num_classes: C; every C positions in a row hold every class once, with ``one_class`` every C * batch_size hold it
            batch_size times in a row, in an order of their own.
        round_size: images a round, a shard of the bank.
        batch_size: images drawn together, within a round.
        seed: of the run.
        one_class: a batch is of one class; it ends where the next class begins.
        export: folder for full-size PNG files ``<class id>/<position>.png``, or None.
    """

    images: int
    num_classes: int
    round_size: int
    batch_size: int
    seed: int
    export: Path | None = None
    one_class: bool = False

    @property
    def rounds(self) -> int:
        return -(-self.images // self.round_size)

    def positions(self, round: int) -> range:
        """Of one round."""
        return range(round * self.round_size, min((round + 1) * self.round_size, self.images))

    def batches(self, round: int) -> list[range]:
        """The positions of a round's batches."""
        positions = self.positions(round)
        first, stop = positions.start, positions.stop
        if self.one_class:
            starts = [p for p in positions if p == first or self._place(p)[2] == 0]
        else:
            starts = list(positions[:: self.batch_size])
        return [range(start, end) for start, end in zip(starts, [*starts[1:], stop])]

    def labels(self, positions: range) -> Tensor:
        """(len(positions),) class ids."""
        places = map(self._place, positions)
        return torch.tensor([self._cycle(number)[index] for number, index, _ in places])

    def repeats(self, positions: range) -> list[int]:
        """How many images of its class come before each position."""
        return [number * self._run + place for number, _, place in map(self._place, positions)]

    @property
    def _run(self) -> int:
        """Images of one class in a row."""
        return self.batch_size if self.one_class else 1

    def _place(self, position: int) -> tuple[int, int, int]:
        """(number of its cycle through the classes, index of its class there, its place among those of that class)."""
        number, rest = divmod(position, self._run * self.num_classes)
        run = min(self._run, -(-self.images // self.num_classes) - number * self._run)  # the last cycle's may be shorter
        return number, *divmod(rest, run)

    def _cycle(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(position_seed(self.seed, "generate", "order", number))
        return torch.randperm(self.num_classes, generator=generator).tolist()


class GuidedMaker(Maker):
    """Batches of ``order`` from a sampler, as ``datafree.diffusion.guided_sampler.GuidedSampler``.

    Args:
        sampler: has ``draw(labels, seeds, repeats)``, ``measure(images, labels)``, ``competes``,
            ``wants_to_learn(images)``, ``fit(images, labels)``, ``state_dict()`` and ``load_state_dict(state)``.
    """

    unit = "img"
    advice = "lower --guidance_lr, --bn or --oh, give --adv 0 or fewer --adv_steps, and run again"

    def __init__(self, sampler, order: Order):
        self.sampler, self.order = sampler, order
        self.independent = not sampler.competes

    def size(self, round: int) -> int:
        return len(self.order.positions(round))

    def hot(self) -> list[Hot]:
        batches = len(self.order.batches(0))
        return [Hot(self.sampler.prior.network, "forward", batches * self.sampler.steps, "denoising network")]

    def learn(self, round: int, made) -> dict[str, float] | None:
        """Its competing student learns from the images so far."""
        if not self.sampler.wants_to_learn(self.order.positions(round).start):
            return None
        seed_position(self.order.seed, "generate", "learn", round)
        columns = made()
        return {name: float(value) for name, value in self.sampler.fit(columns["images"], columns["labels"]).items()}

    def make(self, round: int, share: Share, show) -> dict[int, Part]:
        parts = {}
        for index, positions in share.of(self.order.batches(round)):
            labels = self.order.labels(positions)
            seeds = [position_seed(self.order.seed, "generate", p) for p in positions]
            batch = self.sampler.draw(labels, seeds, self.order.repeats(positions))
            if self.order.export:
                export(self.order.export, batch.full, batch.labels, positions)
            parts[index] = Part({"images": to_uint8(batch.images).cpu(), "labels": batch.labels.cpu()})
            show(len(positions))
        return parts

    def report(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """What the teacher says of them."""
        return self.sampler.measure(columns["images"], columns["labels"])

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


def export(folder: Path, images: Tensor, labels: Tensor, positions: range) -> None:
    """Writes images (B, 3, R, R) in [0, 1] as ``<folder>/<class id>/<position>.png``."""
    from PIL import Image

    for image, label, position in zip(to_uint8(images).cpu(), labels.tolist(), positions, strict=True):
        with atomic_path(folder / str(label) / f"{position:07d}.png") as temporary:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")
