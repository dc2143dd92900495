"""Random crop, flip and mixing of whole batches: drawn per image, differentiable, without host synchronisation."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.runtime.processes import position_seed


def crop_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """Flips each image with probability 1/2, pads it with zeros, and crops it at a random position.

    The zeros are black in image space [0, 1], so augment before the model's wrapper normalizes. Runs on the device of
    ``images`` and keeps their memory format. A generator on the CPU gives the same random numbers on every device.

    Args:
        images: batch of shape (B, C, H, W), float or uint8; differentiable for float images.
        padding: zero pixels added on each side; also the largest shift.
        flip: whether to flip images left to right.
        generator: source of the random numbers; None: the global generator of the images' device.
    Returns:
        (B, C, H, W), same dtype; ``images`` itself if ``padding`` is 0 and ``flip`` is False.
    """
    if not padding and not flip:
        return images
    device = images.device if generator is None else generator.device
    shape = (len(images),)
    rows, columns = torch.randint(0, 2 * padding + 1, (2, *shape), generator=generator, device=device).to(images.device)
    mirror = torch.randint(0, 2, shape, generator=generator, device=device).to(images.device, torch.bool) if flip else None
    return flip_shift(images, rows, columns, mirror, padding)


def flip_shift(images: Tensor, rows: Tensor, columns: Tensor, mirror: Tensor | None, padding: int) -> Tensor:
    """Deterministic part of ``crop_flip``: flips, pads with zeros, and crops at the given corners.

    Args:
        images: batch of shape (B, C, H, W).
        rows, columns: top left corner of each crop in the padded image, (B,) int64 in 0..2*padding.
        mirror: images to flip, (B,) bool; None: no image.
        padding: zero pixels on each side.
    Returns:
        (B, C, H, W).
    """
    return _FlipShift.apply(images, rows, columns, mirror, padding)


class _FlipShift(torch.autograd.Function):
    """``flip_shift`` with its own gradient: the opposite shift and the same flip, computed by the forward kernel.

    Autograd's own backward pass is a scatter. It takes twice the time on channels_last batches (one CPU core) and needs
    atomic adds on GPUs.
    """

    @staticmethod
    def forward(ctx, images, rows, columns, mirror, padding):
        ctx.save_for_backward(rows, columns, mirror)
        ctx.padding = padding
        return _flip_shift(images, rows, columns, mirror, padding)

    @staticmethod
    def backward(ctx, gradient):
        rows, columns, mirror = ctx.saved_tensors
        opposite = 2 * ctx.padding - columns
        if mirror is not None:  # the kernel flips first, the inverse must flip last; swapping the two negates the shift
            opposite = torch.where(mirror, columns, opposite)
        return _FlipShift.apply(gradient, 2 * ctx.padding - rows, opposite, mirror, ctx.padding), None, None, None, None


def _flip_shift(images: Tensor, rows: Tensor, columns: Tensor, mirror: Tensor | None, padding: int) -> Tensor:
    """Flips and crops by copying whole image rows, contiguous in both memory formats (W*C values, or W)."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    pixels = images.permute(0, 2, 3, 1).unsqueeze(1) if channels_last else images.unsqueeze(-1)
    batch, planes, height, width, depth = pixels.shape  # (B, 1, H, W, C) or (B, C, H, W, 1)

    padded = F.pad(pixels, (0, 0, *[padding] * 4)) if mirror is None else _pad_mirrored(pixels, mirror, padding)
    padded_height, padded_width = height + 2 * padding, width + 2 * padding
    # One overlapping row of W pixels begins at every pixel of the padded batch.
    windows = padded.as_strided((batch * planes * padded_height * padded_width - width + 1, width * depth), (depth, 1))
    plane = torch.arange(batch * planes, device=images.device).view(batch, planes, 1)
    row = plane * padded_height + rows.view(-1, 1, 1) + torch.arange(height, device=images.device)
    starts = row * padded_width + columns.view(-1, 1, 1)

    cropped = windows.index_select(0, starts.flatten()).view(batch, planes, height, width, depth)
    return cropped.squeeze(1).permute(0, 3, 1, 2) if channels_last else cropped.squeeze(-1)


def _pad_mirrored(pixels: Tensor, mirror: Tensor, padding: int) -> Tensor:
    """Pads (B, R, H, W, K) to (B, R, H+2p, W+2p, K), and flips the images left to right where ``mirror`` (B,) is True."""
    batch, planes, height, width, depth = pixels.shape
    padded = pixels.new_zeros(batch, planes, height + 2 * padding, width + 2 * padding, depth)
    inside = padded[:, :, padding : padding + height, padding : padding + width]
    choice, flipped = mirror.view(-1, 1, 1, 1, 1), pixels.flip(3)
    if pixels.is_floating_point():  # lerp is exact at weights 0 and 1, and three times as fast as where() on CPUs
        torch.lerp(pixels, flipped, choice.to(pixels.dtype), out=inside)
    else:
        torch.where(choice, flipped, pixels, out=inside)
    return padded


