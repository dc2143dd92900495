"""Real data: the splits of a dataset as batches of float images in [0, 1].

Images are kept as uint8 in device or host memory if they fit there. Image files that do not fit are decoded by worker
processes, batch by batch. ``Split.batches`` is the same in both cases. Normalization is part of the model.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from engine.data.datasets import DatasetInfo
from engine.data.image_bank import storage_device
from engine.data.pictures import decode_image, warn_of_cropping
from engine.data.readers import RawSplit
from engine.runtime.errors import UserError, resolve
from engine.runtime.tensors import digest

# Identity of the data that a result depends on: a short text that changes when the data change.
#
# The text is part of result.json and of the fingerprint of every stage that depends on the data. Runs on different images
# are therefore never mistaken for the same run, whatever their folders are called.


SAMPLE = 256  # images of a split that enter its digest, evenly spaced


def data_identity(info: DatasetInfo, *splits: str) -> str:
    """Text that identifies a dataset: its name, classes and image size, and the size and a digest of each given split.

    A stage without real images depends on no split: ``(pics: 2 classes 0f3c…, 16 px)``. A stage that trains or measures on
    a split depends on it: ``(pics: 2 classes 0f3c…, 16 px, 40 test images 9a1d…)``.

    Raises:
        UserError: a split is missing or damaged, or a data-free run asks for 'train'.
    """
    names = "" if info.class_names is None else f" {digest(info.class_names)}"
    parts = [f"{info.num_classes} classes{names}", f"{info.image_size} px", *(_split_identity(info, s) for s in splits)]
    return f"({info.name}: {', '.join(parts)})"


def _split_identity(info: DatasetInfo, split: str) -> str:
    """Size of a split and a digest of all labels and of a sample of images (pixels of arrays, undecoded bytes of files)."""
    raw, labels = read_split(info, split)
    return f"{len(labels)} {split} images {digest(labels, sample_of(raw.images))}"


def sample_of(images: np.ndarray | list[str]) -> Tensor | list[str]:
    """A sample of images for their digest: pixels of an array of images, or digests of the undecoded bytes of image files.

    Raises:
        UserError: a file cannot be read.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, SAMPLE).round().astype(int))
    if isinstance(images, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(images[chosen]))
    return [_file_digest(images[position]) for position in chosen]


def _file_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"image {path} cannot be read ({error.strerror})") from None


_train_split_forbidden = False


def forbid_train_split() -> None:
    """Makes ``load_split(info, "train")`` an error from now on; the data-free entry point calls this once."""
    global _train_split_forbidden
    _train_split_forbidden = True


@contextmanager
def allow_train_split(allowed: bool = True) -> Iterator[None]:
    """Lifts the ban inside the block, for the control method, which declares that it trains the student on real data."""
    global _train_split_forbidden
    before, _train_split_forbidden = _train_split_forbidden, _train_split_forbidden and not allowed
    try:
        yield
    finally:
        _train_split_forbidden = before


