"""Wide ResNets (Zagoruyko and Komodakis 2016, arXiv 1605.07146): pre-activation, no dropout, like the field's teachers."""

from torch import Tensor, nn

from models.resnet import conv3x3, init_kaiming


class PreActBlock(nn.Module):
    """BN, ReLU and convolution, twice: (B, in_channels, H, W) -> (B, channels, H/stride, W/stride).

    If the number of channels changes, the shortcut is a 1x1 convolution on the output of the first BN and ReLU.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        same = in_channels == channels
        self.convShortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class Stage(nn.Module):
    """``depth`` blocks under the state-dict key ``layer``; the first block changes channels and size."""

    def __init__(self, in_channels: int, channels: int, depth: int, stride: int):
        super().__init__()
        rest = [PreActBlock(channels, channels, 1) for _ in range(depth - 1)]
        self.layer = nn.Sequential(PreActBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes).

    Args:
        depth: 6n+4, with n blocks per stage.
        widen: factor by which the 16, 32 and 64 channels of the stages are multiplied.
        num_classes: number of logits.
    """

    last_block = "block3"  # followed by a BN and a ReLU; see ``models.classifier``

    def __init__(self, depth: int, widen: int, num_classes: int):
        super().__init__()
        assert depth % 6 == 4, f"depth {depth} is not 6n+4"
        self.conv1 = conv3x3(3, 16)
        self.block1 = Stage(16, 16 * widen, depth // 6, stride=1)
        self.block2 = Stage(16 * widen, 32 * widen, depth // 6, stride=2)
        self.block3 = Stage(32 * widen, 64 * widen, depth // 6, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * widen, num_classes)
        init_kaiming(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        x = self.relu(self.bn1(x))
        return self.fc(self.pool(x).flatten(1))


def wrn16_1(num_classes: int) -> WideResNet:
    return WideResNet(16, 1, num_classes)


def wrn16_2(num_classes: int) -> WideResNet:
    return WideResNet(16, 2, num_classes)


def wrn40_1(num_classes: int) -> WideResNet:
    return WideResNet(40, 1, num_classes)


def wrn40_2(num_classes: int) -> WideResNet:
    return WideResNet(40, 2, num_classes)
