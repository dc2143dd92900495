"""One image: distillation on crops of a single picture, a control (Asano & Saeed 2021, arXiv 2112.00725).

Every batch is drawn afresh from one large picture: a box of random place, size and aspect, turned, sheared, mirrored, its
colours jittered. The teacher's answers to these crops are all that is learnt from.

    student     KL_T

Strong and often left out: a method that inverts its teacher should beat what one photograph does. The richer the picture in
different things, the better; scikit-learn brings two small ones (``sklearn/datasets/images``).

Draws are the published script's for CIFAR: area 1/500 to 1 of a square with half the picture's shorter side, aspect 3/4 to
4/3, turned by up to 30 degrees, sheared by up to 30, of which the middle (1 / sqrt 2 of each side) is kept; with probability
1/2 brightness, contrast and saturation change by up to 40 %, the hue by up to 10 % of its circle; T 8.

Deviations. New crops at every step, where the script stores 50,000. One resampling from a pyramid of halved pictures does
crop, turn and shear at once, bilinearly. The hue is a turn in the YIQ plane, and the changes of colour have a fixed order.
Optimizer and lengths are those of the other controls; the script has Adam and 1000 epochs. Left out: mixing of the crops.
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
from engine.runtime.errors import UserError
from engine.runtime.flags import flag

DISTILL = ("distill",)
LARGEST = 0.5  # side of the largest box, of the picture's shorter side
LEAST_AREA = 1 / 500  # of that box
ASPECT = 4 / 3
ANGLE = math.radians(30)  # of turn and of shear, at most
KEPT = 1 / math.sqrt(2)  # of each side of a box
COLOURS, HUE = 0.4, 0.1
TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class OneImageConfig:
    """Flags of the one-image control."""

    image: str | None = flag(None, "file of the picture, large and full of different things", affects=DISTILL)
    T: float = flag(8.0, "temperature of the distillation loss", affects=DISTILL, above=0)


class Pyramid:
    """A picture and its halves, one below the other in one tensor, so that each crop reads from the size that fits it.

    Args:
        picture: (3, H, W) float32 in [0, 1].
        size: of the crops, in pixels; halving ends before a side is shorter.
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
        """Crops (B, 3, size, size); what lies beyond the picture repeats its edge.

        Args:
            centre: (B, 2), x and y in pixels of the picture.
            axes: (B, 2, 2), columns the half sides of a crop, across and down, as (x, y) in pixels of the picture.
        """
        across = (torch.arange(self.size, device=centre.device) + 0.5) * (2 / self.size) - 1
        corners = torch.stack(torch.meshgrid(across, across, indexing="xy"), -1)  # (size, size, 2), x and y
        x, y = (centre[:, None, None] + torch.einsum("bij,hwj->bhwi", axes, corners)).unbind(-1)
        shrunk = 2 * axes.norm(dim=1).amax(1) / self.size  # pixels of the picture a pixel of the crop
        level = shrunk.log2().round().clamp(0, len(self.heights) - 1).long()
        height, width, top = (values[level][:, None, None] for values in (self.heights, self.widths, self.tops))
        x = torch.minimum((x * width / self.width).clamp(min=0.5), width - 0.5)
        y = torch.minimum((y * height / self.height).clamp(min=0.5), height - 0.5) + top
        grid = torch.stack([2 * x / self.width - 1, 2 * y / self.pixels.shape[1] - 1], -1)
        rows = grid.view(1, -1, self.size, 2)  # all crops as one, from one picture
        crops = F.grid_sample(self.pixels[None], rows, mode="bilinear", padding_mode="border", align_corners=False)
        return crops.view(3, len(centre), self.size, self.size).transpose(0, 1)


def random_crops(pyramid: Pyramid, count: int) -> Tensor:
    """(count, 3, size, size) in [0, 1], drawn as the module's docstring says from the device's global random stream."""
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
    # Columns of turn @ shear: where the crop's x and y axes lie.
    axes = torch.stack([torch.stack([cos, shear * cos - sin], 1), torch.stack([sin, shear * sin + cos], 1)], 1)
    axes = axes * (KEPT / 2 * sides[:, None])
    axes = torch.stack([axes[..., 0] * mirror[:, None], axes[..., 1]], -1)
    return jittered(pyramid.sample(centre, axes), 1 + within(COLOURS), 1 + within(COLOURS), 1 + within(COLOURS), within(HUE))


def jittered(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], each with probability 1/2 as it is, else with its colours changed.

    Args:
        brightness, contrast, saturation: (B,), factors of the value, its distance from the mean, that from grey.
        hue: (B,), turn in the plane of colours, in circles.
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
    """Fresh crops at every step."""

    def __init__(self, task: Task, picture: Tensor):
        self.pyramid = Pyramid(picture.to(task.device).float() / 255, task.info.image_size)

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Some crops to look at."""
        return ImageBatch(*next(self.batches(64, seed=0)))

    def batches(self, batch_size: int, *, seed: int, rank: int = 0, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """New crops at every step."""
        while True:
            images = random_crops(self.pyramid, batch_size // count).contiguous(memory_format=torch.channels_last)
            yield images, unlabelled(images)


class OneImage(Method):
    """Stage distill, on crops of one picture."""

    Config = OneImageConfig
    streams = True

    def __init__(self, config: OneImageConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if not config.image:
            raise UserError("--image FILE is missing: the one picture to learn from, large and full of different things")
        self.external_prior = f"the image {Path(config.image).name}"

    def check_inputs(self, stages: Collection[str]) -> None:
        if "distill" in stages:
            self._picture()

    def _picture(self) -> Tensor:
        """(3, H, W) uint8."""
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
