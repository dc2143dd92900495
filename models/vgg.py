"""VGG with BN for CIFAR (Simonyan and Zisserman 2014, arXiv 1409.1556), with the state-dict keys of the field's teachers.

At 32 px the published networks do not pool before the last block, whose feature map is 4x4. From 64 px on they do.
"""

from torch import Tensor, nn

from models.resnet import init_kaiming

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes).

    Args:
        depths: number of convolutions in each of the five blocks.
        num_classes: number of logits.
    """

    def __init__(self, depths: tuple[int, int, int, int, int], num_classes: int):
        super().__init__()
        channels = 3
        for i, (depth, width) in enumerate(zip(depths, CHANNELS)):
            layers = []
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            self.add_module(f"block{i}", nn.Sequential(*layers))
        self.pool = nn.MaxPool2d(2)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        init_kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.block0(images))
        x = self.pool(self.block1(x))
        x = self.pool(self.block2(x))
        x = self.block3(x)
        if images.shape[-1] >= 64:
            x = self.pool(x)
        return self.classifier(self.global_pool(self.block4(x)).flatten(1))


def vgg8(num_classes: int) -> VGG:
    return VGG((1, 1, 1, 1, 1), num_classes)


def vgg11(num_classes: int) -> VGG:
    return VGG((1, 1, 2, 2, 2), num_classes)


def vgg13(num_classes: int) -> VGG:
    return VGG((2, 2, 2, 2, 2), num_classes)
