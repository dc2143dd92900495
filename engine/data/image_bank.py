"""The image bank: a folder of synthetic images and their labels, stored in append-only uint8 shards.

    bank/manifest.json                     dataset, teacher and method of the images
    bank/<stage>-<round>.safetensors       images (n, 3, H, W) uint8, labels (n,) int64, and any further columns

Each shard is written whole or not at all, and its name gives its stage and round. A run that was killed writes its last
round again with the same bytes, so no image is duplicated or lost. Reading memory-maps the shards and copies only the
images that are indexed. During training, ``TransferSet`` keeps the images in device or host memory if they fit there, and
otherwise in the mapped shards.
"""

import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.runtime import checksums
from engine.runtime.errors import UserError
from engine.runtime.files import read_json, write_json
from engine.runtime.schema import SIZE, Array, require
from engine.runtime.tensors import digest, load_tensors, save_tensors

# Storage of images: device memory, host memory or disk.


def storage_device(num_bytes: int, device: torch.device) -> torch.device | None:
    """Memory in which to store that many bytes of images: the GPU's, else the host's, else None if neither has room."""
    places = [device] * (device.type == "cuda") + [torch.device("cpu")]
    return next((place for place in places if num_bytes <= memory_limit(place)), None)


def memory_limit(device: torch.device) -> int:
    """Bytes that images may take: half of a GPU's free memory, or half of this process's share of free host memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    free = _read_bytes("/proc/meminfo", "MemAvailable:", 1024)
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_read_bytes(f"/sys/fs/cgroup/memory.{what}") for what in ("max", "current"))  # memory of a container
    if limit is not None and used is not None:
        free = min(free, max(limit - used, 0))
    return free // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _read_bytes(path: str, key: str = "", unit: int = 1) -> int | None:
    """First number in a kernel file (on its line that begins with ``key``), times ``unit``; None if there is none."""
    try:
        line = next(line for line in Path(path).read_text().splitlines() if line.startswith(key))
        return int(line.removeprefix(key).split()[0]) * unit
    except (OSError, StopIteration, ValueError, IndexError):
        return None


# Images that stay in the mapped files of a bank, and batches that are read ahead of the training steps.
#
# A mapped page belongs to the file cache of the operating system. It counts as resident memory (``ru_maxrss``) while it is
# cached, and the system drops it as soon as memory is short. Anonymous memory is small: about 40 bytes an image (part and
# row, label, position in the shuffled order), and the batches in flight.


T = TypeVar("T")


class MappedImages:
    """Read-only images (N, 3, H, W) uint8, spread over any number of arrays, most of them memory-mapped files.

    Indexing with an int, a slice or a LongTensor of any shape copies the chosen images into an ordinary tensor. The time is
    proportional to their number. Indexing with a bool mask (N,) copies no image and returns the chosen ``MappedImages``.

    Args:
        parts: at least one array (n_i, 3, H, W). Copying a row of a NumPy array costs a fraction of a torch call.
        where: (N, 2) int32, the part and row of each image.
    """

    dtype, device = torch.uint8, torch.device("cpu")

    def __init__(self, parts: list[np.ndarray], where: Tensor):
        self.parts, self.where = parts, where

    @classmethod
    def of(cls, parts: list[Tensor]) -> "MappedImages":
        """Wraps one or more CPU tensors (n_i, 3, H, W), in order and without copying them."""
        lengths = torch.tensor([len(part) for part in parts])
        number = torch.arange(len(parts)).repeat_interleave(lengths)
        row = torch.arange(len(number)) - (lengths.cumsum(0) - lengths)[number]
        return cls([part.numpy() for part in parts], torch.stack([number, row], 1).int())

    def __len__(self) -> int:
        return len(self.where)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.parts[0].shape[1:]))

    def __getitem__(self, index: "int | slice | Tensor") -> "Tensor | MappedImages":
        where = self.where[index]
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            return MappedImages(self.parts, where)
        images = torch.empty(*where.shape[:-1], *self.shape[1:], dtype=self.dtype)
        for target, (part, row) in zip(images.view(-1, *self.shape[1:]).numpy(), where.reshape(-1, 2).tolist()):
            target[...] = self.parts[part][row]
        return images

    def split(self, size: int) -> Iterator[Tensor]:
        """Iterates over all images in order, in tensors of up to ``size`` images that are read when they are needed."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def refer(self, start: int, images: "MappedImages") -> None:
        """Makes the entries from position ``start`` on refer to ``images``, without copying them."""
        self.where[start : start + len(images)] = images.where + torch.tensor([len(self.parts), 0], dtype=torch.int32)
        self.parts.extend(images.parts)


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yields the items of an endless iterator, which one background thread computes up to ``depth`` items ahead.

    An exception in the thread is raised in the caller. The thread ends when this generator is closed or garbage-collected.
    """
    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        pending = deque(thread.submit(next, items) for _ in range(depth))
        while True:
            pending.append(thread.submit(next, items))
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


FORMAT = 1
MANIFEST = {
    "dataset": str, "num_classes": SIZE, "image_size": SIZE, "teacher?": str, "teacher_digest?": str,
    "method": str, "external_prior": str, "format": int,
}  # fmt: skip
SHARD_NAME = re.compile(r"^(?P<stage>[a-z]+)-(?P<round>\d{6})\.safetensors$")


@dataclass(frozen=True)
class Manifest:
    """Origin of a bank's images: dataset, teacher and method. A ``teacher_digest`` of None (imported) fits any teacher."""

    dataset: str
    num_classes: int
    image_size: int
    teacher: str | None = None
    teacher_digest: str | None = None
    method: str = "import"
    external_prior: str = "none"
    format: int = FORMAT


