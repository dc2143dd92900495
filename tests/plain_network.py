"""A classifier without BatchNorm layers."""

from torch import nn


def plain(num_classes: int = 10) -> nn.Module:
    """Two convolutions with group norms, pooled, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.GroupNorm(2, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )
