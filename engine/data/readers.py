"""Readers of images and labels, one function for each layout on disk.

A reader takes a ``DatasetInfo`` and a split and returns a ``RawSplit``. A describer reads from disk the facts that the
registry cannot know (number of classes, class names, image size). It opens no images.
"""

from __future__ import annotations

import math
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from engine.data.image_bank import memory_limit
from engine.data.pictures import class_files, image_files
from engine.runtime.errors import UserError, reason_of

if TYPE_CHECKING:
    from engine.data.datasets import DatasetInfo

OF_A_HEADER = (SyntaxError, TypeError, tokenize.TokenError, RecursionError)  # errors of numpy at a damaged array header
MOST_PACKED = 1100  # upper bound of deflate's compression ratio
# Folder names of each split, in order of preference.
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}


class RawSplit(NamedTuple):
    """Images and labels of a split, as a reader finds them.

    images: uint8 array (N, H, W) or (N, H, W, 3), or a list of N image files.
    labels: integers (N,).
    origin: file or folder to name in error messages.
    """

    images: np.ndarray | list[str]
    labels: np.ndarray
    origin: str


# Keras-style archives


def describe_npz(row: dict[str, Any], root: Path, name: str, domain: str | None, classes: str | None) -> dict[str, Any]:
    """Class count, class names and image size of an unregistered ``NAME.npz``.

    They come from the archive's class list, or else its test labels, and from the header of its test images.
    """
    path = root / f"{name}.npz"
    with open_npz(path) as archive:
        listed = (_member(archive, path, key) for key in ("classes", "class_names") if key in archive)
        names = next((names for names in listed if names.size), None)
        labels = _labels(archive, path, "test")
        shape, _ = _header(archive, path, "x_test")
    if names is None and labels.size and labels.min() != 0:
        raise UserError(
            f"{path}: the test labels lie in {labels.min()}..{labels.max()}, 0..C-1 wanted; number the classes from 0, or "
            "add their names as 'classes'"
        )
    if names is None and not labels.size:
        raise UserError(
            f"{path} has neither 'classes' nor test labels, so the number of classes is unknown; add one of them"
        )
    if len(shape) not in (3, 4):
        raise UserError(f"{path}: x_test has shape {shape}, (N, H, W), (N, H, W, 1) or (N, H, W, 3) wanted")
    if names is not None and names.ndim != 1:
        raise UserError(f"{path}: classes has shape {names.shape}, (C,) wanted: one name per class")
    text = names is not None and tuple(
        n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in names.tolist()
    )
    return {
        "num_classes": len(text) if text else int(labels.max()) + 1,
        "class_names": text or None,
        "size": min(shape[1:3]),
    }


def read_npz(info: DatasetInfo, split: str) -> RawSplit:
    """Reads one split of ``DATA_ROOT/NAME.npz`` (x_train, y_train, x_test, y_test); the other split stays unread."""
    path = Path(info.data_root, info.archive)
    with open_npz(path) as archive:
        return RawSplit(_images(archive, path, split), _labels(archive, path, split), str(path))


def read_npz_images(path: Path) -> np.ndarray:
    """Reads ``x_train`` of any npz archive, uint8 (N, H, W) or (N, H, W, 3)."""
    with open_npz(path) as archive:
        return _images(archive, path, "train")


def _images(archive, path: Path, split: str) -> np.ndarray:
    images = _member(archive, path, f"x_{split}")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise UserError(
            f"{path}: x_{split} is {images.dtype} of shape {images.shape}, uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3) "
            "wanted"
        )
    return images


@contextmanager
def open_npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Opens an npz archive and never unpickles; any fault found on opening or reading is raised as a UserError."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with archive:
            yield archive
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError, *OF_A_HEADER) as error:
        reason = "it contains Python objects, which are never loaded" if "pickle" in str(error) else str(error)
        raise UserError(
            f"{path} cannot be read: {reason}; give a complete .npz file with x_train, y_train, x_test and y_test"
        ) from None


def _member(archive, path: Path, key: str) -> np.ndarray:
    """Reads an array of an archive, after checking its size.

    Raises:
        UserError: the member is missing or no array, holds less data than its header says, or does not fit in memory.
    """
    shape, dtype = _header(archive, path, key)
    stored = archive.zip.getinfo(f"{key}.npy")
    size = math.prod(shape) * dtype.itemsize
    if size > stored.file_size or stored.file_size > MOST_PACKED * stored.compress_size + 2**20:
        raise UserError(
            f"{path}: by its header, {key} is {dtype} of shape {shape}, but the file has less data; make the file again"
        )
    if size > (most := memory_limit(torch.device("cpu"))):
        raise UserError(
            f"{path}: {key} needs {size / 1e9:.1f} GB of memory, {most / 1e9:.1f} GB are free; give fewer images"
        )
    return archive[key]