def to_uint8(images: Tensor) -> Tensor:
    """Converts float images (B, 3, H, W) in [0, 1] to uint8, rounded to nearest."""
    return (images.detach().clamp(0, 1) * 255).round_().to(torch.uint8)


class ImageBank:
    """A folder of shards, created or opened with the manifest that this run expects.

    A manifest without shards, as ``--redo`` may leave it, is replaced.

    Raises:
        UserError: the folder's images are of another teacher, dataset, class count or size, or ``create`` is False and the
            folder is no bank.
    """

    def __init__(self, path: Path, manifest: Manifest, *, create: bool = True):
        self.path = Path(path)
        file = self.path / "manifest.json"
        if create and not (file.exists() and any(SHARD_NAME.match(f.name) for f in self.path.iterdir())):
            checksums.keep(self.path)
            write_json(file, vars(manifest))
        self.manifest = read_manifest(self.path)
        self._check(manifest)

    def _check(self, wanted: Manifest) -> None:
        found = self.manifest
        for name in ("dataset", "num_classes", "image_size"):
            if getattr(found, name) != getattr(wanted, name):
                raise UserError(
                    f"{self.path} was made with {name} {getattr(found, name)}, this run has {name} "
                    f"{getattr(wanted, name)}; give another --init_bank or --save_dir"
                )
        if found.teacher_digest and wanted.teacher_digest and found.teacher_digest != wanted.teacher_digest:
            raise UserError(
                f"{self.path} was made with the teacher {found.teacher} (weights {found.teacher_digest}), this run has "
                f"{wanted.teacher} (weights {wanted.teacher_digest}); give that teacher, another --init_bank or --save_dir"
            )

    def shard(self, stage: str, round: int) -> Path:
        return self.path / f"{stage}-{round:06d}.safetensors"

    def append(
        self, stage: str, round: int, images: Tensor, labels: Tensor, **columns: Tensor
    ) -> tuple[MappedImages, Tensor]:
        """Writes images (n, 3, H, W), float in [0, 1] or uint8, as one shard; returns them memory-mapped, and the labels."""
        images = images if images.dtype == torch.uint8 else to_uint8(images)
        size = self.manifest.image_size
        assert images.shape[1:] == (3, size, size), images.shape
        save_tensors(self.shard(stage, round), {"images": images, "labels": labels, **columns})
        return MappedImages.of([load_tensors(self.shard(stage, round))["images"]]), labels

    def rounds(self, stage: str) -> list[int]:
        """Round numbers of a stage's shards in the folder, in ascending order."""
        found = (SHARD_NAME.match(f.name) for f in self.path.iterdir())
        return sorted(int(m["round"]) for m in found if m and m["stage"] == stage)

    def read(self, stage: str, stop: int | None = None) -> dict[str, MappedImages | Tensor]:
        """Reads all columns of a stage's shards in order.

        Args:
            stop: number of rounds to read, from round 0 on; None: all rounds in the folder.
        Returns:
            "images" as ``MappedImages`` (N, 3, H, W), "labels" and any other column as a tensor (N,).
        Raises:
            UserError: a shard is missing or damaged.
        """
        present = self.rounds(stage)
        if stop is None and (gone := checksums.missing(self.path, [f"{stage}-*.safetensors"])):
            raise UserError(f"{gone[0]} is missing; run the stage again with --redo {stage}")
        wanted = range(len(present) if stop is None else stop)
        if missing := sorted(set(wanted) - set(present)):
            raise UserError(f"{self.shard(stage, missing[0])} is missing; run the stage again with --redo {stage}")
        return self.open_shards([self.shard(stage, round) for round in wanted])

    def read_all(self) -> dict[str, MappedImages | Tensor]:
        """Reads the images and labels of all shards in the folder, with the stages in alphabetical order.

        Raises:
            UserError: a shard is missing or damaged.
        """
        if gone := checksums.missing(self.path, ["*.safetensors"]):
            raise UserError(f"{gone[0]} is missing; restore it from a copy, or make the bank again")
        columns = self.open_shards(sorted(f for f in self.path.iterdir() if SHARD_NAME.match(f.name)))
        return {name: columns[name] for name in ("images", "labels")}

    def open_shards(self, files: list[Path]) -> dict[str, MappedImages | Tensor]:
        """Reads the columns that all of these files have, in order, in the form that ``read`` returns.

        Raises:
            UserError: a file is missing or damaged, or holds images or labels that do not fit the manifest.
        """
        size, classes = self.manifest.image_size, self.manifest.num_classes
        nothing = {"images": torch.empty(0, 3, size, size, dtype=torch.uint8), "labels": torch.empty(0, dtype=torch.long)}
        shards = [load_tensors(file) for file in files] or [nothing]
        columns = {"images": Array(torch.uint8, (None, 3, size, size)), "labels": Array(torch.int64, (None,))}
        for file, shard in zip(files, shards):
            require(shard, columns | {"source_index?": Array(torch.int64, (None,))}, str(file))
            if len({len(column) for column in shard.values() if column.dim()} | {len(shard["images"])}) > 1:
                raise UserError(
                    f"{file} has different numbers of images and labels; restore it from a copy, or make it again"
                )
        names = [name for name in shards[0] if name != "images" and all(name in shard for shard in shards)]
        columns = {name: torch.cat([shard[name] for shard in shards]) for name in names}
        labels = columns["labels"]
        if len(wrong := labels[(labels < 0) | (labels >= classes)]):
            raise UserError(
                f"{self.path} has a label {int(wrong[0])}, 0 to {classes - 1} wanted; make it again, or give another bank"
            )
        if "source_index" in columns and len(index := columns["source_index"]) and int(index.min()) < 0:
            raise UserError(f"{self.path} has a source_index below 0; make the variants again")
        return {"images": MappedImages.of([shard["images"] for shard in shards]), **columns}


