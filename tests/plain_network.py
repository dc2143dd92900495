"""A small classifier, by default without BatchNorm layers."""

from functools import partial

from torch import nn


def plain(num_classes: int = 10, batch_norm: bool = False) -> nn.Module:
    """A network of two convolutions with norms, average pooling, and a linear layer."""
    norm = nn.BatchNorm2d if batch_norm else partial(nn.GroupNorm, 2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        norm(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )
