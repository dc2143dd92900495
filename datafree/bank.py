"""The image bank: synthetic images with labels, in append-only uint8 shards that are whole or absent.

    bank/manifest.json                     whose images these are
    bank/<stage>-<round>.safetensors       images (n, 3, H, W) uint8, labels (n,) int64, and any further columns

A shard is named by the position that made it. Writing a position again (after a kill) replaces it by the same bytes,
so nothing is ever made twice or lost. In use the bank lives in memory, on the device where it fits: ``TransferSet``.

    python -m datafree.bank export BANK FOLDER      class folders of PNG, for people and other tools
    python -m datafree.bank import FOLDER BANK --dataset cifar10
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.errors import UserError, run_command
from engine.files import load_tensors, read_json, save_tensors, write_json

FORMAT = 1
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHARD_NAME = re.compile(r"^(?P<stage>[a-z]+)-(?P<round>\d{6})\.safetensors$")


@dataclass(frozen=True)
class Manifest:
    """Whose images these are. ``teacher_digest`` None (imported images) fits any teacher."""

    dataset: str
    num_classes: int
    image_size: int
    teacher: str | None = None
    teacher_digest: str | None = None
    method: str = "import"
    external_prior: str = "none"
    format: int = FORMAT


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) float in [0, 1] to uint8, rounded to nearest."""
    return (images.detach().clamp(0, 1) * 255).round_().to(torch.uint8)


