"""Measures of a run's images: how its teacher classifies them, and how they compare with the real test images.

The measures are of up to ``MOST`` evenly spaced images that the student of a run learnt from. They are compared with as
many test images, which are used only to report. Density, coverage and diversity are measured in the features of the
teacher's penultimate layer. They are empty if there are too few test images, or if these are all the same.

    wanted        % of the images that the teacher classifies as their label; empty if a method has no labels
    classes       entropy of the teacher's predicted classes, as a share of its maximum: 1 all equally frequent, 0 one class
    density       how deep the images lie among the real images; about 1 if both have the same distribution
    coverage      share of the real images that have a synthetic image nearby, in [0, 1]
    BN distance   sum over the teacher's BN layers of |mean - running mean| + |variance - running variance|, of all images
    diversity     mean distance of an image to its nearest other image, divided by that of the real images
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.datasets import dataset_info
from engine.data.image_bank import find_bank, open_bank
from engine.data.splits import load_split
from engine.loops.measures import NEIGHBOURS, density_coverage
from engine.loops.stages import STREAMED, first_per_class
from engine.networks.build import load_teacher, own_weights
from engine.report.results import DATASET_FLAGS, bank_stages, dataset_flags, flags_of
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_tensors
from models.classifier import layers_with_statistics
from registry import DATASETS, MODELS

MOST, BATCH = 1000, 250
TEACHER = ("teacher", "teacher_ckpt", "teacher_mean", "teacher_std")
FLAGS = DATASET_FLAGS | {
    "teacher": str, "teacher_ckpt?": str, "teacher_mean?": [float], "teacher_std?": [float], "init_bank?": str,
    "student_images_per_class?": int,
    "init_variants?": str,
}  # fmt: skip


def measured(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds "image_figures" to the results of run folders; a result that has them from a file of lines keeps them.

    Raises:
        UserError: the teacher, the test images or the images of a run are missing.
    """
    found, known = [], {}
    for result in results:
        folder = Path(result["path"])
        if "image_figures" not in result and result["method"] != "scratch" and folder.is_dir():
            result = result | {"image_figures": figures(folder, known)}
        found.append(result)
    return found


def figures(folder: Path, known: dict[str, Any]) -> dict[str, float | int | None]:
    """Computes the measures of the images of one run folder.

    Args:
        known: cache of teachers and of their features of the test images; it is extended here.
    """
    images, labels = training_images(folder)
    args = flags_of(folder, FLAGS)
    key = json.dumps([*dataset_flags(args), *(args.get(name) for name in TEACHER)])
    if key not in known:
        teacher, info = open_teacher(args)
        split = load_split(info, "test", "cpu")
        chosen = evenly_spaced(len(split), MOST)
        real = [seen for seen, _ in split.batches(BATCH, chosen)]
        known[key] = teacher, features(teacher, real)
    teacher, real = known[key]
    return compare(teacher, [part.float() / 255 for part in images.split(BATCH)], labels, real)


def open_teacher(args: dict[str, Any]):
    """Loads the teacher of a run on the CPU, and describes its dataset, from the run's flags."""
    info = dataset_info(DATASETS, *dataset_flags(args))
    if own := own_weights(args["teacher"], info.name, args.get("teacher_ckpt")):
        info = info.adapted_to_model(args["teacher"], own, keep_size=args.get("image_size") is not None)
    name, *how = (args.get(name) for name in TEACHER)
    return load_teacher(MODELS, name, info, torch.device("cpu"), *how), info


