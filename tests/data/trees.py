"""Writes tiny datasets in every layout, and loads them for the tests in this folder."""

import numpy as np
import pytest
from PIL import Image

from engine.data.splits import load_split
from engine.runtime.errors import UserError


def load(info, split="test", **options):
    return load_split(info, split, "cpu", workers=options.pop("workers", 0), **options)


def pixels(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def write_npz(folder, name, shape=(6, 8, 8, 3), labels=(0, 1, 2, 0, 1, 2), **extra):
    arrays = {f"x_{split}": pixels(*shape, seed=seed) for seed, split in enumerate(("train", "test"))}
    arrays |= {f"y_{split}": np.array(labels) for split in ("train", "test")}
    np.savez(folder / f"{name}.npz", **arrays | extra)
    return arrays


def write_image(path, colour, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_folders(root, names, splits=("train", "test"), each=2):
    """Writes class folders of images; the images of class i of ``names`` have the colour (10 * i, 0, 0)."""
    for split in splits:
        for label, name in enumerate(names):
            for i in range(each):
                write_image(root / split / name / f"{i}.png", (10 * label, 0, 0))


def fails(*words):
    """Expects a UserError of one line that contains these words."""
    return pytest.raises(UserError, match="(?s)^(?!.*\n)" + "".join(f"(?=.*{word})" for word in words))
