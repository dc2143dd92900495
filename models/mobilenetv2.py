"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) as this field's CIFAR tables use it.

That is torchvision's ImageNet network unchanged, strides included: at 32 px its last feature map is 1x1.
"""

import torchvision
from torch import nn


def mobilenetv2(num_classes: int) -> nn.Module:
    return torchvision.models.mobilenet_v2(weights=None, num_classes=num_classes)
