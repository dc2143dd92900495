"""Noise: distillation on images that have nothing to do with the task. The control at the lower end of the tables.

``--images`` takes any tree of unrelated pictures, or another dataset's NAME.npz, of which it reads ``x_train``. Without it
every batch is fresh noise, each value of each pixel uniform in [0, 1] or normal (mean 1/2, standard deviation 1/4, clamped).
The teacher's answers are all that is learnt from.

    student     KL_T

To noise a teacher gives one and the same answer, since its BatchNorm layers expect images. With ``--bn_mode batch`` they
normalize by the batch they see, so that the answers spread over the classes; the student is evaluated as ever.

A method that does not beat this has not found anything out about the training data. Unrelated pictures are no weak control:
what they lack is the classes, not the look of images (see Beyer et al. 2022, arXiv 2106.05237, on out-of-domain transfer).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from datafree.base import ImageBatch, Method, Synthesizer, Task
from datafree.losses import KLDistillation, normalizing_by_batch
from datafree.stream import unlabelled
from engine.data.pictures import SUFFIXES, decode_image, image_files, read_images, tell_of_cropping
from engine.data.readers import read_npz_images
from engine.data.splits import resized
from engine.data.transfer_set import TransferSet
from engine.runtime.errors import UserError
from engine.runtime.flags import flag

DISTILL = ("distill",)


@dataclass(frozen=True)
class NoiseConfig:
    """Flags of the noise control."""

    images: str | None = flag(
        None, "folder of unrelated pictures, to any depth, or NAME.npz of another dataset; unset: noise", affects=DISTILL
    )
    noise: str = flag(
        "uniform", "distribution of the pixels where no folder is given", choices=("uniform", "normal"), affects=DISTILL
    )
    bn_mode: str = flag(
        "running",
        "by which statistics the teacher normalizes what the student learns from: its running ones, or the batch's own",
        choices=("running", "batch"),
        affects=DISTILL,
    )
    T: float = flag(20.0, "temperature of the distillation loss", affects=DISTILL, above=0)


class NoiseImages(Synthesizer):
    """Fresh noise at every step."""

    def __init__(self, task: Task, noise: str):
        self.task, self.noise = task, noise

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Some images to look at."""
        return ImageBatch(*next(self.batches(64, seed=0)))

    def batches(self, batch_size: int, *, seed: int, rank: int = 0, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of independent pixels."""
        shape = (batch_size // count, 3, self.task.info.image_size, self.task.info.image_size)
        while True:
            if self.noise == "uniform":
                images = torch.rand(shape, device=self.task.device)
            else:
                images = torch.randn(shape, device=self.task.device).mul_(0.25).add_(0.5).clamp_(0, 1)
            yield images.contiguous(memory_format=torch.channels_last), unlabelled(images)


def pictures_in(folder: str) -> list[str]:
    """The image files below the folder of --images.

    Raises:
        UserError: there are none.
    """
    files = image_files(folder)
    if not files:
        raise UserError(f"--images {folder} holds no images ({', '.join(SUFFIXES)}); give a folder that does")
    return files


def read_pictures(source: str, size: int) -> Tensor:
    """(N, 3, size, size) uint8 of the folder or archive of --images.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    if is_archive(source):
        arrays = read_npz_images(Path(source))
        tell_of_cropping(f"--images {source}", size, arrays)
        return resized(arrays, size).permute(0, 3, 1, 2).contiguous()
    files = pictures_in(source)
    tell_of_cropping(f"--images {source}", size, files)
    return read_images(files, size)


def is_archive(source: str) -> bool:
    """Whether --images names a file of arrays."""
    return source.endswith(".npz")


class UnrelatedImages(NoiseImages):
    """Shuffled passes over unrelated pictures, cropped and flipped."""

    def __init__(self, task: Task, source: str):
        self.task = task
        images = read_pictures(source, task.info.image_size)
        self.pictures = TransferSet(len(images), task.info.image_size, task.device)
        self.pictures.add(images, torch.full((len(images),), -1))
        self.images_total = len(images)

    def batches(self, batch_size: int, **share: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``TransferSet.batches``, labels -1."""
        return self.pictures.batches(batch_size, self.task.random_view, **share)


class Noise(Method):
    """Stage distill, on noise or unrelated images."""

    Config = NoiseConfig
    streams = True

    def __init__(self, config: NoiseConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if config.images:
            self.external_prior = f"images of {Path(config.images).resolve().name.removesuffix('.npz')}"

    def check_inputs(self, stages: Collection[str]) -> None:
        self.answering_teacher()  # raises where there is nothing to normalize
        source = self.config.images
        if source and "distill" in stages:
            if is_archive(source):
                read_npz_images(Path(source))
            else:
                decode_image(pictures_in(source)[0], self.task.info.image_size)

    def answering_teacher(self) -> nn.Module:
        return normalizing_by_batch(self.teacher) if self.config.bn_mode == "batch" else self.teacher

    def synthesizer(self) -> NoiseImages:
        config = self.config
        return UnrelatedImages(self.task, config.images) if config.images else NoiseImages(self.task, config.noise)

    def objective(self) -> KLDistillation:
        return KLDistillation(self.config.T)
