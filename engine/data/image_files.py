"""Image files in folders, as uint8 tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.runtime.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_files(folder: Path) -> list[Path]:
    """Every image file below a folder, in a fixed order.

    Raises:
        UserError: there is none.
    """
    files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}); give a folder that does")
    return files


def read_images(files: list[Path], image_size: int) -> Tensor:
    """Image files, resized to squares, as (N, 3, H, W) uint8.

    Raises:
        UserError: one cannot be read.
    """
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)
    for row, file in zip(images, tqdm(files, "read images", unit="img", delay=2)):
        try:
            with Image.open(file) as picture:
                picture = picture.convert("RGB")
                if picture.size != (image_size, image_size):
                    picture = picture.resize((image_size, image_size), Image.Resampling.BICUBIC)
                row[:] = np.asarray(picture)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as an image ({error}); remove it and try again") from None
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def class_files(folder: Path) -> tuple[list[Path], Tensor]:
    """The files and labels (N,) in class folders, sorted by number where all names are numbers ("2" before "10").

    Where names are numbers they are the labels themselves, so that a class without images leaves its label free.

    Raises:
        UserError: no class folder, or no image in any.
    """
    folders = [f for f in Path(folder).iterdir() if f.is_dir()] if Path(folder).is_dir() else []
    numbers = all(f.name.isdecimal() for f in folders)
    folders.sort(key=lambda f: int(f.name) if numbers else f.name)
    found = [
        (file, int(f.name) if numbers else label)
        for label, f in enumerate(folders)
        for file in sorted(f.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise UserError(f"{folder} has no class folders with images; wanted {folder}/<class>/<name>.png")
    return [file for file, _ in found], torch.tensor([label for _, label in found])
