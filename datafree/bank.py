"""The image bank: synthetic images with labels, in append-only uint8 shards that are whole or absent.

    bank/manifest.json                     whose images these are
    bank/<stage>-<round>.safetensors       images (n, 3, H, W) uint8, labels (n,) int64, and any further columns

A shard is named by the position that made it. Writing a position again (after a kill) replaces it by the same bytes,
so nothing is ever made twice or lost. Reading maps the shards, whatever their size, and reads what is indexed. In use the
images live on the device or in host memory where they fit, else in the mapped shards: ``TransferSet``.

    python -m datafree.bank export BANK FOLDER      class folders of PNG, for people and other tools
    python -m datafree.bank import FOLDER BANK --dataset cifar10
"""

import argparse
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from datafree.mapped import MappedImages, prefetch
from engine.data import dataset_info, memory_limit
from engine.errors import UserError, run_command
from engine.files import load_tensors, read_json, save_tensors, write_json

FORMAT = 1
COPIED_AT_ONCE = 256  # images on their way from the shards to memory
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

    def append(
        self, stage: str, round: int, images: Tensor, labels: Tensor, **columns: Tensor
    ) -> tuple[MappedImages, Tensor]:
        """Writes one shard of images (n, 3, H, W), float in [0, 1] or uint8; returns them, mapped, and the labels."""
        images = images if images.dtype == torch.uint8 else to_uint8(images)
        size = self.manifest.image_size
        assert images.shape[1:] == (3, size, size), images.shape
        save_tensors(self.shard(stage, round), {"images": images, "labels": labels, **columns})
        return MappedImages.of([load_tensors(self.shard(stage, round))["images"]]), labels

    def rounds(self, stage: str) -> list[int]:
        """The rounds of a stage that are present, in order."""
        found = (SHARD_NAME.match(f.name) for f in self.path.iterdir())
        return sorted(int(m["round"]) for m in found if m and m["stage"] == stage)

    def read(self, stage: str, stop: int | None = None) -> dict[str, MappedImages | Tensor]:
        """All columns of a stage's shards in order: rounds 0 .. stop - 1 (default: all that are there).

        Returns:
            "images" as ``MappedImages`` (N, 3, H, W), "labels" and any other column as a tensor (N,).
        Raises:
            UserError: a shard is missing or damaged.
        """
        present = self.rounds(stage)
        wanted = range(len(present) if stop is None else stop)
        if missing := sorted(set(wanted) - set(present)):
            raise UserError(f"{self.shard(stage, missing[0])} is missing; make the stage again with --redo {stage}")
        return self.open_shards([self.shard(stage, round) for round in wanted])

    def read_all(self) -> dict[str, MappedImages | Tensor]:
        """images and labels of every shard there is, stages in alphabetical order."""
        columns = self.open_shards(sorted(f for f in self.path.iterdir() if SHARD_NAME.match(f.name)))
        return {name: columns[name] for name in ("images", "labels")}

    def open_shards(self, files: list[Path]) -> dict[str, MappedImages | Tensor]:
        """The columns that all of these files have, in order; see ``read``.

        Raises:
            UserError: one is missing or damaged, or holds images or labels that do not fit the manifest.
        """
        size, classes = self.manifest.image_size, self.manifest.num_classes
        nothing = {"images": torch.empty(0, 3, size, size, dtype=torch.uint8), "labels": torch.empty(0, dtype=torch.long)}
        shards = [load_tensors(file) for file in files] or [nothing]
        for file, shard in zip(files, shards):
            images, labels = shard["images"], shard["labels"]
            if images.shape != (len(labels), 3, size, size) or images.dtype != torch.uint8:
                raise UserError(f"{file} does not hold a label and a uint8 image of {size} px each; make it again")
        names = [name for name in shards[0] if name != "images" and all(name in shard for shard in shards)]
        columns = {name: torch.cat([shard[name] for shard in shards]) for name in names}
        labels = columns["labels"]
        if len(wrong := labels[(labels < 0) | (labels >= classes)]):
            raise UserError(
                f"{self.path} has a label {int(wrong[0])} of {classes} classes; make it again, or give another bank"
            )
        return {"images": MappedImages.of([shard["images"] for shard in shards]), **columns}


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
    """The images that a student learns from, with room for those still to come.

    They live where they fit, which is decided once: on the device of the networks (at most half of its free memory), in host
    memory (likewise), else nowhere but in the shards. From the last two, batches are read ahead of the steps.

    Args:
        capacity: number of images it will hold in the end.
        device: where the networks are.
    """

    def __init__(self, capacity: int, image_size: int, device: torch.device):
        self.capacity, self.device, self.count = capacity, device, 0
        self.bytes = capacity * 3 * image_size**2
        fits = device.type == "cuda" and self.bytes <= torch.cuda.mem_get_info(device)[0] // 2
        self.home = device if fits else torch.device("cpu")
        self.labels = torch.empty(capacity, dtype=torch.long, device=self.home)
        self.mapped = not fits and self.bytes > memory_limit(self.home)
        if self.mapped:
            nothing = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
            self.images = MappedImages([nothing.numpy()], torch.empty(capacity, 2, dtype=torch.int32))
        else:
            self.images = torch.empty(capacity, 3, image_size, image_size, dtype=torch.uint8, device=self.home)

    def __len__(self) -> int:
        return self.count

    @property
    def description(self) -> str:
        """Room and home, in one line."""
        place = "in mapped shards" if self.mapped else "in host memory" if self.home.type == "cpu" else f"on {self.home}"
        return f"transfer set: {self.capacity} images, {self.bytes / 1e6:.0f} MB, {place}"

    def add(self, images: MappedImages | Tensor, labels: Tensor) -> None:
        """Appends images (n, 3, H, W) uint8 and labels (n,); a mapped set holds on to ``images`` and copies nothing."""
        end = self.count + len(images)
        assert images.dtype == torch.uint8 and end <= self.capacity, f"{end} images for room for {self.capacity}"
        if self.mapped:
            self.images.refer(self.count, images if isinstance(images, MappedImages) else MappedImages.of([images.cpu()]))
        else:
            for part, target in zip(images.split(COPIED_AT_ONCE), self.images[self.count : end].split(COPIED_AT_ONCE)):
                target.copy_(part)
        self.labels[self.count : end] = labels
        self.count = end

    def batches(
        self, batch_size: int, augment: Callable[[Tensor], Tensor], *, seed: int, rank: int = 0, count: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless shuffled passes: images float32 (B, 3, H, W) in [0, 1] channels_last, labels (B,).

        The last batch of a pass is filled from the next one, so every batch has ``batch_size`` images.

        Args:
            batch_size: images a step, of all processes together.
            augment: uint8 images on the device -> the same; draws from the global random stream, in the caller's thread.
            seed: decides the order, which depends neither on that stream nor on where the images live.
            rank, count: of these processes this one gets every ``count``-th image of each batch, from ``rank`` on.
        """
        drawn = self._drawn(batch_size, seed, rank, count)
        for images, labels in prefetch(drawn) if self.mapped or self.home != self.device else drawn:
            images = augment(images.to(self.device, non_blocking=True))
            yield (
                images.to(torch.float32, memory_format=torch.channels_last).div_(255),
                labels.to(self.device, non_blocking=True),
            )

    def _drawn(self, batch_size: int, seed: int, rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images (b, 3, H, W) uint8 and labels (b,) of each batch: at home, pinned on the way to a GPU."""
        assert self.count, "no images to draw from"
        generator, total = torch.Generator().manual_seed(seed), self.count
        order = torch.empty(0, dtype=torch.long, device=self.home)
        while True:
            while len(order) < batch_size:
                order = torch.cat([order, torch.randperm(total, generator=generator).to(self.home)])
            chosen, order = order[:batch_size][rank::count], order[batch_size:]
            # index_select copies whole images, twenty times as fast as images[chosen] does on a CPU.
            images = self.images[chosen] if self.mapped else self.images.index_select(0, chosen)
            batch = images, self.labels[chosen]
            yield batch if self.home == self.device else (batch[0].pin_memory(), batch[1].pin_memory())


def export_folders(bank: ImageBank, folder: Path) -> int:
    """Writes every image as ``folder/<class id>/<position>.png``; returns how many."""
    columns = bank.read_all()
    for position, label in enumerate(tqdm(columns["labels"].tolist(), "export", unit="img")):
        file = Path(folder) / str(label) / f"{position:07d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(columns["images"][position].permute(1, 2, 0).numpy()).save(file)
    return len(columns["labels"])


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
    info = dataset_info(args.dataset, image_size=args.image_size)
    if args.bank.exists():
        raise UserError(f"{args.bank} is there already; give a new folder")
    files, labels = class_files(args.folder)
    classes = int(labels.max()) + 1
    if classes > info.num_classes:
        raise UserError(f"{args.folder} has {classes} classes, {info.name} has {info.num_classes}")
    unfinished = args.bank.with_name(f"{args.bank.name}.tmp")  # whole or absent: a damaged image may come late
    shutil.rmtree(unfinished, ignore_errors=True)
    bank = ImageBank(unfinished, Manifest(info.name, info.num_classes, info.image_size))
    for round, start in enumerate(range(0, len(files), args.shard_size)):
        part = slice(start, start + args.shard_size)
        bank.append("synthesize", round, read_images(files[part], info.image_size), labels[part])
    os.replace(unfinished, args.bank)
    print(f"{len(files)} images of {classes} classes -> {args.bank}")


if __name__ == "__main__":
    run_command(main)
