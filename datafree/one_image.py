"""One image: distillation on crops of a single picture, a control (Asano & Saeed 2021, arXiv 2112.00725).

Every batch consists of new crops of one large picture. A crop is a box of random place, size and aspect ratio, which is
rotated, sheared, flipped and colour-jittered. The student learns from the teacher's outputs for these crops alone.

    student     KL_T

This control is strong and often left out. A method that inverts its teacher should be better than one photograph. The more
different objects the picture has, the better; scikit-learn comes with two small pictures (``sklearn/datasets/images``).

The random draws are those of the published script for CIFAR. The area of a box is 1/500 to 1 times that of a square with
half the picture's shorter side, its aspect ratio 3/4 to 4/3. The box is rotated by up to 30 degrees and sheared by up to 30
degrees, and its middle part (1 / sqrt 2 of each side) is kept. With probability 1/2 brightness, contrast and saturation
change by up to 40 %, and the hue by up to 10 % of its circle. T is 8.

Deviations:
- Crops are new at every step. The script stores 50,000 crops.
- Crop, rotation and shear are one bilinear resampling from a pyramid of halved pictures.
- The hue is changed by a rotation in the YIQ plane, and the colour changes have a fixed order.
- Optimizer and lengths are those of the other controls. The script uses Adam and 1000 epochs.

Left out: mixing of the crops.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import ImageBatch, Method, Synthesizer, Task
from datafree.losses import KLDistillation
from datafree.stream import unlabelled
from engine.data.pictures import read_picture
from engine.data.splits import sample_of
from engine.runtime.errors import UserError
from engine.runtime.flags import flag
from engine.runtime.tensors import digest

DISTILL = ("distill",)
LARGEST = 0.5  # side of the largest box, as a share of the picture's shorter side
LEAST_AREA = 1 / 500  # area of the smallest box, as a share of the largest box's
ASPECT = 4 / 3  # largest aspect ratio; its inverse is the smallest
ANGLE = math.radians(30)  # largest angle of rotation and of shear
KEPT = 1 / math.sqrt(2)  # share of each side of a box that is kept
COLOURS, HUE = 0.4, 0.1  # largest relative change of brightness, contrast and saturation; largest change of hue, in circles
TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class OneImageConfig:
    """Flags of the one-image control."""

    image: str | None = flag(
        None, "file of the one picture, required; best large and with many different objects", affects=DISTILL
    )
    T: float = flag(8.0, "temperature of the distillation loss", affects=DISTILL, above=0)


class Pyramid:
    """Image pyramid: a picture and its repeatedly halved copies, stacked vertically in one tensor.

    Each crop is sampled from the level whose resolution fits the crop's size.

    Args:
        picture: (3, H, W) float32 in [0, 1].
        size: side of the crops in pixels; halving ends before a side becomes shorter than this.
    """

    def __init__(self, picture: Tensor, size: int):
        levels = [picture]
        while min(levels[-1].shape[1:]) >= 2 * size:
            levels.append(F.avg_pool2d(levels[-1], 2))
        self.height, self.width = picture.shape[1:]
        self.size = size
        self.pixels = torch.cat([F.pad(level, (0, self.width - level.shape[2])) for level in levels], 1)
        shapes = torch.tensor([level.shape[1:] for level in levels], dtype=torch.float32, device=picture.device)
        self.heights, self.widths = shapes.T
        self.tops = self.heights.cumsum(0) - self.heights

    def sample(self, centre: Tensor, axes: Tensor) -> Tensor:
        """Samples crops (B, 3, size, size); beyond the picture its edge is repeated.

        Args:
            centre: centres of the crops (B, 2), x and y in pixels of the picture.
            axes: (B, 2, 2); the columns are a crop's half sides, across and down, as (x, y) in pixels of the picture.
        """
        across = (torch.arange(self.size, device=centre.device) + 0.5) * (2 / self.size) - 1
        corners = torch.stack(torch.meshgrid(across, across, indexing="xy"), -1)  # (size, size, 2), x and y
        x, y = (centre[:, None, None] + torch.einsum("bij,hwj->bhwi", axes, corners)).unbind(-1)
        shrunk = 2 * axes.norm(dim=1).amax(1) / self.size  # pixels of the picture per pixel of the crop
        level = shrunk.log2().round().clamp(0, len(self.heights) - 1).long()
        height, width, top = (values[level][:, None, None] for values in (self.heights, self.widths, self.tops))
        x = torch.minimum((x * width / self.width).clamp(min=0.5), width - 0.5)
        y = torch.minimum((y * height / self.height).clamp(min=0.5), height - 0.5) + top
        grid = torch.stack([2 * x / self.width - 1, 2 * y / self.pixels.shape[1] - 1], -1)
        rows = grid.view(1, -1, self.size, 2)  # all crops as one image, so that grid_sample needs the pyramid once
        crops = F.grid_sample(self.pixels[None], rows, mode="bilinear", padding_mode="border", align_corners=False)
        return crops.view(3, len(centre), self.size, self.size).transpose(0, 1)


def random_crops(pyramid: Pyramid, count: int) -> Tensor:
    """Draws crops (count, 3, size, size) in [0, 1], as the module's docstring describes.

    Random numbers come from the device's global random stream.
    """
    device = pyramid.pixels.device

    def within(bound: float) -> Tensor:
        return (2 * torch.rand(count, device=device) - 1) * bound

    largest = (LARGEST * min(pyramid.height, pyramid.width)) ** 2
    area = largest * (LEAST_AREA + (1 - LEAST_AREA) * torch.rand(count, device=device))
    aspect = within(math.log(ASPECT)).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1)  # width, height
    free = torch.tensor([pyramid.width, pyramid.height], device=device) - sides
    centre = sides / 2 + free.clamp(min=0) * torch.rand(count, 2, device=device)
    turn, shear = within(ANGLE), within(ANGLE).tan()
    mirror = torch.where(torch.rand(count, device=device) < 0.5, -1.0, 1.0)
    cos, sin = turn.cos(), turn.sin()
    # Columns of turn @ shear: directions of the crop's x and y axes in the picture.
    axes = torch.stack([torch.stack([cos, shear * cos - sin], 1), torch.stack([sin, shear * sin + cos], 1)], 1)
    axes = axes * (KEPT / 2 * sides[:, None])
    axes = torch.stack([axes[..., 0] * mirror[:, None], axes[..., 1]], -1)
    return jittered(pyramid.sample(centre, axes), 1 + within(COLOURS), 1 + within(COLOURS), 1 + within(COLOURS), within(HUE))


def jittered(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Changes the colours of each image with probability 1/2.

    Args:
        images: (B, 3, H, W) in [0, 1].
        brightness, contrast, saturation: factors (B,) of the values, of their distance from the mean, and of their distance
            from grey.
        hue: rotation (B,) in the plane of colours, in circles.
    Returns:
        (B, 3, H, W) in [0, 1].
    """
    yiq = torch.tensor(TO_YIQ, device=images.device)
    y, i, q = torch.einsum("cd,bdhw->bchw", yiq, images * brightness.view(-1, 1, 1, 1)).unbind(1)
    mean = y.mean((1, 2), keepdim=True)
    cos, sin = ((2 * math.pi * hue).cos(), (2 * math.pi * hue).sin())
    factor = [value.view(-1, 1, 1) for value in (contrast, contrast * saturation * cos, contrast * saturation * sin)]
    turned = torch.stack([mean + factor[0] * (y - mean), factor[1] * i - factor[2] * q, factor[2] * i + factor[1] * q], 1)
    changed = torch.einsum("cd,bdhw->bchw", torch.linalg.inv(yiq), turned).clamp(0, 1)
    keep = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(keep, images, changed)


