"""KD: ordinary distillation on the real training images (Hinton et al. 2015, arXiv 1503.02531). A control, not data-free.

It is the upper bound of the tables: the same student loss and steps as the methods, on the images that they do without. It is
the only method that may open the training split, says so when it does, and stands in tables with "real training images" for
its external prior.

    student     KL_T + ce * CE(S(x), y)

Deviations: T 20 and no cross-entropy by default, as the data-free methods have, so that nothing but the images differs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import ImageBatch, Method, Synthesizer, Task
from datafree.losses import KLDistillation
from engine.data.transfer_set import TransferSet
from engine.runtime.errors import UserError
from engine.runtime.flags import flag

DISTILL = ("distill",)


@dataclass(frozen=True)
class KDConfig:
    """Flags of KD."""

    T: float = flag(20.0, "temperature of the distillation loss", affects=DISTILL, above=0)
    ce: float = flag(0.0, "weight of the cross-entropy to the real labels", affects=DISTILL, least=0)


class RealImages(Synthesizer):
    """Makes nothing: hands on the training split, cropped and flipped."""

    def __init__(self, task: Task):
        self.task, split = task, task.training_split()
        self.images_total, self.split = len(split), split
        if split.images is not None:
            self.pictures = TransferSet(len(split), task.info.image_size, task.device)
            self.pictures.add(split.images, split.labels)
            self.split = None

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Some images to look at."""
        images, labels = next(self.batches(min(64, self.images_total), seed=0))
        return ImageBatch(images, labels)

    def batches(self, batch_size: int, *, seed: int, rank: int = 0, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless shuffled passes; of images that are decoded as they come, what is left over at the end of one is left out."""
        if self.pictures:
            return self.pictures.batches(batch_size, self.task.random_view, seed=seed, rank=rank, count=count)
        return self._decoded(batch_size, seed, rank, count)

    def _decoded(self, batch_size: int, seed: int, rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        if batch_size > len(self.split):
            raise UserError(f"--batch_size {batch_size} is more than the {len(self.split)} training images; give less")
        generator, whole = torch.Generator().manual_seed(seed), len(self.split) // batch_size * batch_size
        while True:
            order = torch.randperm(len(self.split), generator=generator)[:whole].view(-1, batch_size)
            for images, labels in self.split.batches(batch_size // count, order[:, rank::count].flatten()):
                yield self.task.random_view(images), labels


class KDObjective(KLDistillation):
    """KL, and cross-entropy to real labels where it has a weight."""

    def __init__(self, temperature: float, ce: float):
        super().__init__(temperature)
        self.ce = ce

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """Outputs with logits (B, C), labels (B,) -> named scalar losses."""
        losses = super().forward(teacher_out, student_out, labels)
        if self.ce:
            losses["ce"] = F.cross_entropy(student_out.logits.float(), labels)
            losses["loss"] = losses["loss"] + self.ce * losses["ce"]
        return losses


class KD(Method):
    """Stage distill, on real images."""

    Config = KDConfig
    streams = True
    reads_train_split = True
    external_prior = "real training images"

    def synthesizer(self) -> RealImages:
        return RealImages(self.task)

    def objective(self) -> KDObjective:
        return KDObjective(self.config.T, self.config.ce)
