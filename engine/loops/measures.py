"""What a classifier's predictions and features say, from tensors on the CPU."""

import torch
from torch import Tensor

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