class OneImageCrops(Synthesizer):
    """Streams fresh crops at every step."""

    def __init__(self, task: Task, picture: Tensor):
        self.pyramid = Pyramid(picture.to(task.device).float() / 255, task.info.image_size)

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Returns 64 crops, to be shown in the log."""
        return ImageBatch(*next(self.batches(64, seed=0)))

    def batches(self, batch_size: int, *, seed: int, rank: int = 0, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of new crops, labels -1."""
        while True:
            images = random_crops(self.pyramid, batch_size // count).contiguous(memory_format=torch.channels_last)
            yield images, unlabelled(images)


class OneImage(Method):
    """Method with stage distill only, on crops of one picture."""

    Config = OneImageConfig
    streams = True

    def __init__(self, config: OneImageConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if not config.image:
            raise UserError(
                "--image is missing; give the path of the picture to learn from, a large one with many different objects"
            )
        self.external_prior = f"the image {Path(config.image).name}"

    def check_inputs(self, stages: Collection[str]) -> None:
        if "distill" in stages:
            self._picture()

    def input_digests(self) -> dict[str, str]:
        return {"image": digest(sample_of([self.config.image]))}

    def _picture(self) -> Tensor:
        """Reads the picture, (3, H, W) uint8."""
        picture, least = read_picture(self.config.image), 2 * self.task.info.image_size
        if min(picture.shape[1:]) < least:
            raise UserError(
                f"--image {self.config.image} has {picture.shape[2]} x {picture.shape[1]} pixels, at least {least} a side "
                "wanted; give a larger one"
            )
        return picture

    def synthesizer(self) -> OneImageCrops:
        return OneImageCrops(self.task, self._picture())

    def objective(self) -> KLDistillation:
        return KLDistillation(self.config.T)
