"""What a classifier's predictions say, from labels and logits on the CPU."""

import torch
from torch import Tensor

BINS = 15


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
