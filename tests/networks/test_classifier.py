"""The classifier that wraps every network: features, normalization, and that wrapping does not change the network."""

import copy
import weakref

import pytest
import torch
import torchvision
from torch import nn

from models.classifier import Classifier, Output, eval_mode, frozen, weights_fixed
from registry import MODELS
from tests.conftest import build_network
from tests.networks.test_networks import PUBLISHED, on_meta, shapes

HAS_RELU_MAP = [name for name in MODELS if name.startswith(("wrn", "resnet", "vgg8", "vgg11", "vgg13", "shufflenet"))]
HAS_RELU_MAP.remove("vgg11_bn_imagenet")  # two hidden layers lie between its feature map and its features
SLOW = {"vgg11_bn_imagenet", "vit_b_16_imagenet"}  # hundreds of MB of gradients, and 224 px


def wrap(network: nn.Module, num_classes: int = 10, image_size: int = 32) -> Classifier:
    return Classifier(network, num_classes, image_size, (0.49, 0.48, 0.45), (0.20, 0.20, 0.20), name="net")


def last_linear(network: nn.Module) -> nn.Linear:
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


@pytest.mark.parametrize("name", MODELS)
def test_features_and_gradients_of_every_model(name):
    size = 224 if name.startswith("vit") else 32
    classifier = frozen(wrap(build_network(name, 10), image_size=size))
    images = torch.rand(1, 3, size, size)
    out = classifier(images, return_features=True)
    assert isinstance(out, Output)
    assert out.logits.shape == (1, 10) and out.features.shape == (1, classifier.feature_dim)
    torch.testing.assert_close(last_linear(classifier.network)(out.features), out.logits)
    torch.testing.assert_close(classifier(images), out.logits)
    if name.startswith("vit"):
        assert out.feature_map is None and classifier.feature_map_shape is None
    else:
        assert tuple(out.feature_map.shape[1:]) == classifier.feature_map_shape
    if name in HAS_RELU_MAP:
        assert out.feature_map.min() >= 0
        torch.testing.assert_close(out.feature_map.mean((2, 3)), out.features)
    if name not in SLOW:
        network = classifier.network.train().requires_grad_(True)
        logits = network(torch.rand(2, 3, size, size))
        assert logits.shape == (2, 10)
        logits.square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "dim", "feature_map"),
    [
        ("convnext_tiny", 768, (768, 7, 7)),  # has a norm between pooling and head
        ("swin_t", 768, (768, 7, 7)),
        ("densenet121", 1024, (1024, 7, 7)),  # pools by a function
        ("squeezenet1_1", 512, (512, 13, 13)),  # its head is a convolution
        ("mobilenet_v3_small", 1024, (576, 7, 7)),
        ("vgg11_bn", 4096, (512, 14, 14)),  # before the max-pool that ends its container
    ],
)
def test_where_features_are_at_224_px(name, dim, feature_map):
    with torch.device("meta"):
        classifier = wrap(torchvision.models.get_model(name, weights=None, num_classes=10), image_size=224)
    assert (classifier.feature_dim, classifier.feature_map_shape) == (dim, feature_map)


def test_convolution_as_head_gives_pooled_features():
    classifier = frozen(wrap(torchvision.models.squeezenet1_1(num_classes=10), image_size=64))
    out = classifier(torch.rand(2, 3, 64, 64), return_features=True)
    torch.testing.assert_close(out.feature_map.mean((2, 3)), out.features)