def training_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Up to ``MOST`` images (N, 3, H, W) uint8 that a run's student learnt from, and their labels (N,), -1 for none.

    In a run with a bank they are from the initial images, the images of the rounds, and the kept variants. A run that
    streams its images has stored only the last ones.

    Raises:
        UserError: the run has stored no images.
    """
    args = flags_of(folder, FLAGS)
    if (folder / STREAMED).exists():
        kept = load_tensors(folder / STREAMED)
        return kept["images"][:MOST], kept["labels"][:MOST]
    read = [bank.read(stage) for bank, stage in bank_stages(folder, args.get("init_bank"))]
    most = args.get("student_images_per_class")
    seen = [first_per_class(columns["labels"], most or len(columns["labels"])).nonzero().flatten() for columns in read]
    rows = [(columns, row) for columns, positions in zip(read, seen) for row in positions.tolist()]
    decided = sorted(folder.glob("filter_*.safetensors"))
    variants = find_bank(Path(args.get("init_variants") or folder), "variants")
    if decided and (variants / "manifest.json").exists():
        columns = open_bank(variants).read("augment")
        rows += [(columns, row) for row in load_tensors(decided[0])["keep"].nonzero().flatten().tolist()]
    if not rows:
        raise UserError(
            f"{folder} has neither a bank nor {STREAMED}; leave it out, or run it again (earlier versions stored no "
            "streamed images)"
        )
    rows = [rows[k] for k in evenly_spaced(len(rows), MOST).tolist()]
    images = torch.stack([columns["images"][[row]][0] for columns, row in rows])
    return images, torch.stack([columns["labels"][row] for columns, row in rows])


def evenly_spaced(count: int, most: int) -> Tensor:
    """Up to ``most`` evenly spaced positions in 0 .. count - 1."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


@torch.no_grad()
def features(teacher: nn.Module, batches: list[Tensor]) -> Tensor:
    """The teacher's features (N, D) of batches of images (B, 3, H, W) in [0, 1]."""
    return torch.cat([teacher(images, return_features=True).features for images in batches]).float()


@torch.no_grad()
def compare(teacher: nn.Module, batches: list[Tensor], labels: Tensor, real: Tensor) -> dict[str, float | int | None]:
    """Computes the measures that the module's docstring defines.

    Args:
        batches: batches of images (B, 3, H, W) in [0, 1].
        labels: labels of the images (N,), -1 for none.
        real: features (M, D) of real images; min(N, M) of both kinds are compared.
    """
    with Statistics(teacher) as statistics:
        told = [teacher(images, return_features=True) for images in batches]
    said, found = torch.cat([out.logits for out in told]).argmax(1), torch.cat([out.features for out in told]).float()
    counts = said.bincount(minlength=teacher.num_classes).double() / len(said)
    count = min(len(found), len(real))
    mine, theirs = (values[evenly_spaced(len(values), count)] for values in (found, real))
    density, coverage = density_coverage(theirs, mine) if count > NEIGHBOURS else (None, None)
    differ = not torch.allclose(theirs, theirs[:1])  # False for a single image too
    spacing = nearest(theirs) if differ else 0.0  # 0 too if the test split has every image twice
    named = labels >= 0
    return {
        "count": len(said),
        "wanted": round(100 * float((said == labels)[named].double().mean()), 2) if named.any() else None,
        "classes": round(float(torch.special.entr(counts).sum()) / math.log(max(2, teacher.num_classes)), 4),
        "density": None if density is None else round(density, 4),
        "coverage": None if coverage is None else round(coverage, 4),
        "bn_distance": statistics.distance(),
        "diversity": round(nearest(mine) / spacing, 4) if spacing else None,
    }


def nearest(points: Tensor) -> float:
    """Mean distance from a point to its nearest other point, for points (N, D)."""
    return float(torch.cdist(points, points).fill_diagonal_(torch.inf).amin(1).mean())


class Statistics:
    """Context that collects the mean and variance at the input of each BN layer that runs, over all batches."""

    def __init__(self, network: nn.Module):
        self.layers, self.sums = layers_with_statistics(network), {}

    def __enter__(self) -> "Statistics":
        self.hooks = [layer.register_forward_pre_hook(self._add) for layer in self.layers]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _add(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].double().transpose(0, 1).flatten(1)
        added = (values.shape[1], values.sum(1), values.square().sum(1))
        self.sums[layer] = [before + more for before, more in zip(self.sums.get(layer, (0, 0, 0)), added)]

    def distance(self) -> float | None:
        """Distance of the collected statistics from the running statistics, summed over layers; None if none ran."""
        total = 0.0
        for layer, (count, sums, squares) in self.sums.items():
            mean = sums / count
            variance = squares / count - mean.square()
            total += float((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())
        return round(total, 3) if self.sums else None
