"""Noise: distillation on images that have nothing to do with the task. It is the control at the lower end of the tables.

``--images`` takes a folder of unrelated pictures, to any depth, or the NAME.npz of another dataset, whose ``x_train`` is
read. Without this flag every batch is fresh noise. Each channel of each pixel is uniform in [0, 1] or normal (mean 1/2,
standard deviation 1/4, clamped to [0, 1]). The student learns from the teacher's outputs alone.

    student     KL_T

A teacher predicts nearly the same for all noise images, because its BatchNorm layers expect the statistics of real images.
With ``--bn_mode batch`` they normalize by the statistics of the current batch, and the predictions spread over the classes.
The student is evaluated as usual.

A method that is not better than this control has extracted nothing about the training data. Unrelated pictures are a strong
control: they have the statistics of natural images and lack only the classes (see Beyer et al. 2022, arXiv 2106.05237, on
out-of-domain transfer).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from datafree.base import ImageBatch, Method, Synthesizer, Task
from datafree.losses import KLDistillation, normalizing_by_batch
from datafree.stream import unlabelled
from engine.data.datasets import DatasetInfo
from engine.data.pictures import SUFFIXES, decode_image, image_files, read_images, warn_of_cropping
from engine.data.readers import read_npz_images
from engine.data.splits import resized, sample_of
from engine.data.transfer_set import TransferSet
from engine.runtime.errors import UserError
from engine.runtime.flags import flag
from engine.runtime.tensors import digest

DISTILL = ("distill",)


@dataclass(frozen=True)
class NoiseConfig:
    """Flags of the noise control."""

    images: str | None = flag(
        None,
        "folder of unrelated pictures, subfolders included, or NAME.npz of another dataset; unset: noise",
        affects=DISTILL,
    )
    noise: str = flag(
        "uniform", "without --images: distribution of the pixels", choices=("uniform", "normal"), affects=DISTILL
    )
    bn_mode: str = flag(
        "running",
        "statistics by which the teacher's BatchNorm layers normalize while the student is trained; running: the running "
        "statistics, batch: those of the current batch",
        choices=("running", "batch"),
        affects=DISTILL,
    )
    T: float = flag(20.0, "temperature of the distillation loss", affects=DISTILL, above=0)


class NoiseImages(Synthesizer):
    """Streams fresh noise at every step."""

    def __init__(self, task: Task, noise: str):
        self.task, self.noise = task, noise

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Returns 64 images, to be shown in the log."""
        return ImageBatch(*next(self.batches(64, seed=0)))

    def batches(self, batch_size: int, *, seed: int, rank: int = 0, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of images with independent pixels, labels -1."""
        shape = (batch_size // count, 3, self.task.info.image_size, self.task.info.image_size)
        while True:
            if self.noise == "uniform":
                images = torch.rand(shape, device=self.task.device)
            else:
                images = torch.randn(shape, device=self.task.device).mul_(0.25).add_(0.5).clamp_(0, 1)
            yield images.contiguous(memory_format=torch.channels_last), unlabelled(images)


def pictures_in(folder: str) -> list[str]:
    """Paths of the image files below the folder of --images.

    Raises:
        UserError: there are no image files.
    """
    files = image_files(folder)
    if not files:
        raise UserError(f"--images {folder} contains no images ({', '.join(SUFFIXES)}); give another folder")
    return files


def read_pictures(source: str, size: int) -> Tensor:
    """Reads the images (N, 3, size, size) uint8 of the folder or archive of --images.

    Raises:
        UserError: there are no images, or one cannot be read.
    """
    if is_archive(source):
        arrays = read_npz_images(Path(source))
        warn_of_cropping(f"--images {source}", size, arrays)
        return resized(arrays, size).permute(0, 3, 1, 2).contiguous()
    files = pictures_in(source)
    warn_of_cropping(f"--images {source}", size, files)
    return read_images(files, size)


def is_archive(source: str) -> bool:
    """Whether --images names a NAME.npz archive instead of a folder."""
    return source.endswith(".npz")


def require_unrelated(source: str, info: DatasetInfo) -> None:
    """Raises a UserError if --images has training images of the run's own dataset."""
    path, archive, train = Path(source), Path(info.data_root, info.archive), info.folder / "train"
    same = is_archive(source) and archive.is_file() and _lies_in(path, archive)
    if same or train.is_dir() and (_lies_in(path, train) or _lies_in(train, path)):
        raise UserError(
            f"--images {source} has training images of {info.name}, the dataset of this run; give unrelated images"
        )


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder, or a file or folder in it. Of two names of one file, each lies in the other."""
    path = path.resolve()
    return folder.exists() and any(part.exists() and part.samefile(folder) for part in (path, *path.parents))


class UnrelatedImages(NoiseImages):
    """Streams unrelated pictures in shuffled epochs, cropped and flipped."""

    def __init__(self, task: Task, source: str):
        self.task = task
        images = read_pictures(source, task.info.image_size)
        self.image_set = TransferSet(len(images), task.info.image_size, task.device)
        self.image_set.add(images, torch.full((len(images),), -1))
        self.images_total = len(images)

    def batches(self, batch_size: int, **share: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches as ``TransferSet.batches``, with labels -1."""
        return self.image_set.batches(batch_size, self.task.random_view, **share)


class Noise(Method):
    """Method with stage distill only, on noise or unrelated images."""

    Config = NoiseConfig
    streams = True

    def __init__(self, config: NoiseConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if config.images:
            self.external_prior = f"images of {Path(config.images).resolve().name.removesuffix('.npz')}"

    def check_inputs(self, stages: Collection[str]) -> None:
        self.distillation_teacher()  # raises if --bn_mode batch is given and the teacher has no BatchNorm layers
        source = self.config.images
        if source and "distill" in stages:
            require_unrelated(source, self.task.info)
            if is_archive(source):
                read_npz_images(Path(source))
            else:
                decode_image(pictures_in(source)[0], self.task.info.image_size)

    def input_digests(self) -> dict[str, str]:
        source = self.config.images
        if not source:
            return {}
        images = read_npz_images(Path(source)) if is_archive(source) else pictures_in(source)
        return {"images": digest(len(images), sample_of(images))}

    def distillation_teacher(self) -> nn.Module:
        return normalizing_by_batch(self.teacher) if self.config.bn_mode == "batch" else self.teacher

    def synthesizer(self) -> NoiseImages:
        config = self.config
        return UnrelatedImages(self.task, config.images) if config.images else NoiseImages(self.task, config.noise)

    def objective(self) -> KLDistillation:
        objective = KLDistillation(self.config.T)
        objective.caches_logits = self.config.bn_mode == "running"  # with "batch", logits depend on the whole batch
        return objective
