"""KD: ordinary distillation on the real training images (Hinton et al. 2015, arXiv 1503.02531). A control, not data-free.

KD is the upper bound of the tables. It has the same student loss and number of steps as the data-free methods, but trains on
the real images. No other method may open the training split. KD prints a line when it does, and its external prior in tables
is "real training images".

    student     KL_T + ce * CE(S(x), y)

Deviations: by default T is 20 and there is no cross-entropy, as in the data-free methods. Only the images then differ.
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
    ce: float = flag(0.0, "weight of the cross-entropy to the real labels in the student's loss", affects=DISTILL, least=0)


class RealImages(Synthesizer):
    """Streams the real training images, cropped and flipped; synthesizes nothing."""

    def __init__(self, task: Task):
        self.task, split = task, task.training_split()
        self.images_total, self.split = len(split), split
        if split.images is not None:
            self.image_set = TransferSet(len(split), task.info.image_size, task.device)
            self.image_set.add(split.images, split.labels)
            self.split = None

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Returns up to 64 training images, to be shown in the log."""
        images, labels = next(self.batches(min(64, self.images_total), seed=0))
        return ImageBatch(images, labels)

    def batches(self, batch_size: int, *, seed: int, rank: int = 0, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of endless shuffled epochs.

        If images are decoded when they are needed, the incomplete batch at the end of an epoch is skipped.
        """
        if self.image_set:
            return self.image_set.batches(batch_size, self.task.random_view, seed=seed, rank=rank, count=count)
        return self._decoded(batch_size, seed, rank, count)

    def _decoded(self, batch_size: int, seed: int, rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        if batch_size > len(self.split):
            raise UserError(
                f"--batch_size {batch_size} is more than the {len(self.split)} training images; give a smaller --batch_size"
            )
        generator, whole = torch.Generator().manual_seed(seed), len(self.split) // batch_size * batch_size
        while True:
            order = torch.randperm(len(self.split), generator=generator)[:whole].view(-1, batch_size)
            for images, labels in self.split.batches(batch_size // count, order[:, rank::count].flatten()):
                yield self.task.random_view(images), labels


class KDObjective(KLDistillation):
    """Student loss: KL at temperature T plus ``ce`` times the cross-entropy to the real labels."""

    def __init__(self, temperature: float, ce: float):
        super().__init__(temperature)
        self.ce = ce

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """Named scalar losses of two outputs with logits (B, C) and labels (B,)."""
        losses = super().forward(teacher_out, student_out, labels)
        if self.ce:
            losses["ce"] = F.cross_entropy(student_out.logits.float(), labels)
            losses["loss"] = losses["loss"] + self.ce * losses["ce"]
        return losses


class KD(Method):
    """Method with stage distill only, on real images."""

    Config = KDConfig
    streams = True
    reads_train_split = True
    external_prior = "real training images"

    def synthesizer(self) -> RealImages:
        return RealImages(self.task)

    def objective(self) -> KDObjective:
        return KDObjective(self.config.T, self.config.ce)
