"""torchvision's ImageNet networks without weights, registered as ``<name>_imagenet``.

``mobilenet_v2`` (Sandler et al. 2018, arXiv 1801.04381) is also registered as ``mobilenetv2``, the name in this field's CIFAR
tables. Its strides are unchanged, so that at 32 px its last feature map is 1x1.
"""

from functools import partial

from torchvision.models import get_model

resnet18 = partial(get_model, "resnet18", weights=None)
resnet34 = partial(get_model, "resnet34", weights=None)
resnet50 = partial(get_model, "resnet50", weights=None)
mobilenet_v2 = partial(get_model, "mobilenet_v2", weights=None)
vgg11_bn = partial(get_model, "vgg11_bn", weights=None)
efficientnet_b0 = partial(get_model, "efficientnet_b0", weights=None)
convnext_tiny = partial(get_model, "convnext_tiny", weights=None)
vit_b_16 = partial(get_model, "vit_b_16", weights=None)  # 224 px only: its position embedding is fixed
