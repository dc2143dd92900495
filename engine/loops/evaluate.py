"""What is measured of a student: its accuracy on a labelled split or, without one, its agreement with the teacher."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from engine.runtime.errors import UserError
from engine.runtime.processes import position_seed, seed_position
from engine.runtime.run import progress
from models.classifier import eval_mode

# What a classifier's predictions and features say, from tensors on the CPU.


BINS = 15
NEIGHBOURS = 5  # k of density and coverage


def confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64: how many images of the row's class are taken for the column's; labels and predicted (N,)."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def class_accuracy(counts: Tensor) -> Tensor:
    """(C,) in %, NaN for a class without images, of a confusion matrix (C, C)."""
    return 100 * counts.diagonal().double() / counts.sum(1)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in [0, 1] (Guo et al. 2017, 1706.04599, eq. 3): |accuracy - confidence| over bins of equal
    width of the confidence, each by its share of the images.

    Args:
        probabilities: (N, C); labels: (N,).
    """
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == labels).double()
    bin_of = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double).index_add(0, bin_of, correct - confidence)
    return float(gaps.abs().sum() / len(labels))


def density_coverage(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """How deep samples lie among real images, and how many of these have a sample near (Naeem et al. 2020, arXiv 2002.09797).

    Density (about 1 where the two agree, may exceed it) and coverage in [0, 1] of features (N, D), N > k, and (M, D).
    """
    real, generated = real.float(), generated.float()
    radii = torch.cdist(real, real).kthvalue(k + 1, 1).values  # the nearest is the image itself
    inside = torch.cdist(real, generated) < radii[:, None]
    return float(inside.sum(0).float().mean() / k), float(inside.any(1).float().mean())


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """The Fréchet distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500, there with Inception's features).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of a classifier's features (N, D) and (M, D); 0 for equal moments.
    Few samples raise it: compare numbers that were taken with equally many.
    """
    real, generated = real.double(), generated.double()
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), torch.cov(x.T)) for x in (real, generated))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace_root = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root)


@torch.no_grad()
def evaluate(classifier: nn.Module, split, batch_size: int = 500) -> dict[str, float]:
    """acc1 and acc5 in %, of a classifier in eval mode (its mode is restored).

    Args:
        classifier: images (B, 3, H, W) in [0, 1] -> logits (B, C).
        split: ``engine.data.splits.Split``.
    """
    hits = 0
    bar = progress(len(split), "evaluate", "img", delay=3)
    with eval_mode(classifier), bar:
        for images, labels in split.batches(batch_size):
            top = classifier(images).topk(min(5, split.num_classes), dim=1).indices
            found = (top == labels[:, None]).float()
            hits = hits + torch.stack([found[:, 0].sum(), found.sum()])
            bar.update(len(images))
    acc1, acc5 = (100 * hits.double() / len(split)).tolist()
    return {"acc1": round(acc1, 3), "acc5": round(acc5, 3)}


class Accuracy:
    """acc1 and acc5 on the test split."""

    name, words = "acc1", "acc1"

    def __init__(self, split):
        self.split = split

    def __call__(self, student: nn.Module, synthesizer, transfer, rounds: int) -> dict[str, float]:
        return evaluate(student, self.split)


class Agreement:
    """On how many synthetic images student and teacher name the same class, in %: what is told where no real image is.

    The images are those that the student learns from, as they are: of a transfer set up to ``MOST`` so far, evenly spaced;
    of a method that streams as many batches, drawn for this alone, as make ``MOST``. So it says how well the student follows
    the teacher there, and nothing of its accuracy on real images.

    Args:
        teacher: ``models.classifier.Classifier``.
        batch_size: images that a streaming method makes at a time.
        seed: of the run.
    """

    name, words = "agreement", "agreement with the teacher"
    MOST = 1000

    def __init__(self, teacher: nn.Module, batch_size: int, seed: int):
        self.teacher, self.batch_size, self.seed = teacher, batch_size, seed

    @torch.no_grad()
    def __call__(self, student: nn.Module, synthesizer, transfer, rounds: int) -> dict[str, float]:
        """Of a student after so many rounds.

        Args:
            synthesizer: see ``datafree.base.Synthesizer``; asked where ``transfer`` is None.
            transfer: ``engine.data.transfer_set.TransferSet``.
        """
        seed_position(self.seed, self.name, rounds)  # the next round begins with a position of its own
        alike = count = 0
        with eval_mode(student):
            for images in self._streamed(synthesizer, rounds) if transfer is None else transfer.spaced(self.MOST):
                alike = alike + (student(images).argmax(1) == self.teacher(images).argmax(1)).sum()
                count += len(images)
        return {self.name: round(100 * float(alike) / count, 3)}

    def _streamed(self, synthesizer, rounds: int) -> Iterable[Tensor]:
        batches = synthesizer.batches(self.batch_size, seed=position_seed(self.seed, self.name, rounds))
        return (images for images, _ in islice(batches, -(-self.MOST // self.batch_size)))


@torch.no_grad()
def predict(classifier: nn.Module, split, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """The logits (N, C) float32 of a classifier in eval mode, and the labels (N,), both on the CPU, in the split's order.

    Args:
        classifier, split: as of ``evaluate``.
    """
    logits, bar = [], progress(len(split), "predict", "img", delay=3)
    with eval_mode(classifier), bar:
        for images, _ in split.batches(batch_size):
            logits.append(classifier(images).float().cpu())
            bar.update(len(images))
    return torch.cat(logits), split.labels.cpu()


def check_finite(values: dict[str, float], where: str, advice: str) -> None:
    """Stops a run whose losses are no longer numbers, before anything of it is written.

    Raises:
        UserError: names the first bad value.
    """
    for name, value in values.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise UserError(f"{name} became {value} in {where}; what was written before is whole: {advice}")
