"""Which data a result depends on, in a few words that change when the data do.

The words stand in the fingerprint of every stage that depends on them, and in result.json: two runs on different images
are never taken for one, whatever their folders are called.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from engine.data.datasets import DatasetInfo
from engine.data.splits import read_split
from engine.runtime.errors import UserError
from engine.runtime.files import digest

SAMPLE = 256  # images of a split that are looked at, evenly spaced


def data_identity(info: DatasetInfo, *splits: str) -> str:
    """Name, classes, image size, and of each named split the number of images and a digest.

    What is made without real images depends on no split: ``(pics: 2 classes 0f3c…, 16 px)``. What is trained or measured
    on one does: ``(pics: 2 classes 0f3c…, 16 px, 40 test images 9a1d…)``.

    Raises:
        UserError: a split is missing or damaged, or a data-free run asks for 'train'.
    """
    names = "" if info.class_names is None else f" {digest(info.class_names)}"
    parts = [f"{info.num_classes} classes{names}", f"{info.image_size} px", *(_split_identity(info, s) for s in splits)]
    return f"({info.name}: {', '.join(parts)})"


def _split_identity(info: DatasetInfo, split: str) -> str:
    """Its size and a digest of all its labels and of a sample of its images: pixels of arrays, undecoded bytes of files."""
    raw, labels = read_split(info, split)
    chosen = np.unique(np.linspace(0, len(labels) - 1, SAMPLE).round().astype(int))
    if isinstance(raw.images, np.ndarray):
        sample = torch.from_numpy(np.ascontiguousarray(raw.images[chosen]))
    else:
        sample = [_file_digest(raw.images[position]) for position in chosen]
    return f"{len(labels)} {split} images {digest(labels, sample)}"


def _file_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"image {path} cannot be read ({error.strerror})") from None
