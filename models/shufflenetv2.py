"""ShuffleNetV2 1x for CIFAR (Ma et al. 2018, arXiv 1807.11164), with a 1x1 stem and no max-pooling.

The state-dict keys are those of the field's published teachers.
"""

import torch
from torch import Tensor, nn

CHANNELS = (116, 232, 464)
DEPTHS = (3, 7, 3)


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    """A depthwise 3x3 convolution: one filter per channel, without bias."""
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class ShuffledHalves(nn.Module):
    """Joins two branches, whose channels alternate in the output: two tensors (B, C, H, W) -> (B, 2C, H, W)."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.stack((left, right), dim=2).flatten(1, 2)


class BasicBlock(nn.Module):
    """Passes on one half of the channels and applies three convolutions to the other: (B, C, H, W) -> same shape."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv1x1(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = depthwise(half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(half, half), nn.BatchNorm2d(half)
        self.relu1, self.relu3 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.shuffle = ShuffledHalves()

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = self.relu1(self.bn1(self.conv1(right)))
        right = self.bn2(self.conv2(right))
        return self.shuffle(left, self.relu3(self.bn3(self.conv3(right))))


class DownBlock(nn.Module):
    """Halves the size in two branches, both on all channels: (B, in_channels, H, W) -> (B, out_channels, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = out_channels // 2
        self.conv1, self.bn1 = depthwise(in_channels, stride=2), nn.BatchNorm2d(in_channels)
        self.conv2, self.bn2 = conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = depthwise(half, stride=2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv1x1(half, half), nn.BatchNorm2d(half)
        self.relu2, self.relu3, self.relu5 = (nn.ReLU(inplace=True) for _ in range(3))
        self.shuffle = ShuffledHalves()

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.relu3(self.bn3(self.conv3(x)))
        right = self.relu5(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return self.shuffle(left, right)


class ShuffleNetV2(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes)."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv1x1(3, 24), nn.BatchNorm2d(24), nn.ReLU(inplace=True)
        widths = (24, *CHANNELS)
        for stage, depth in enumerate(DEPTHS):
            down = DownBlock(widths[stage], widths[stage + 1])
            rest = [BasicBlock(widths[stage + 1]) for _ in range(depth)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(down, *rest))
        self.conv2, self.bn2, self.relu2 = conv1x1(CHANNELS[-1], 1024), nn.BatchNorm2d(1024), nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.pool(x).flatten(1))


def shufflenetv2(num_classes: int) -> ShuffleNetV2:
    return ShuffleNetV2(num_classes)