def find_bank(path: Path, folder: str = "bank") -> Path:
    """The folder of a bank; ``path`` is that folder itself, or a run folder that holds the bank as ``folder``."""
    path = Path(path)
    return path / folder if not (path / "manifest.json").exists() and (path / folder).is_dir() else path


def bank_digest(path: Path) -> str | None:
    """Returns a digest of the images that a bank begins a run with: of all shards but those of stage distill.

    Returns None if there are none.
    """
    names = [file.name for file in path.iterdir()] if path.is_dir() else []
    shards = sorted(name for name in names if (found := SHARD_NAME.match(name)) and found["stage"] != "distill")
    known = checksums.listed(path)
    return (
        digest(*([name, *sorted(known.get(name) or [checksums.digest_of(path / name)])] for name in shards))
        if shards
        else None
    )


def open_bank(path: Path) -> ImageBank:
    """Opens an image bank, whatever run made it.

    Raises:
        UserError: as for ``read_manifest``.
    """
    return ImageBank(path, read_manifest(path), create=False)


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of a bank folder.

    Raises:
        UserError: the manifest is missing, damaged, or of another format.
    """
    file = Path(path) / "manifest.json"
    if not file.exists():
        raise UserError(
            f"no image bank at {path} (it has no manifest.json); give a bank folder or a run folder that contains one"
        )
    value = read_json(file)
    if not isinstance(value, dict) or value.get("format") != FORMAT or not set(value) <= set(Manifest.__dataclass_fields__):
        raise UserError(f"{file} is not the manifest of an image bank of format {FORMAT}; give a bank made by this version")
    require(value, MANIFEST, str(file))
    return Manifest(**value)
