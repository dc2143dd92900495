"""Every network of the registry against the published keys; the wrapper's features; loading, and its refusals."""

import copy
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from engine.networks.weights import load_weights
from engine.runtime.errors import UserError
from models.classifier import Classifier, Output, eval_mode, frozen, weights_fixed
from registry import MODELS
from tests.conftest import build_network

PUBLISHED = json.loads((Path(__file__).parent / "data" / "teacher_keys.json").read_text())
SHARED = Path(__file__).parents[2] / "shared"
SMALL = [name for name in PUBLISHED if PUBLISHED[name]["parameters"] < 3e6]
SLOW = {"vgg11_bn_imagenet", "vit_b_16_imagenet"}  # hundreds of MB of gradients, and 224 px
TRAINED = [(name, 10) for name in MODELS if name not in SLOW] + [(name, 100) for name in SMALL]
HAS_RELU_MAP = [name for name in MODELS if name.startswith(("wrn", "resnet", "vgg8", "vgg11", "vgg13", "shufflenet"))]
HAS_RELU_MAP.remove("vgg11_bn_imagenet")  # two hidden layers lie between its map and its features


def shapes(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def wrap(network: nn.Module, num_classes: int = 10, image_size: int = 32) -> Classifier:
    return Classifier(network, num_classes, image_size, (0.49, 0.48, 0.45), (0.20, 0.20, 0.20), name="net")


def last_linear(network: nn.Module) -> nn.Linear:
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


def on_meta(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build_network(name, num_classes)


# Networks


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_the_published(name):
    network = on_meta(name, 10)
    assert shapes(network) == PUBLISHED[name]["keys"]
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name]["parameters"]
    heads = {key for key, shape in shapes(on_meta(name, 100)).items() if shape[:1] == [100]}
    assert len(heads) == 2


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_original_resnets_have_no_shortcut_parameters(depth):
    keys = shapes(on_meta(f"resnet{depth}_he", 10))
    parts = r"conv1|bn1|linear|layer[123]\.\d+\.(conv1|bn1|conv2|bn2)"
    assert all(re.fullmatch(rf"({parts})\.\w+", key) for key in keys)
    assert {20: 269722, 32: 464154, 44: 658586, 56: 853018, 110: 1727962}[depth] == sum(
        p.numel() for p in on_meta(f"resnet{depth}_he", 10).parameters()
    )


@pytest.mark.parametrize(("name", "num_classes"), TRAINED)
def test_forward_and_backward(name, num_classes):
    network = build_network(name, num_classes)
    logits = network(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, num_classes)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("name", ["wrn16_1", "resnet8", "resnet20_he", "vgg8", "shufflenetv2", "mobilenetv2", "resnet18"])
@pytest.mark.parametrize("size", [16, 64])
def test_other_sizes_and_100_classes(name, size):
    assert build_network(name, 100)(torch.rand(2, 3, size, size)).shape == (2, 100)


def test_original_shortcut_pads_channels_on_both_sides():
    block = build_network("resnet20_he", 10).layer2[0]
    x = torch.rand(1, 16, 8, 8)
    padded = block.downsample(x)
    assert padded.shape == (1, 32, 4, 4)
    assert torch.equal(padded[:, 8:24], x[:, :, ::2, ::2])
    assert padded[:, :8].abs().sum() == 0 and padded[:, 24:].abs().sum() == 0


# Classifier


@pytest.mark.parametrize("name", MODELS)
def test_features_of_every_model(name):
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


@pytest.mark.parametrize(
    ("name", "dim", "feature_map"),
    [
        ("convnext_tiny", 768, (768, 7, 7)),  # a norm between pooling and head
        ("swin_t", 768, (768, 7, 7)),
        ("densenet121", 1024, (1024, 7, 7)),  # pools by function
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
    """One ReLU for everything, after maps and after vectors; pools by function; noise even in eval mode."""

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
        (lambda: nn.Conv2d(3, 10, 1), 32, r"network returns shape \(2, 10, 32, 32\), wanted logits \(2, 10\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10)), 32, "no nn.Linear or 1x1 nn.Conv2d with 10"),
        (lambda: on_meta("vit_b_16_imagenet", 10), 32, "cannot take 3x32x32 images: Wrong image height"),
    ],
)
def test_networks_that_do_not_fit(network, size, message):
    with pytest.raises(ValueError, match=message):
        wrap(network(), image_size=size)


# Networks by file


FILE = """
import torch
from torch import nn

def factory(num_classes):
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, num_classes))

def bare():
    return factory(7)

def failing(num_classes):
    raise RuntimeError("no such thing\\nsecond line")

def number(num_classes):
    return 3

constant = 4
"""


def test_network_by_file(tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    classifier = wrap(build_network(f"{tmp_path}/own.py:factory", 10)).eval()
    assert (classifier.feature_dim, classifier.feature_map_shape) == (5, (5, 30, 30))
    out = classifier(torch.rand(2, 3, 32, 32), return_features=True)
    torch.testing.assert_close(out.feature_map.mean((2, 3)), out.features)
    assert build_network(f"{tmp_path}/own.py:bare", 10)[-1].out_features == 7


def test_network_by_module():
    assert build_network("torchvision.models:squeezenet1_1", 10).num_classes == 10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet21", "unknown model 'resnet21'; did you mean .*resnet20"),
        ("{tmp}/none.py:factory", "none.py does not exist"),
        ("{tmp}/own.py", "names no factory; give .*own.py:factory"),
        ("{tmp}/own.py:none", "own.py has no factory 'none'"),
        ("{tmp}/own.py:constant", "own.py has no factory 'constant'"),
        ("{tmp}/own.py:failing", "failed: RuntimeError: no such thing$"),
        ("{tmp}/own.py:number", "made a int, wanted a torch.nn.Module"),
        ("{tmp}/broken.py:factory", "cannot be imported: SyntaxError"),
        ("no.such.package:factory", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_networks_that_cannot_be_built(tmp_path, spec, message):
    (tmp_path / "own.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("def factory(:\n")
    with pytest.raises(UserError, match=message) as error:
        build_network(spec.format(tmp=tmp_path), 10)
    assert "\n" not in str(error.value)


# Weights


@pytest.fixture(scope="module")
def state():
    network = build_network("resnet8", 10)
    network(torch.rand(4, 3, 32, 32))  # moves the BN statistics
    return network.state_dict()


def assert_loads(path, state, metadata=None, **tolerance):
    network = build_network("resnet8", 10)
    assert load_weights(network, path) == (metadata or {})
    for key, tensor in network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, state[key], **tolerance)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "net"])
def test_wrapped_with_metadata(tmp_path, state, wrapper):
    plain = {"arch": "resnet8", "epoch": 200, "best_acc1": 91.5}
    torch.save({wrapper: state, **plain, "acc": torch.tensor(2.0), "optimizer": {"state": {}}}, tmp_path / "a.pth")
    assert_loads(tmp_path / "a.pth", state, {**plain, "acc": 2.0})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_and_no_batch_counters(tmp_path, state, prefix):
    old = {prefix + key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "a.pth")
    assert_loads(tmp_path / "a.pth", state)


def test_safetensors_in_half_precision(tmp_path, state):
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    save_file(halves, tmp_path / "a.safetensors")
    assert_loads(tmp_path / "a.safetensors", state, rtol=1e-2, atol=1e-3)


def with_nan(state):
    return {**state, "fc.bias": torch.full((10,), float("nan"))}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: build_network("resnet8", 100).state_dict(), r"has 100 classes \(fc.weight 100x64\), wanted 10$"),
        (
            lambda s: {"state_dict": build_network("wrn16_1", 10).state_dict(), "arch": "wrn16_1"},
            r"holds wrn16_1, wanted ResNet: \d+ missing \(bn1.weight|layer1.0.conv1.weight, .*, \.\.\.\); \d+ unexpected",
        ),
        (lambda s: build_network("resnet20", 10).state_dict(), r"wanted ResNet: 60 unexpected \(layer1.1.conv1.weight"),
        (
            lambda s: {**s, "conv1.weight": torch.zeros(8, 3, 3, 3), "fc.bias": torch.zeros(9)},
            r"2 mis-shaped \(conv1.weight 8x3x3x3 for 16x3x3x3, fc.bias 9 for 10\)",
        ),
        (with_nan, r"NaN or infinite weights \(fc.bias\)"),
        (lambda s: [1, 2], "holds a list, wanted a state_dict"),
        (lambda s: {"epoch": 3}, r"holds no state_dict \(epoch"),
        (lambda s: {"state_dict": {}}, r"holds no state_dict \(nothing"),
    ],
)
def test_refused_contents(tmp_path, state, content, message):
    torch.save(content(state), tmp_path / "a.pth")
    network = build_network("resnet8", 10)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=message) as error:
        load_weights(network, tmp_path / "a.pth")
    assert "\n" not in str(error.value) and str(error.value).startswith(f"teacher checkpoint {tmp_path}")
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_code_is_refused_and_not_run(tmp_path, state):
    trace = tmp_path / "executed"
    torch.save({"state_dict": state, "extra": Malicious(str(trace))}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="pickled objects"):
        load_weights(build_network("resnet8", 10), tmp_path / "a.pth")
    assert not trace.exists()


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="student .*none.pth does not exist"):
        load_weights(build_network("resnet8", 10), tmp_path / "none.pth", what="student")


def test_public_checkpoint_loads_unmodified():
    path = SHARED / "teachers" / "cifar10_resnet20.pth"
    if not path.is_file():
        pytest.skip("shared/teachers/cifar10_resnet20.pth is not here")
    assert load_weights(build_network("resnet20", 10), path) == {"best_acc1": 94.0}


def test_weights_fixed_is_undone():
    """No gradients to weights and eval mode inside, gradients to inputs as ever; what was fixed before stays so."""
    classifier = wrap(build_network("resnet8", 10)).train()
    first = next(classifier.network.parameters()).requires_grad_(False)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    with weights_fixed(classifier):
        assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
        classifier(images).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in classifier.parameters())
    assert classifier.training and not first.requires_grad
    assert all(p.requires_grad for p in classifier.parameters() if p is not first)