class ImageBank:
    """A folder of shards. Create or open it with the manifest of this run; another run's is an error.

    Raises:
        UserError: the folder holds the images of another teacher, dataset, class count or size.
    """

    def __init__(self, path: Path, manifest: Manifest, *, create: bool = True):
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.exists():
            if not create:
                raise UserError(f"no image bank at {self.path} (it has no manifest.json); make one with --stages synthesize")
            write_json(file, vars(manifest))
        self.manifest = read_manifest(self.path)
        self._check(manifest)

    def _check(self, wanted: Manifest) -> None:
        found = self.manifest
        for name in ("dataset", "num_classes", "image_size"):
            if getattr(found, name) != getattr(wanted, name):
                raise UserError(
                    f"{self.path} holds images of {name} {getattr(found, name)}, this run has {name} "
                    f"{getattr(wanted, name)}; give another --init_bank or --save_dir"
                )
        if found.teacher_digest and wanted.teacher_digest and found.teacher_digest != wanted.teacher_digest:
            raise UserError(
                f"{self.path} was made with the teacher {found.teacher} (weights {found.teacher_digest}), this run has "
                f"{wanted.teacher} (weights {wanted.teacher_digest}); give that teacher, another --init_bank or --save_dir"
            )

    def shard(self, stage: str, round: int) -> Path:
        return self.path / f"{stage}-{round:06d}.safetensors"

    def append(self, stage: str, round: int, images: Tensor, labels: Tensor, **columns: Tensor) -> None:
        """Writes one shard; images float in [0, 1] or uint8, (n, 3, H, W)."""
        images = images if images.dtype == torch.uint8 else to_uint8(images)
        size = self.manifest.image_size
        assert images.shape[1:] == (3, size, size), images.shape
        save_tensors(self.shard(stage, round), {"images": images, "labels": labels, **columns})

    def rounds(self, stage: str) -> list[int]:
        """The rounds of a stage that are present, in order."""
        found = (SHARD_NAME.match(f.name) for f in self.path.iterdir())
        return sorted(int(m["round"]) for m in found if m and m["stage"] == stage)

    def read(self, stage: str, stop: int | None = None) -> dict[str, Tensor]:
        """All columns of a stage's shards, concatenated in order: rounds 0 .. stop - 1 (default: all that are there).

        Raises:
            UserError: a shard is missing or damaged.
        """
        present = self.rounds(stage)
        wanted = range(len(present) if stop is None else stop)
        if missing := sorted(set(wanted) - set(present)):
            raise UserError(f"{self.shard(stage, missing[0])} is missing; make the stage again with --redo {stage}")
        shards = [load_tensors(self.shard(stage, r)) for r in wanted]
        if not shards:
            size = self.manifest.image_size
            return {"images": torch.empty(0, 3, size, size, dtype=torch.uint8), "labels": torch.empty(0, dtype=torch.long)}
        columns = {name: torch.cat([s[name] for s in shards]) for name in shards[0]}
        labels, classes = columns["labels"], self.manifest.num_classes
        if len(wrong := labels[(labels < 0) | (labels >= classes)]):
            raise UserError(
                f"{self.path} has a label {int(wrong[0])} of {classes} classes; make it again, or give another bank"
            )
        return columns

    def read_all(self) -> dict[str, Tensor]:
        """images and labels of every shard there is, stages in alphabetical order."""
        stages = sorted({m["stage"] for f in self.path.iterdir() if (m := SHARD_NAME.match(f.name))})
        parts = [self.read(stage) for stage in stages or ["none"]]
        return {name: torch.cat([p[name] for p in parts]) for name in ("images", "labels")}


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bank folder.

    Raises:
        UserError: missing, damaged, or of a newer format.
    """
    file = Path(path) / "manifest.json"
    value = read_json(file)
    if not isinstance(value, dict) or value.get("format") != FORMAT or not set(value) <= set(Manifest.__dataclass_fields__):
        raise UserError(f"{file} is not the manifest of an image bank of format {FORMAT}; give a bank made by this version")
    return Manifest(**value)


class TransferSet:
    """The images that a student learns from, in one uint8 buffer with room for those still to come.

    Args:
        capacity: number of images it will hold in the end.
        device: where the networks are; the buffer is there too if it takes at most half of the free memory, else in
            host memory, from which batches are copied.
    """

    def __init__(self, capacity: int, image_size: int, device: torch.device):
        size = capacity * 3 * image_size**2
        fits = device.type != "cuda" or size < torch.cuda.mem_get_info(device)[0] // 2
        home = device if fits else torch.device("cpu")
        self.device = device
        self.images = torch.empty(capacity, 3, image_size, image_size, dtype=torch.uint8, device=home)
        self.labels = torch.empty(capacity, dtype=torch.long, device=home)
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Appends images (n, 3, H, W), float in [0, 1] or uint8."""
        images = images if images.dtype == torch.uint8 else to_uint8(images)
        end = self.count + len(images)
        assert end <= len(self.images), f"{end} images for room for {len(self.images)}"
        self.images[self.count : end].copy_(images)
        self.labels[self.count : end].copy_(labels)
        self.count = end

    def batches(
        self, batch_size: int, augment, *, seed: int, rank: int = 0, count: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless shuffled passes: images float32 (B, 3, H, W) in [0, 1] channels_last, labels (B,).

        The last batch of a pass is filled from the next one, so every batch has ``batch_size`` images, of which process
        ``rank`` of ``count`` takes every ``count``-th. ``seed`` decides the order, apart from the global random stream.
        """
        generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < batch_size:
                order = torch.cat([order, torch.randperm(self.count, generator=generator)])
            chosen, order = order[:batch_size][rank::count].to(self.images.device), order[batch_size:]
            images = augment(self.images[chosen].to(self.device, non_blocking=True))
            yield (
                images.to(torch.float32, memory_format=torch.channels_last).div_(255),
                self.labels[chosen].to(self.device, non_blocking=True),
            )


def export_folders(bank: ImageBank, folder: Path) -> int:
    """Writes every image as ``folder/<class id>/<position>.png``; returns how many."""
    columns = bank.read_all()
    images = columns["images"].permute(0, 2, 3, 1).numpy()
    for position, (image, label) in enumerate(zip(tqdm(images, "export", unit="img"), columns["labels"].tolist())):
        file = Path(folder) / str(label) / f"{position:07d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return len(images)


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


def import_folders(folder: Path, image_size: int) -> tuple[Tensor, Tensor, int]:
    """Reads class folders of images; folders are sorted by number where all names are numbers ("2" before "10").

    Where names are numbers they are the labels themselves, so that a class without images leaves its label free.

    Returns:
        images (N, 3, H, W) uint8, labels (N,), largest label + 1.
    Raises:
        UserError: no class folder, no image, or an image that cannot be read.
    """
    folders = [f for f in Path(folder).iterdir() if f.is_dir()] if Path(folder).is_dir() else []
    numbers = all(f.name.isdecimal() for f in folders)
    folders.sort(key=lambda f: int(f.name) if numbers else f.name)
    files = [
        (file, int(f.name) if numbers else label)
        for label, f in enumerate(folders)
        for file in sorted(f.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise UserError(f"{folder} has no class folders with images; wanted {folder}/<class>/<name>.png")
    labels = torch.tensor([label for _, label in files])
    return read_images([file for file, _ in files], image_size), labels, int(labels.max()) + 1


def main() -> None:
    """Command line of this module: export and import."""
    parser = argparse.ArgumentParser(prog="python -m datafree.bank", description="Image banks to and from class folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a bank as class folders of PNG")
    out.add_argument("bank", type=Path)
    out.add_argument("folder", type=Path)
    into = commands.add_parser("import", help="make a bank of class folders of images")
    into.add_argument("folder", type=Path)
    into.add_argument("bank", type=Path)
    into.add_argument("--dataset", required=True, help="the dataset whose classes the folders are")
    into.add_argument("--image_size", type=int, default=None, help="px (default: the dataset's)")
    into.add_argument("--shard_size", type=int, default=4096, help="images a shard")
    args = parser.parse_args()
    if args.command == "export":
        bank = ImageBank(args.bank, read_manifest(args.bank), create=False)
        print(f"{export_folders(bank, args.folder)} images -> {args.folder}")
        return
    from engine.data import dataset_info

    info = dataset_info(args.dataset, image_size=args.image_size)
    if (args.bank / "manifest.json").exists():
        raise UserError(f"{args.bank} is a bank already; give a new folder")
    images, labels, classes = import_folders(args.folder, info.image_size)
    if classes > info.num_classes:
        raise UserError(f"{args.folder} has {classes} classes, {info.name} has {info.num_classes}")
    bank = ImageBank(args.bank, Manifest(info.name, info.num_classes, info.image_size))
    for round, start in enumerate(range(0, len(images), args.shard_size)):
        part = slice(start, start + args.shard_size)
        bank.append("synthesize", round, images[part], labels[part])
    print(f"{len(images)} images of {classes} classes -> {args.bank}")


if __name__ == "__main__":
    run_command(main)
