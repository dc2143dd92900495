"""Image grids for people."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from engine.data.bank import to_uint8

SHOWN = 64  # px an image is enlarged to, if it is smaller
LINE = 13  # px of a line of text


def enlarge(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8, small images enlarged by a whole factor to about ``SHOWN`` px without smoothing."""
    factor = max(1, SHOWN // images.shape[-1])
    return F.interpolate(images, scale_factor=factor, mode="nearest") if factor > 1 else images


def grid(
    images: Tensor, columns: int = 16, padding: int = 2, labels: Tensor | None = None, names: Sequence[str] | None = None
) -> Tensor:
    """Images (N, 3, H, W) uint8, or float in [0, 1], N >= 1 -> one image (3, H', W') uint8 on white.

    Args:
        labels: (N,) class ids, negative where there is none; names: of the classes. With both, each image has its name below.
    """
    if images.is_floating_point():
        images = to_uint8(images)
    images = enlarge(images.cpu())
    named = names is not None and labels is not None
    height, width = images.shape[2] + padding + (LINE if named else 0), images.shape[3] + padding
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * width + padding, -(-len(images) // columns) * height + padding), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = padding + i % columns * width, padding + i // columns * height
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (x, y))
        if named and labels[i] >= 0:
            text = shortened(draw, names[int(labels[i])], width - padding)
            draw.text((x, y + images.shape[2]), text, fill="black")
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1)


def shortened(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """As much of a text as is at most ``width`` px wide; what is cut off ends in a point."""
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + ".") > width:
        text = text[:-1]
    return text + "."


def variants_grid(sources: Tensor, variants: Tensor, cosines: Tensor, keep: Tensor) -> Tensor:
    """Sources in the first row, their variants below, each with its cosine and a green (kept) or red (dropped) frame.

    Args:
        sources: (N, 3, H, W) uint8.
        variants: (V, N, 3, H, W) uint8; cosines, keep: (V, N).
    Returns:
        (3, H', W') uint8.
    """
    size, gap, text = enlarge(sources[:1]).shape[-1], 6, LINE
    cell = size + gap
    sheet = Image.new("RGB", (cell * len(sources) + gap, cell + len(variants) * (cell + text) + gap), "white")
    draw = ImageDraw.Draw(sheet)

    def paste(image: Tensor, x: int, y: int) -> None:
        sheet.paste(Image.fromarray(enlarge(image[None])[0].permute(1, 2, 0).numpy()), (x, y))

    for i, source in enumerate(sources):
        x = gap + i * cell
        paste(source, x, gap)
        for k in range(len(variants)):
            y = gap + cell + k * (cell + text)
            color = "#1a9641" if keep[k, i] else "#d7191c"
            draw.rectangle((x - 2, y - 2, x + size + 1, y + size + 1), fill=color)
            paste(variants[k, i], x, y)
            draw.text((x + 1, y + size + 1), f"{cosines[k, i]:.2f}{'' if keep[k, i] else ' x'}", fill=color)
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1)