def resized_crop_flip(images: Tensor, flip: bool, scale: float = 0.08, ratio: float = 3 / 4, attempts: int = 10) -> Tensor:
    """Random resized crop of each image, flipped with probability 1/2 (Szegedy et al. 2014, 1409.4842).

    Boxes are drawn as in torchvision's ``RandomResizedCrop``, without rounding to pixels: uniform area, log-uniform aspect
    ratio. A box that does not fit into the image is drawn again. No box is larger than the image, so resizing cannot alias.

    Args:
        images: batch of shape (B, C, H, W), float in [0, 1] or uint8.
        flip: whether to flip images left to right.
        scale: smallest area of a box, as a share of the image.
        ratio: smallest ratio of width to height, relative to the image's; the largest is its inverse.
        attempts: number of boxes drawn for each image; if none fits, the whole image is used.
    Returns:
        (B, C, H, W), same dtype and memory format.
    """
    count, device = len(images), images.device
    area = scale + (1 - scale) * torch.rand(attempts, count, device=device)
    aspect = ((2 * torch.rand(attempts, count, device=device) - 1) * math.log(ratio)).exp()
    height, width = (area / aspect).sqrt(), (area * aspect).sqrt()
    fits = (height <= 1) & (width <= 1)
    drawn = fits.int().argmax(0, keepdim=True)
    whole = ~fits.any(0)
    height, width = (torch.where(whole, 1.0, side.gather(0, drawn)[0]) for side in (height, width))
    top, left, mirror = torch.rand(3, count, device=device)
    sign = torch.where((mirror < 0.5) & flip, -1.0, 1.0)
    return resized_boxes(images, top * (1 - height), left * (1 - width), height, width, sign)


def resized_boxes(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, sign: Tensor) -> Tensor:
    """Deterministic part of ``resized_crop_flip``: resizes one box of each image by bicubic interpolation.

    Args:
        images: batch of shape (B, C, H, W), float in [0, 1] or uint8.
        top, left, height, width: the boxes, each (B,), as shares of the image's sides.
        sign: (B,), -1 for images to flip, else 1.
    """
    zero = torch.zeros_like(top)
    across = torch.stack([sign * width, zero, 2 * left + width - 1], 1)
    down = torch.stack([zero, height, 2 * top + height - 1], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
    white = 255 if images.dtype == torch.uint8 else 1
    values = F.grid_sample(images.float(), grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, white)
    return values.round_().to(images.dtype) if images.dtype == torch.uint8 else values.to(images.dtype)


# Views: the crops of a zero-padded image, flipped or not, that a student sees. They form a finite, numbered set.
#
# An image and a view together have a key, ``image * count + number``. The seed of a round determines its views, which are
# drawn on the host for all steps at once. Everything that is computed from a key runs on the device.


@dataclass(frozen=True)
class Views:
    """All shifts by up to ``padding`` px, and with ``flip`` their mirror images. Calling it draws one view for each image.

    Args:
        padding: zero pixels on each side; also the largest shift.
        flip: whether flipped images are views too.
    """

    padding: int
    flip: bool

    @property
    def count(self) -> int:
        return (2 * self.padding + 1) ** 2 * (1 + self.flip)

    def __call__(self, images: Tensor) -> Tensor:
        """Returns images (B, 3, H, W) in views drawn from the global random stream; differentiable."""
        return crop_flip(images, self.padding, self.flip)

    def show(self, images: Tensor, number: Tensor) -> Tensor:
        """Returns images (B, 3, H, W), float or uint8, in the views with these numbers (B,), each in 0 .. count - 1."""
        if self.count == 1:
            return images
        mirror = number % 2 == 1 if self.flip else None
        corner = number // (1 + self.flip)
        side = 2 * self.padding + 1
        return flip_shift(images, corner // side, corner % side, mirror, self.padding)


class KeyedViews:
    """The views of a set of images, addressed by key.

    Args:
        views: possible views of an image.
        images: number of images that the set will have in the end.
        few: number of views for each image, drawn once by its position in the set (a view may be drawn twice); None: all.
        seed: seed of that draw.
        device: device of the keys.
    """

    def __init__(self, views: Views, images: int, few: int | None = None, seed: int = 0, device: torch.device | str = "cpu"):
        self.views, self.images, self.device = views, images, device
        self.few = few if few and few < views.count else None
        self.count = self.few or views.count
        if self.few:
            generator = torch.Generator().manual_seed(position_seed(seed, "views"))
            self.chosen = torch.randint(views.count, (images * self.few,), generator=generator, dtype=torch.int32).to(device)

    def __len__(self) -> int:
        """Number of keys."""
        return self.images * self.count

    def draw(self, index: Tensor, seed: int) -> Tensor:
        """Keys of random views of the images at the positions ``index``, with the shape of ``index``, on the device."""
        generator = torch.Generator().manual_seed(position_seed(seed, "views"))
        number = torch.randint(self.count, index.shape, generator=generator)
        return index.to(self.device) * self.count + number.to(self.device)

    def show(self, images: Tensor, keys: Tensor) -> Tensor:
        """Returns images (B, 3, H, W) in the views of their keys (B,)."""
        return self.views.show(images, self.chosen[keys] if self.few else keys % self.count)


def mixed(images: Tensor, kind: str) -> Tensor:
    """Mixes each image with another one of the batch; the share is uniform and drawn for each image.

    Labels are not mixed, because the teacher is run on the mixed images.

    Args:
        images: (B, 3, H, W), uint8 or float.
        kind: "mixup" blends pixels (Zhang et al. 2017, arXiv 1710.09412), "cutmix" pastes a box (Yun et al. 2019, arXiv
            1905.04899).
    """
    count, device = len(images), images.device
    others = images[torch.randperm(count, device=device)]
    share, middle_y, middle_x = torch.rand(3, count, 1, 1, 1, device=device)
    if kind == "mixup":
        blend = images.float().lerp(others.float(), share)
        return blend.round_().to(images.dtype) if images.dtype == torch.uint8 else blend
    half = share.sqrt() / 2
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in images.shape[2:])
    inside = ((y[:, None] - middle_y).abs() < half) & ((x - middle_x).abs() < half)
    return torch.where(inside, others, images)
