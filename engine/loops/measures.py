"""Measures of a student: accuracy on a labelled split or, without real images, agreement with the teacher."""

import math
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from engine.runtime.errors import UserError
from engine.runtime.processes import position_seed, seed_position
from engine.runtime.run import progress
from models.classifier import eval_mode

# Figures computed from a classifier's predictions and features, as tensors on the CPU.


BINS = 15
NEIGHBOURS = 5  # number k of nearest neighbours for density and coverage


def confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Returns the confusion matrix (C, C) int64: number of images of the row's class that are predicted as the column's.

    Args:
        labels, predicted: class ids (N,).
        num_classes: C.
    """
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def class_accuracy(counts: Tensor) -> Tensor:
    """Returns the accuracy of each class (C,) in % from a confusion matrix (C, C); NaN for a class without images."""
    return 100 * counts.diagonal().double() / counts.sum(1)


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Returns the expected calibration error in [0, 1] (Guo et al. 2017, 1706.04599, eq. 3).

    It is the mean of |accuracy - confidence| over ``BINS`` confidence bins of equal width, weighted by the number of images
    per bin.

    Args:
        probabilities: predicted probabilities (N, C).
        labels: class ids (N,).
    """
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == labels).double()
    bin_of = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.double).index_add(0, bin_of, correct - confidence)
    return float(gaps.abs().sum() / len(labels))


def density_coverage(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Returns density and coverage of generated images relative to real ones (Naeem et al. 2020, arXiv 2002.09797).

    Both use balls around the real images, each with the distance to its k-th nearest real neighbour as radius. Density is
    the mean number of balls that a generated image lies in, divided by k. It is about 1 for equal distributions and may be
    larger. Coverage, in [0, 1], is the fraction of real images with a generated image in their ball.

    Args:
        real: features (N, D), N > k.
        generated: features (M, D).
        k: number of nearest neighbours.
    """
    real, generated = real.float(), generated.float()
    radii = torch.cdist(real, real).kthvalue(k + 1, 1).values  # the nearest is the image itself
    inside = torch.cdist(real, generated) < radii[:, None]
    return float(inside.sum(0).float().mean() / k), float(inside.any(1).float().mean())


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Returns the Fréchet distance of two sets of features, as Gaussians (Heusel et al. 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), 0 for equal means m and covariances S. The paper uses Inception features;
    here they are a classifier's. Small samples raise the distance: compare only distances computed from equally many images.

    Args:
        real: features (N, D).
        generated: features (M, D).
    """
    real, generated = real.double(), generated.double()
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), torch.cov(x.T)) for x in (real, generated))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace_root = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root)


@torch.no_grad()
def evaluate(classifier: nn.Module, split, batch_size: int = 500) -> dict[str, float]:
    """Returns the accuracies acc1 and acc5 of a classifier in %. It runs in eval mode; its mode is restored afterwards.

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
    """Measure of a student after an epoch: acc1 and acc5 on the test split."""

    name, words = "acc1", "acc1"

    def __init__(self, split):
        self.split = split

    def __call__(self, student: nn.Module, synthesizer, transfer, rounds: int) -> dict[str, float]:
        return evaluate(student, self.split)


class Agreement:
    """Measure without real images: % of synthetic images for which student and teacher predict the same class.

    The images come from the student's training data and are not augmented. From a transfer set, up to ``MOST`` evenly spaced
    images are taken. A streaming method draws new batches for this measure alone, until they have ``MOST`` images. Agreement
    shows how well the student follows the teacher on these images. It does not estimate the accuracy on real images.

    Args:
        teacher: ``models.classifier.Classifier``.
        batch_size: number of images per batch of a streaming method.
        seed: seed of the run.
    """

    name, words = "agreement", "agreement with the teacher"
    MOST = 1000

    def __init__(self, teacher: nn.Module, batch_size: int, seed: int):
        self.teacher, self.batch_size, self.seed = teacher, batch_size, seed

    @torch.no_grad()
    def __call__(self, student: nn.Module, synthesizer, transfer, rounds: int) -> dict[str, float]:
        """Returns {"agreement": agreement in %}.

        Args:
            student: ``models.classifier.Classifier``.
            synthesizer: ``datafree.base.Synthesizer``; makes the images if ``transfer`` is None.
            transfer: ``engine.data.transfer_set.TransferSet``; None for a streaming method.
            rounds: number of rounds so far, from which the random numbers are seeded.
        """
        seed_position(self.seed, self.name, rounds)  # the next round seeds its own random stream
        alike = count = 0
        with eval_mode(student):
            for images in self._streamed(synthesizer, rounds) if transfer is None else transfer.evenly_spaced(self.MOST):
                alike = alike + (student(images).argmax(1) == self.teacher(images).argmax(1)).sum()
                count += len(images)
        return {self.name: round(100 * float(alike) / count, 3)}

    def _streamed(self, synthesizer, rounds: int) -> Iterable[Tensor]:
        batches = synthesizer.batches(self.batch_size, seed=position_seed(self.seed, self.name, rounds))
        return (images for images, _ in islice(batches, -(-self.MOST // self.batch_size)))


@torch.no_grad()
def predict(classifier: nn.Module, split, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Returns the logits (N, C) float32 of a classifier in eval mode and the labels (N,), on the CPU, in the split's order.

    Args:
        classifier, split: as for ``evaluate``.
    """
    logits, bar = [], progress(len(split), "predict", "img", delay=3)
    with eval_mode(classifier), bar:
        for images, _ in split.batches(batch_size):
            logits.append(classifier(images).float().cpu())
            bar.update(len(images))
    return torch.cat(logits), split.labels.cpu()


def check_finite(values: dict[str, float], where: str, advice: str) -> None:
    """Checks that all losses are finite. Call it before they are written.

    Args:
        values: losses and other figures by name.
        where: position in the run, for the error message.
        advice: what the user can do, for the error message.
    Raises:
        UserError: a value is NaN or infinite.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name} became {value} in {where}; files written so far are complete: {advice}")