def _labels(archive, path: Path, split: str) -> np.ndarray:
    """Labels (N,); the archive may store them as (N,) or, like Keras, as (N, 1) integers."""
    labels = _member(archive, path, f"y_{split}")
    if labels.dtype.kind not in "iu" or labels.shape[1:] not in ((), (1,)):
        raise UserError(f"{path}: y_{split} is {labels.dtype} of shape {labels.shape}, integers (N,) wanted")
    return labels.reshape(-1)


def _header(archive, path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an archive's array, from its header alone."""
    if key not in archive:
        raise UserError(f"{path} has no array {key}; it has {', '.join(archive.files) or 'nothing'}")
    if f"{key}.npy" not in archive.zip.namelist():
        raise UserError(f"{path}: {key} is not an array; write the file with numpy.savez")
    with archive.zip.open(f"{key}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
    if dtype.hasobject:
        raise ValueError("pickled objects")
    return shape, dtype


# Datasets that a Python package contains or downloads


def read_digits(info: DatasetInfo, split: str) -> RawSplit:
    """Reads scikit-learn's 1797 embedded digits; a fixed third of every class is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target
    shuffled = np.random.RandomState(0).permutation(len(labels))
    is_test = np.zeros(len(labels), bool)
    for digit in range(10):
        is_test[shuffled[labels[shuffled] == digit][::3]] = True
    chosen = is_test if split == "test" else ~is_test
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return RawSplit(images, labels[chosen], "scikit-learn's digits")


def read_torchvision(info: DatasetInfo, split: str) -> RawSplit:
    """Reads the torchvision dataset of class ``info.source``, and downloads it into the data root if it is missing."""
    import torchvision

    dataset_class = getattr(torchvision.datasets, info.source)
    which = {"split": split} if info.source == "SVHN" else {"train": split == "train"}
    try:
        try:
            dataset = dataset_class(info.data_root, **which)
        except RuntimeError:  # torchvision's "not found or corrupted"
            dataset = dataset_class(info.data_root, download=True, **which)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        raise UserError(
            f"{info.name} is not complete in {info.data_root} and cannot be downloaded ({reason_of(error)}); put "
            f"{Path(info.data_root, info.archive)} (x_train, y_train, x_test, y_test) or torchvision's own {info.source} files there"
        ) from None
    images = np.asarray(dataset.data)
    images = images.transpose(0, 2, 3, 1) if info.source == "SVHN" else images
    return RawSplit(images, np.asarray(dataset.labels if info.source == "SVHN" else dataset.targets), info.data_root)


# Class folders


def describe_folders(row: dict[str, Any], root: Path, name: str, domain: str | None, classes: str | None) -> dict[str, Any]:
    """Name and classes of the user's own folder tree; the classes are the class folders of its test split."""
    folder = split_folder(root, "test")
    folders = tuple(class_folders(folder))
    if len(folders) < 2:
        raise UserError(f"{folder} has one class folder, '{folders[0]}', at least two wanted")
    own_name = re.sub(r"[^\w.-]+", "_", root.resolve().name).lstrip(".-") or name
    return {"name": own_name, "num_classes": len(folders), "class_names": folders, "classes": folders}


def read_folders(info: DatasetInfo, split: str) -> RawSplit:
    """Reads ``ROOT/<split>/<class>/**/*``; labels follow the order of the class folders."""
    return _from_folders(info, split_folder(info.folder, split))


def read_class_folders(info: DatasetInfo, split: str) -> RawSplit:
    """Reads ``SOURCE/<class>/**/*``, a test split alone; folders are class names or numbers, and classes may be missing."""
    files, labels = class_files(info.folder, info.class_names or (), names_first=True)
    found = class_folders(info.folder)
    if not info.class_names and len(found) != info.num_classes and not all(name.isdecimal() for name in found):
        raise UserError(
            f"{info.folder} has {len(found)} class folders for {info.num_classes} classes whose names are not known; name "
            "the folders by the numbers of their classes"
        )
    return RawSplit(files, labels.numpy(), str(info.folder))


def read_unlabelled(info: DatasetInfo, split: str) -> RawSplit:
    """Reads all images below a folder; the labels are unknown and set to 0."""
    files = image_files(info.folder)
    return RawSplit(files, np.zeros(len(files), np.int64), str(info.folder))


def read_tiny_imagenet(info: DatasetInfo, split: str) -> RawSplit:
    """Reads the extracted archive as published, or class folders.

    The test images of the published archive have no labels, so ``val`` with its annotations is the test split.
    """
    annotations = info.folder / "val" / "val_annotations.txt"
    if split == "train" or not annotations.is_file():
        return _from_folders(info, split_folder(info.folder, "train") if split == "train" else info.folder / "val")
    files, wnids = [], []
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise UserError(f"{annotations}:{number}: '{line[:80]}' found, a file name, a tab and a class wanted")
        files.append(str(annotations.parent / "images" / fields[0]))
        wnids.append(fields[1])
    names, labels = np.unique(np.array(wnids, dtype=str), return_inverse=True)
    _check_count(info, len(names), annotations)
    return RawSplit(files, labels, str(annotations))


def _from_folders(info: DatasetInfo, folder: Path) -> RawSplit:
    names = class_folders(folder)
    if info.classes and set(names) != set(info.classes):
        raise UserError(
            f"{folder} and the test split have different class folders, equal ones wanted: "
            f"{sorted(set(names) ^ set(info.classes))[:5]}; rename folders, or make an empty one for a class without images"
        )
    _check_count(info, len(names), folder)
    files = [image_files(folder / name) for name in names]
    labels = np.repeat(np.arange(len(names)), [len(f) for f in files])
    return RawSplit([file for group in files for file in group], labels, str(folder))


def _check_count(info: DatasetInfo, found: int, where: Path) -> None:
    if found != info.num_classes:
        raise UserError(f"{where} has {found} classes, {info.name} has {info.num_classes}")


def split_folder(root: Path, split: str) -> Path:
    """The first folder of ``root`` that has a name of the split (``SPLIT_FOLDERS``) and holds class folders.

    Raises:
        UserError: there is no such folder.
    """
    for name in SPLIT_FOLDERS[split]:
        if (root / name).is_dir() and class_folders(root / name):
            return root / name
    wanted = " or ".join(str(root / name / "<class>" / "*") for name in SPLIT_FOLDERS[split])
    if not root.is_dir():
        raise UserError(f"the folder {root} does not exist; give a --data_root with {wanted}")
    parent = f"; {root} is itself a split: give its parent" if root.name in sum(SPLIT_FOLDERS.values(), ()) else ""
    raise UserError(f"no {split} images found, {wanted} wanted; put the images there, or give another --data_root{parent}")


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in label order: by value if all are numbers ('2' before '10'), else alphabetical."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; a folder with one subfolder of images per class is wanted")
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    numeric = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names)


