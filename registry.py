"""Every network, dataset and method by name, as flat literal tables: the only place where a method is named.

Values are ``"module:attribute"``, imported when chosen, so that ``--help`` loads neither networks nor diffusers.
"""

import difflib
import importlib
from typing import Any

from engine.errors import UserError

METHODS = {
    "csd": "datafree.csd:CSD",
    "dda": "datafree.dda:DDA",
}

# Factories are called as factory(num_classes=...). Names without a suffix are the field's CIFAR networks.
MODELS = {
    "wrn16_1": "models.wrn:wrn16_1",
    "wrn16_2": "models.wrn:wrn16_2",
    "wrn40_1": "models.wrn:wrn40_1",
    "wrn40_2": "models.wrn:wrn40_2",
    "resnet18": "models.resnet:resnet18",
    "resnet34": "models.resnet:resnet34",
    "resnet50": "models.resnet:resnet50",
    "resnet8": "models.resnet_cifar:resnet8",
    "resnet20": "models.resnet_cifar:resnet20",
    "resnet32": "models.resnet_cifar:resnet32",
    "resnet56": "models.resnet_cifar:resnet56",
    "resnet110": "models.resnet_cifar:resnet110",
    "resnet8x4": "models.resnet_cifar:resnet8x4",
    "resnet32x4": "models.resnet_cifar:resnet32x4",
    "resnet20_he": "models.resnet_cifar:resnet20_he",
    "resnet32_he": "models.resnet_cifar:resnet32_he",
    "resnet44_he": "models.resnet_cifar:resnet44_he",
    "resnet56_he": "models.resnet_cifar:resnet56_he",
    "resnet110_he": "models.resnet_cifar:resnet110_he",
    "vgg8": "models.vgg:vgg8",
    "vgg11": "models.vgg:vgg11",
    "vgg13": "models.vgg:vgg13",
    "mobilenetv2": "models.mobilenetv2:mobilenetv2",
    "shufflenetv2": "models.shufflenetv2:shufflenetv2",
    "resnet18_imagenet": "models.imagenet:resnet18",
    "resnet34_imagenet": "models.imagenet:resnet34",
    "resnet50_imagenet": "models.imagenet:resnet50",
    "mobilenet_v2_imagenet": "models.imagenet:mobilenet_v2",
    "vgg11_bn_imagenet": "models.imagenet:vgg11_bn",
    "efficientnet_b0_imagenet": "models.imagenet:efficientnet_b0",
    "convnext_tiny_imagenet": "models.imagenet:convnext_tiny",
    "vit_b_16_imagenet": "models.imagenet:vit_b_16",
}

# How real data is found, shaped and normalized.
DATASETS = {}


def lookup(table: dict[str, Any], name: str, kind: str) -> Any:
    """The entry ``name`` of one of the tables above.

    Raises:
        UserError: there is none; the message lists the nearest names, or all.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"unknown {kind} '{name}'; {hint}known: {', '.join(sorted(table))}")


def resolve(path: str) -> Any:
    """Imports ``"package.module:attribute"``."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
