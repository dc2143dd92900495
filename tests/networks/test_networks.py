"""Networks of the registry, compared with the published state-dict keys, and networks by file and by module."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from engine.runtime.errors import UserError
from registry import MODELS
from tests.conftest import CPU, build_classifier, build_network, dataset_info, make_classifier

PUBLISHED = json.loads(Path(__file__).with_name("teacher_keys.json").read_text())


def shapes(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def on_meta(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build_network(name, num_classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_the_published(name):
    network = on_meta(name, 10)
    assert shapes(network) == PUBLISHED[name]["keys"]
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name]["parameters"]
    other = on_meta(name, 100)
    assert len([key for key, shape in shapes(other).items() if shape[:1] == [100]]) == 2
    assert other(torch.rand(2, 3, 32, 32, device="meta")).shape == (2, 100)


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_original_resnets_have_no_shortcut_parameters(depth):
    keys = shapes(on_meta(f"resnet{depth}_he", 10))
    parts = r"conv1|bn1|linear|layer[123]\.\d+\.(conv1|bn1|conv2|bn2)"
    assert all(re.fullmatch(rf"({parts})\.\w+", key) for key in keys)
    assert {20: 269722, 32: 464154, 44: 658586, 56: 853018, 110: 1727962}[depth] == sum(
        p.numel() for p in on_meta(f"resnet{depth}_he", 10).parameters()
    )


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
    classifier = make_classifier(build_network(f"{tmp_path}/own.py:factory", 10), image_size=32).eval()
    assert (classifier.feature_dim, classifier.feature_map_shape) == (5, (5, 30, 30))
    out = classifier(torch.rand(2, 3, 32, 32), return_features=True)
    torch.testing.assert_close(out.feature_map.mean((2, 3)), out.features)
    assert build_network(f"{tmp_path}/own.py:bare", 10)[-1].out_features == 7


def test_a_file_may_define_dataclasses_with_postponed_annotations(tmp_path):
    """``dataclass`` then looks for the file's module in ``sys.modules``."""
    width = "from dataclasses import dataclass\n\n@dataclass\nclass Width:\n    channels: int = 5\n"
    (tmp_path / "own.py").write_text(f"from __future__ import annotations\n{width}{FILE}")
    assert build_network(f"{tmp_path}/own.py:factory", 10)[-1].out_features == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_networks_of_other_dtypes_compute_in_float32(tmp_path, dtype):
    (tmp_path / "own.py").write_text(f"{FILE}\ndef other(num_classes):\n    return factory(num_classes).to({dtype})\n")
    classifier = build_classifier(f"{tmp_path}/own.py:other", dataset_info("digits"), CPU)
    assert classifier(torch.rand(2, 3, 16, 16)).dtype == torch.float32


def test_network_by_module():
    assert build_network("torchvision.models:squeezenet1_1", 10).num_classes == 10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet21", "unknown model 'resnet21'; did you mean .*resnet20"),
        ("{tmp}/none.py:factory", "none.py does not exist"),
        ("{tmp}/own.py", "has no factory; give .*own.py:NAME"),
        ("{tmp}/own.py:none", "own.py has no function 'none'"),
        ("{tmp}/own.py:constant", "own.py has no function 'constant'"),
        ("{tmp}/own.py:failing", "failed: RuntimeError: no such thing$"),
        ("{tmp}/own.py:number", "is of type int, a torch.nn.Module wanted"),
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


def test_torchvision_knows_the_names_of_its_networks():
    places = [target.partition(":") for target in MODELS.values()]
    assert {name for module, _, name in places if module == "models.imagenet"} <= set(torchvision.models.list_models())