class SharedModules(nn.Module):
    """A network that reuses one ReLU after feature maps and vectors, pools by a function, and draws noise in eval mode."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 10)

    def forward(self, x):
        x = self.relu(self.conv2(self.relu(self.conv1(x + 0 * torch.rand_like(x)))))
        return self.head(self.relu(self.hidden(x.mean((2, 3)))))


def test_module_that_is_used_again_later():
    classifier = wrap(SharedModules())
    assert (classifier.feature_dim, classifier.feature_map_shape) == (5, (6, 28, 28))
    images = torch.rand(3, 3, 32, 32)
    out = classifier(images, return_features=True)
    assert out.feature_map.shape == (3, 6, 28, 28) and out.feature_map.min() >= 0
    hidden = classifier.network.hidden(out.feature_map.mean((2, 3))).relu()
    torch.testing.assert_close(hidden, out.features)


def test_auxiliary_heads_of_train_mode_are_left_out():
    """GoogLeNet and Inception of torchvision return a tuple in train mode, their own logits first."""

    class WithAuxiliaryHead(SharedModules):
        def forward(self, x):
            logits = super().forward(x)
            return (logits, None) if self.training else logits

    classifier, images = wrap(WithAuxiliaryHead()).train(), torch.rand(2, 3, 32, 32)
    assert classifier(images).shape == classifier(images, return_features=True).logits.shape == (2, 10)


def test_normalization_is_the_wrappers():
    classifier = wrap(build_network("resnet8", 10)).eval()
    images = torch.rand(2, 3, 32, 32)
    normalized = (images - torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1)) / 0.2
    torch.testing.assert_close(classifier(images), classifier.network(normalized))
    assert all(key.startswith("network.") for key in classifier.state_dict())
    assert shapes(classifier.network) == PUBLISHED["resnet8"]["keys"]


def test_construction_leaves_no_trace():
    network = build_network("resnet8", 10)
    network.layer2.eval()
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())
    noisy = SharedModules()
    random_state = torch.get_rng_state()
    wrap(network)
    wrap(noisy)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_deepcopy_has_its_own_hooks():
    original = frozen(wrap(build_network("resnet8", 10)))
    duplicate = copy.deepcopy(original)
    with torch.no_grad():
        duplicate.network.layer3[0].bn2.bias.add_(1)
    images = torch.rand(2, 3, 32, 32)
    del original
    out = duplicate(images, return_features=True)
    torch.testing.assert_close(duplicate.network.fc(out.features), out.logits)
    torch.testing.assert_close(out.feature_map.mean((2, 3)), out.features)


def test_nothing_outlives_a_forward():
    classifier = wrap(build_network("resnet8", 10))
    out = classifier(torch.rand(2, 3, 32, 32), return_features=True)
    references = [weakref.ref(out.features), weakref.ref(out.feature_map)]
    del out
    classifier(torch.rand(2, 3, 32, 32))
    classifier.network(torch.rand(2, 3, 32, 32))
    assert [reference() for reference in references] == [None, None]
    assert all(tap.tensor is None for tap in (classifier._features, *classifier._maps))


def test_compiles_once_and_whole():
    classifier = wrap(build_network("resnet8", 10)).eval()
    images = torch.rand(2, 3, 32, 32)
    compiled = torch.compile(classifier, backend="eager", fullgraph=True)
    compiled(images, return_features=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        out = compiled(images, return_features=True)
    torch.testing.assert_close(out, classifier(images, return_features=True))


def test_frozen_and_eval_mode():
    classifier = wrap(build_network("resnet8", 10))
    classifier.network.layer1.eval()
    modes = [module.training for module in classifier.modules()]
    with pytest.raises(KeyError), eval_mode(classifier):
        assert not any(module.training for module in classifier.modules())
        raise KeyError
    assert [module.training for module in classifier.modules()] == modes
    assert frozen(classifier) is classifier
    assert not any(module.training for module in classifier.modules())
    assert not any(p.requires_grad for p in classifier.parameters())
    assert classifier.network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        (lambda: build_network("resnet8", 100), 32, "network returns 100 logits, dataset has 10 classes"),
        (lambda: nn.Conv2d(3, 10, 1), 32, r"network returns shape \(2, 10, 32, 32\), logits \(2, 10\) wanted"),
        (lambda: nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10)), 32, "no nn.Linear or 1x1 nn.Conv2d with 10"),
        (lambda: on_meta("vit_b_16_imagenet", 10), 32, "fails on images of 3x32x32: AssertionError: Wrong image"),
        (lambda: nn.Bilinear(3, 3, 10), 32, "fails on images of 3x32x32: TypeError: .*missing 1 required"),
    ],
)
def test_networks_that_do_not_fit(network, size, message):
    with pytest.raises(ValueError, match=message):
        wrap(network(), image_size=size)


def test_weights_fixed_is_undone():
    """Inside: eval mode, and gradients for inputs but not for weights. Weights that were fixed before stay fixed."""
    classifier = wrap(build_network("resnet8", 10)).train()
    first = next(classifier.network.parameters()).requires_grad_(False)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    with weights_fixed(classifier):
        assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
        classifier(images).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in classifier.parameters())
    assert classifier.training and not first.requires_grad
    assert all(p.requires_grad for p in classifier.parameters() if p is not first)