# DomainNet


def describe_domainnet(
    row: dict[str, Any], root: Path, name: str, domain: str | None, classes: str | None
) -> dict[str, Any]:
    """Describes one domain: its ten-class subset, or all 345 classes.

    With all classes, the dataset's name ends in "_all" and the class names are those of the folders.
    """
    if domain not in row["domains"]:
        found = f"unknown --domain '{domain}'" if domain else "--domain is missing"
        raise UserError(f"{found}; {name} has {', '.join(row['domains'])}")
    if classes not in (None, "ten", "all"):
        raise UserError(f"--classes {classes} found, 'ten' (the subset) or 'all' wanted")
    named = {"name": f"{name}_{domain}", "domain": domain}
    if classes != "all":
        return named | {
            "num_classes": len(row["ten"]),
            "class_names": tuple(row["ten"]),
            "classes": tuple(row["ten"].values()),
        }
    names = None
    listing = root / row["source"] / f"{domain}_test.txt"
    if listing.is_file():
        files, numbers = _read_list(listing)
        folder_of = {number: Path(file).parent.name.replace("_", " ") for file, number in zip(files, numbers)}
        names = tuple(folder_of.get(label, str(label)) for label in range(row["num_classes"]))
    return named | {"name": f"{name}_{domain}_all", "class_names": names}


def read_domainnet(info: DatasetInfo, split: str) -> RawSplit:
    """Reads the images listed in ``<domain>_<split>.txt``; label numbers of a subset become 0, 1, … in its order."""
    listing = info.folder / f"{info.domain}_{split}.txt"
    files, labels = _read_list(listing)
    if info.classes:
        position = {number: label for label, number in enumerate(info.classes)}
        chosen = [(file, position[number]) for file, number in zip(files, labels) if number in position]
        files, labels = [file for file, _ in chosen], [label for _, label in chosen]
    return RawSplit([str(info.folder / file) for file in files], np.array(labels, dtype=np.int64), str(listing))


def _read_list(listing: Path) -> tuple[list[str], list[int]]:
    """Reads lines ``path label`` as paths and labels; a path may contain blanks."""
    try:
        lines = listing.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"{listing} does not exist; a list with one line 'path label' per image is wanted, with paths relative to "
            "its folder"
        ) from None
    files, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = line.rsplit(maxsplit=1)
        if len(fields) != 2 or not fields[1].isdecimal():
            raise UserError(f"{listing}:{number}: '{line[:80]}' found, 'path label' wanted")
        files.append(fields[0])
        labels.append(int(fields[1]))
    return files, labels