class Split:
    """Labelled images in memory."""

    def __init__(self, pixels: Tensor, labels: Tensor, num_classes: int):
        """
        Args:
            pixels: images (N, H, W, 3) uint8, on the device, or on the host if they do not fit there.
            labels: (N,) int64, on the device.
        """
        self.labels = labels
        self.num_classes = num_classes
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor | None:
        """All images (N, 3, H, W) uint8, channels_last; None if the images are decoded batch by batch."""
        return self._pixels.permute(0, 3, 1, 2)

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images, labels): (B, 3, H, W) float32 in [0, 1], channels_last, and (B,) int64, on the device.

        Args:
            order: (M,) indices of the images to yield, in that order; None: all images, as stored.
        """
        order = torch.arange(len(self)) if order is None else order
        chunks = [chunk for chunk in order.split(batch_size) if len(chunk)]
        device = self.labels.device
        for chunk, pixels in zip(chunks, self._gather(chunks)):
            images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)
            yield images.to(torch.float32).div_(255), self.labels[chunk.to(device)]

    def _gather(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        """Yields images (B, H, W, 3) uint8 for each chunk of indices."""
        for chunk in chunks:
            yield self._pixels[chunk.to(self._pixels.device)]


class StreamedSplit(Split):
    """Labelled image files that do not fit into memory; worker processes decode each batch."""

    def __init__(self, files: "ImageFiles", labels: Tensor, num_classes: int, workers: int):
        self.labels = labels
        self.num_classes = num_classes
        self._files = files
        self._workers = workers

    @property
    def images(self) -> None:
        return None

    def _gather(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        return decode(self._files, [chunk.tolist() for chunk in chunks], self._workers, self.labels.is_cuda)


def load_split(info: DatasetInfo, split: str, device: torch.device | str, workers: int = 4) -> Split:
    """Opens one split.

    Args:
        split: 'train' or 'test'.
        device: device of the batches, and of all images if they fit there.
        workers: number of processes that decode image files; 0: decode in this process.
    Raises:
        UserError: files are missing or damaged, labels do not fit the classes, or a data-free run asks for 'train'.
    """
    device = torch.device(device)
    raw, labels = read_split(info, split)
    labels = labels.to(device)
    warn_of_cropping(f"{info.name} {split}", info.image_size, raw.images)
    home = storage_device(len(labels) * 3 * info.image_size**2, device)
    if isinstance(raw.images, np.ndarray):
        return Split(resized(raw.images, info.image_size).to(home or "cpu"), labels, info.num_classes)

    files = ImageFiles(raw.images, info.image_size, info.crop_fraction)
    if home is None:
        return StreamedSplit(files, labels, info.num_classes, workers)
    pixels = torch.empty(len(files), info.image_size, info.image_size, 3, dtype=torch.uint8)
    chunks = [list(range(i, min(i + 64, len(files)))) for i in range(0, len(files), 64)]
    with tqdm(total=len(files), desc=f"decoding {info.name} {split}", unit="img", disable=None) as bar:
        for chunk, images in zip(chunks, decode(files, chunks, workers)):
            pixels[chunk[0] : chunk[-1] + 1] = images
            bar.update(len(chunk))
    return Split(pixels.to(home), labels, info.num_classes)


def read_split(info: DatasetInfo, split: str) -> tuple[RawSplit, Tensor]:
    """Runs the dataset's reader for one split and checks the labels; opens no image file.

    Args:
        split: 'train' or 'test'.
    Returns:
        What the reader found, and the checked labels (N,) int64.
    Raises:
        UserError: files are missing or damaged, labels do not fit the classes, or a data-free run asks for 'train'.
    """
    assert split in ("train", "test"), split
    if split == "train" and _train_split_forbidden:
        raise UserError(
            f"this run is data-free: the train split of {info.name} must not be read (only the test split, to measure "
            "accuracy)"
        )
    raw = resolve(info.reader)(info, split)
    return raw, _checked_labels(raw, info, split)


def _checked_labels(raw: RawSplit, info: DatasetInfo, split: str) -> Tensor:
    """Labels (N,) int64, after checking that each image has one and that all lie in 0 .. num_classes - 1."""
    if len(raw.images) != len(raw.labels):
        raise UserError(
            f"{raw.origin}: {len(raw.images)} {split} images and {len(raw.labels)} labels found, one label per image wanted"
        )
    if not len(raw.labels):
        raise UserError(f"{raw.origin}: no {split} images of {info.name}'s classes")
    low, high = int(raw.labels.min()), int(raw.labels.max())
    if low < 0 or high >= info.num_classes:
        raise UserError(
            f"{raw.origin}: {split} labels lie in {low}..{high}, {info.name} has the classes 0..{info.num_classes - 1}"
        )
    return torch.from_numpy(raw.labels.astype(np.int64))


def resized(images: np.ndarray, size: int) -> Tensor:
    """Resizes (N, H, W) or (N, H, W, 3) uint8 to (N, size, size, 3) by the shorter side and a centre crop.

    Interpolation is bilinear and antialiased.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if pixels.dim() == 3:
        pixels = pixels.unsqueeze(3).expand(-1, -1, -1, 3)
    height, width = pixels.shape[1:3]
    if (height, width) == (size, size):
        return pixels.contiguous()
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    result = torch.empty(len(pixels), size, size, 3, dtype=torch.uint8)
    for target, chunk in zip(result.split(1024), pixels.split(1024)):
        images = F.interpolate(chunk.permute(0, 3, 1, 2).float(), shape, mode="bilinear", antialias=True)
        images = images[:, :, top : top + size, left : left + size].round().clamp(0, 255)
        target.copy_(images.permute(0, 2, 3, 1))
    return result


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """Image files, decoded one by one to (size, size, 3) uint8 RGB."""

    paths: list[str]
    size: int
    crop_fraction: float = 1.0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | UserError:
        """Returns the image or the error. An error raised in a worker would arrive wrapped in the worker's traceback."""
        try:
            return decode_image(self.paths[index], self.size, self.crop_fraction)
        except UserError as error:
            return error


def decode(files: ImageFiles, chunks: list[list[int]], workers: int, pin_memory: bool = False) -> Iterator[Tensor]:
    """Decodes image files in worker processes, one chunk of indices at a time.

    Yields:
        (B, size, size, 3) uint8.
    Raises:
        UserError: a file is missing or damaged.
    """
    loader = DataLoader(
        files,
        batch_sampler=chunks,
        num_workers=min(workers, len(chunks), os.cpu_count() or 1),
        collate_fn=_stack,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise every pass would draw from the global random stream
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _stack(images: list[Tensor | UserError]) -> Tensor | UserError:
    return next((image for image in images if isinstance(image, UserError)), None) or torch.stack(images)
