"""The image bank: synthetic images with labels, in append-only uint8 shards that are whole or absent.

    bank/manifest.json                     whose images these are
    bank/<stage>-<round>.safetensors       images (n, 3, H, W) uint8, labels (n,) int64, and any further columns

A shard is named by the position that made it. Writing a position again (after a kill) replaces it by the same bytes,
so nothing is ever made twice or lost. Reading maps the shards, whatever their size, and reads what is indexed. In use the
images live on the device or in host memory where they fit, else in the mapped shards: ``TransferSet``.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.data.mapped import MappedImages
from engine.runtime import sums
from engine.runtime.errors import UserError
from engine.runtime.files import load_tensors, read_json, save_tensors, write_json
from engine.runtime.schema import SIZE, Array, require

FORMAT = 1
MANIFEST = {
    "dataset": str, "num_classes": SIZE, "image_size": SIZE, "teacher?": str, "teacher_digest?": str,
    "method": str, "external_prior": str, "format": int,
}  # fmt: skip
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
            sums.keep(self.path)
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
        if stop is None and (gone := sums.missing(self.path, [f"{stage}-*.safetensors"])):
            raise UserError(f"{gone[0]} is missing; make the stage again with --redo {stage}")
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
        columns = {"images": Array(torch.uint8, (None, 3, size, size)), "labels": Array(torch.int64, (None,))}
        for file, shard in zip(files, shards):
            require(shard, columns | {"source_index?": Array(torch.int64, (None,))}, str(file))
            if len({len(column) for column in shard.values() if column.dim()} | {len(shard["images"])}) > 1:
                raise UserError(f"{file} does not hold as many labels as images; restore it from a copy, or make it again")
        names = [name for name in shards[0] if name != "images" and all(name in shard for shard in shards)]
        columns = {name: torch.cat([shard[name] for shard in shards]) for name in names}
        labels = columns["labels"]
        if len(wrong := labels[(labels < 0) | (labels >= classes)]):
            raise UserError(
                f"{self.path} has a label {int(wrong[0])} of {classes} classes; make it again, or give another bank"
            )
        if "source_index" in columns and len(index := columns["source_index"]) and int(index.min()) < 0:
            raise UserError(f"{self.path} has a source_index below 0; make it again")
        return {"images": MappedImages.of([shard["images"] for shard in shards]), **columns}


def find_bank(path: Path, folder: str = "bank") -> Path:
    """A bank's folder, given as such or by the run folder whose ``folder`` it is."""
    path = Path(path)
    return path / folder if not (path / "manifest.json").exists() and (path / folder).is_dir() else path


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bank folder.

    Raises:
        UserError: missing, damaged, or of a newer format.
    """
    file = Path(path) / "manifest.json"
    value = read_json(file)
    if not isinstance(value, dict) or value.get("format") != FORMAT or not set(value) <= set(Manifest.__dataclass_fields__):
        raise UserError(f"{file} is not the manifest of an image bank of format {FORMAT}; give a bank made by this version")
    require(value, MANIFEST, str(file))
    return Manifest(**value)
