"""torchvision's ImageNet networks without weights, registered as ``<name>_imagenet``."""

from collections.abc import Callable

import torchvision
from torch import nn


def _factory(name: str) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)

    return build


resnet18 = _factory("resnet18")
resnet34 = _factory("resnet34")
resnet50 = _factory("resnet50")
mobilenet_v2 = _factory("mobilenet_v2")
vgg11_bn = _factory("vgg11_bn")
efficientnet_b0 = _factory("efficientnet_b0")
convnext_tiny = _factory("convnext_tiny")
vit_b_16 = _factory("vit_b_16")  # 224 px only: its position embedding is fixed


# MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) as this field's CIFAR tables use it.
#
# It is torchvision's ImageNet network with its strides unchanged. At 32 px its last feature map is therefore 1x1.


def mobilenetv2(num_classes: int) -> nn.Module:
    return torchvision.models.mobilenet_v2(weights=None, num_classes=num_classes)
