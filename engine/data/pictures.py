"""Reads image files, and draws grids of images for people to look at."""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from engine.data.image_bank import to_uint8
from engine.runtime.errors import UserError
from engine.runtime.processes import is_main

# Image files in folders, read as uint8 tensors.


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
MOST_PIXELS = 2**26  # largest image file; decoded and converted, it takes half a GB
LONGEST = 8  # largest ratio of the longer to the shorter side; longer images lose their ends before they are resized


def is_image(name: str) -> bool:
    """Whether a file with this name counts as an image; hidden files do not."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def image_files(folder: Path | str) -> list[str]:
    """Every image file below ``folder``, in a fixed order."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        found += [os.path.join(parent, file) for file in sorted(files) if is_image(file)]
    return found


def read_picture(path: str | Path) -> Tensor:
    """Reads an image file in its own size, as (3, H, W) uint8 RGB; of a very long image only the middle.

    Raises:
        UserError: the file is missing, damaged or too large.
    """
    return torch.from_numpy(np.array(_open_rgb(path))).permute(2, 0, 1).contiguous()


def _open_rgb(path: str | Path) -> Image.Image:
    """Decodes an image file to RGB and cuts it to at most ``LONGEST`` times its shorter side."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise UserError(f"image {path} has {width} x {height} pixels, at most {MOST_PIXELS} wanted; make it smaller")
            most = LONGEST * min(width, height)
            if max(width, height) > most:
                left, top = max(0, width - most) // 2, max(0, height - most) // 2
                image = image.crop((left, top, left + min(width, most), top + min(height, most)))
            return _eight_bits(image, path).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be decoded: {error}; replace or remove it") from None


def _eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """Scales grey images of 16 bits to 8; Pillow would clip them to white."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
        raise UserError(f"image {path} has {levels.dtype} pixels, 8 or 16 bits wanted; convert it")
    return Image.fromarray((levels / 257).round().astype(np.uint8))


def decode_image(path: str | Path, size: int, crop_fraction: float = 1.0) -> Tensor:
    """Decodes an image file to (size, size, 3) uint8 RGB.

    The shorter side is resized to size / crop_fraction (bilinear, antialiased), and the centre is cropped.

    Raises:
        UserError: the file is missing, damaged or too large.
    """
    image = _open_rgb(path)
    width, height = image.size
    scale = max(size, round(size / crop_fraction)) / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))


def read_images(files: list[str], image_size: int) -> Tensor:
    """Reads image files as (N, 3, H, W) uint8, each by ``decode_image``.

    Raises:
        UserError: a file cannot be read.
    """
    images = torch.empty(len(files), image_size, image_size, 3, dtype=torch.uint8)
    for row, file in zip(images, tqdm(files, "read images", unit="img", delay=2)):
        row.copy_(decode_image(file, image_size))
    return images.permute(0, 3, 1, 2).contiguous()


def warn_of_cropping(what: str, size: int, images: np.ndarray | list[str]) -> None:
    """Prints one line if images are not square; of image files, an evenly spaced sample of fewer than 64 is checked."""
    if isinstance(images, np.ndarray):
        shapes = [(images.shape[2], images.shape[1])]
    else:
        shapes = [shape for file in images[:: max(1, len(images) // 32)] if (shape := _image_size(file))]
    wide = next((shape for shape in shapes if shape[0] != shape[1]), None)
    if wide and is_main():
        tqdm.write(
            f"{what}: images are not square (one has {wide[0]} x {wide[1]} px); each is resized to {size} px on its shorter "
            "side and cropped at the center"
        )


def _image_size(file: str) -> tuple[int, int] | None:
    """(width, height) from the header of an image file; None if it cannot be read (decoding then reports the error)."""
    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError):
        return None


def class_files(
    folder: Path | str, class_names: tuple[str, ...] = (), names_first: bool = False
) -> tuple[list[str], Tensor]:
    """Image files in class folders, and their labels (N,).

    If all folder names are numbers, each number is the label; a class without a folder leaves its label unused. Other names
    are looked up in ``class_names``. If ``class_names`` is empty, the folders are numbered in alphabetical order.

    Args:
        names_first: whether numbers that are all in ``class_names`` are names of classes, not labels.

    Raises:
        UserError: there is no class folder or no image, or a folder is no class.
    """
    entries = list(Path(folder).iterdir()) if Path(folder).is_dir() else []
    folders = [f for f in entries if f.is_dir() and not f.name.startswith(".")]
    names = [f.name for f in folders]
    are_names = set(names) <= set(class_names)
    if all(name.isdecimal() for name in names) and not (names_first and are_names):
        if large := [name for name in names if int(name) >= 2**31]:
            raise UserError(f"{folder} has a folder '{large[0]}', a class number below 2^31 or a class name wanted")
        labels = {name: int(name) for name in names}
    elif are_names:
        labels = {name: class_names.index(name) for name in names}
    elif class_names:
        stranger = min(set(names) - set(class_names))
        known = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
        raise UserError(f"{folder} has a folder '{stranger}', which is not a class; class numbers or names wanted: {known}")
    else:
        labels = {name: label for label, name in enumerate(sorted(names))}
    found = [(file, labels[f.name]) for f in sorted(folders, key=lambda f: labels[f.name]) for file in image_files(f)]
    if not found:
        raise UserError(f"{folder} has no class folders with images, {folder}/<class>/<name>.png wanted")
    return [file for file, _ in found], torch.tensor([label for _, label in found])


SHOWN = 64  # px; smaller images are enlarged to about this size
LINE = 13  # height of a line of text in px


def enlarge(images: Tensor) -> Tensor:
    """Enlarges small images (N, 3, H, W) uint8 by a whole factor to about ``SHOWN`` px, without smoothing."""
    factor = max(1, SHOWN // images.shape[-1])
    return F.interpolate(images, scale_factor=factor, mode="nearest") if factor > 1 else images


def grid(
    images: Tensor, columns: int = 16, padding: int = 2, labels: Tensor | None = None, names: Sequence[str] | None = None
) -> Tensor:
    """Draws images in a grid, on white.

    Args:
        images: batch of shape (N, 3, H, W), N >= 1, uint8 or float in [0, 1].
        labels: class ids (N,), negative for an image without a class.
        names: class names; if ``labels`` are given too, each image has its class name below it.
    Returns:
        (3, H', W') uint8.
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
    """Cuts a text to at most ``width`` px, on one line; a text that was cut ends in a period."""
    text = " ".join(text.split())[: width + 1]  # a character is at least one px wide
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + ".") > width:
        text = text[:-1]
    return text + "."


def variants_grid(sources: Tensor, variants: Tensor, cosines: Tensor, keep: Tensor) -> Tensor:
    """Draws sources in a row and their variants below, each with its cosine and a green (kept) or red (dropped) frame.

    Args:
        sources: source images (N, 3, H, W) uint8.
        variants: V variants of each source, (V, N, 3, H, W) uint8.
        cosines: cosine of each variant, (V, N).
        keep: whether each variant is kept, (V, N) bool.
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
