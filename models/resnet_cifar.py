"""The thin CIFAR ResNets of He et al. 2015 (arXiv 1512.03385), with depth 6n+2 in three stages, in two published forms.

- ``resnet8`` to ``resnet110``, ``resnet8x4``, ``resnet32x4``: shortcuts are 1x1 convolutions (option B). State-dict keys are
  those of the teachers of Contrastive Representation Distillation (Tian et al. 2019, arXiv 1910.10699).
- ``resnet20_he`` to ``resnet110_he``: the paper's own form. Shortcuts have no parameters (option A): they take every second
  pixel and set the new channels to zero. Half of the new channels come first and half last, as in the public checkpoints.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import conv3x3, init_kaiming, projection

NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)


class PaddedShortcut(nn.Module):
    """Shortcut of option A: (B, C, H, W) -> (B, out_channels, H/stride, W/stride); new channels are zero."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride, self.new_channels = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


def padding(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The shortcut without parameters: the identity if the shapes agree, else option A."""
    same = stride == 1 and in_channels == out_channels
    return nn.Identity() if same else PaddedShortcut(in_channels, out_channels, stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in_channels, H, W) -> (B, channels, H/stride, W/stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut=projection):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(nn.Module):
    """CIFAR ResNet with shortcuts of option B: images (B, 3, H, W) -> logits (B, num_classes); the last layer is ``fc``.

    Args:
        depth: 6n+2, with n blocks per stage.
        num_classes: number of logits.
        widths: channels of the stem and of the three stages.
    """

    head = "fc"
    shortcut = staticmethod(projection)

    def __init__(self, depth: int, num_classes: int, widths: tuple[int, int, int, int] = NARROW):
        super().__init__()
        assert depth % 6 == 2, f"depth {depth} is not 6n+2"
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        for stage in (1, 2, 3):
            first = BasicBlock(widths[stage - 1], widths[stage], 2 if stage > 1 else 1, self.shortcut)
            rest = [BasicBlock(widths[stage], widths[stage], 1, self.shortcut) for _ in range(depth // 6 - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.add_module(self.head, nn.Linear(widths[3], num_classes))
        init_kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.head)(self.pool(x).flatten(1))


class ResNetHe(ResNet):
    """CIFAR ResNet with shortcuts of option A; the last layer is ``linear``."""

    head = "linear"
    shortcut = staticmethod(padding)


def resnet8(num_classes: int) -> ResNet:
    return ResNet(8, num_classes)


def resnet20(num_classes: int) -> ResNet:
    return ResNet(20, num_classes)


def resnet32(num_classes: int) -> ResNet:
    return ResNet(32, num_classes)


def resnet56(num_classes: int) -> ResNet:
    return ResNet(56, num_classes)


def resnet110(num_classes: int) -> ResNet:
    return ResNet(110, num_classes)


def resnet8x4(num_classes: int) -> ResNet:
    return ResNet(8, num_classes, WIDE)


def resnet32x4(num_classes: int) -> ResNet:
    return ResNet(32, num_classes, WIDE)


def resnet20_he(num_classes: int) -> ResNetHe:
    return ResNetHe(20, num_classes)


def resnet32_he(num_classes: int) -> ResNetHe:
    return ResNetHe(32, num_classes)


def resnet44_he(num_classes: int) -> ResNetHe:
    return ResNetHe(44, num_classes)


def resnet56_he(num_classes: int) -> ResNetHe:
    return ResNetHe(56, num_classes)


def resnet110_he(num_classes: int) -> ResNetHe:
    return ResNetHe(110, num_classes)
