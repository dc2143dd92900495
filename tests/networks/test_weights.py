"""Loading weights: which files are accepted or refused, and the normalization that comes with the weights."""

import argparse
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.networks.weights import load_weights
from engine.runtime.errors import UserError
from tests.conftest import ROOT, build_network, load_teacher

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def state():
    network = build_network("resnet8", 10)
    network(torch.rand(4, 3, 32, 32))  # updates the BN statistics
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


def test_flags_beside_the_weights_as_timm_and_repdistiller_store_them(tmp_path, state):
    torch.save({"model": state, "opt": argparse.Namespace(lr=0.05, model="resnet8")}, tmp_path / "a.pth")
    assert_loads(tmp_path / "a.pth", state)


def test_numpy_scalars_beside_the_weights(tmp_path, state):
    plain = {"best_acc": 94.25, "loss": 0.5, "epoch": 3, "best": True}
    stored = {"best_acc": np.float64(94.25), "loss": np.float32(0.5), "epoch": np.int64(3), "best": np.bool_(True)}
    file = tmp_path / "a.pth"
    torch.save({"state_dict": state, **stored}, file, _use_new_zipfile_serialization=False)
    assert_loads(file, state, plain)
    file.write_bytes(file.read_bytes().replace(b"numpy._core.", b"numpy.core."))  # as numpy 1 writes them
    assert_loads(file, state, plain)
    torch.save({"state_dict": state, "name": np.str_("resnet8")}, file)
    with pytest.raises(UserError, match="pickled objects"):
        load_weights(build_network("resnet8", 10), file)


def test_averaged_weights_of_torch(tmp_path, state):
    network = build_network("resnet8", 10)
    network.load_state_dict(state)
    torch.save(torch.optim.swa_utils.AveragedModel(network).state_dict(), tmp_path / "a.pth")
    assert_loads(tmp_path / "a.pth", state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
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
        (
            lambda s: build_network("resnet8", 100).state_dict(),
            r"has 100 classes \(fc.weight 100x64\), 10 wanted; give weights for",
        ),
        (
            lambda s: {"state_dict": build_network("wrn16_1", 10).state_dict(), "arch": "wrn16_1"},
            r"contains wrn16_1, ResNet wanted: \d+ missing \(bn1.weight|layer1.0.conv1.weight, .*, \.\.\.\); \d+ unexpected",
        ),
        (lambda s: build_network("resnet20", 10).state_dict(), r"ResNet wanted: 60 unexpected \(layer1.1.conv1.weight"),
        (
            lambda s: {**s, "conv1.weight": torch.zeros(8, 3, 3, 3), "fc.bias": torch.zeros(9)},
            r"2 of another shape \(conv1.weight 8x3x3x3 for 16x3x3x3, fc.bias 9 for 10\)",
        ),
        (with_nan, r"NaN or infinite weights \(fc.bias\)"),
        (lambda s: {**s, "conv1.weight": s["conv1.weight"].double() * 1e60}, r"too large for float32 \(conv1.weight\)"),
        (lambda s: [1, 2], "contains an object of type list, a state_dict wanted"),
        (lambda s: {"epoch": 3}, r"contains no state_dict \(epoch"),
        (lambda s: {"state_dict": {}}, r"contains no state_dict \(nothing"),
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


INFO = SimpleNamespace(name="d", num_classes=10, image_size=32, size_given=False, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def load(path, mean=None, std=None):
    return load_teacher("resnet8", INFO, torch.device("cpu"), str(path), mean, std)


def test_a_teacher_of_another_image_size_is_used_only_if_a_flag_says_so(tmp_path, state):
    torch.save({"state_dict": state, "image_size": 16}, tmp_path / "small.pth")
    with pytest.raises(UserError, match="trained at 16 px, but the images of d have 32 px; give --image_size 16, or"):
        load(tmp_path / "small.pth")
    chosen = SimpleNamespace(**vars(INFO) | {"size_given": True})
    load_teacher("resnet8", chosen, torch.device("cpu"), str(tmp_path / "small.pth"))


def assert_normalizes(teacher, mean, std):
    images = torch.rand(2, 3, 32, 32)
    inputs = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(teacher(images), teacher.network(inputs))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_flag_goes_before_the_checkpoint_before_the_dataset(tmp_path, state, as_tensor):
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    stored = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    if as_tensor:
        stored = {name: torch.tensor(values).view(1, 3, 1, 1) for name, values in stored.items()}
    torch.save({"state_dict": state, **stored}, tmp_path / "own.pth")
    teacher = load(tmp_path / "published.pth")
    assert_normalizes(teacher, INFO.mean, INFO.std)
    assert str(teacher.normalization) == "mean 0.1,0.2,0.3 (from the dataset), std 0.4,0.5,0.6 (from the dataset)"
    teacher = load(tmp_path / "own.pth")
    assert_normalizes(teacher, (0.5,) * 3, (0.2,) * 3)
    assert str(teacher.normalization) == "mean 0.5,0.5,0.5 (from the checkpoint), std 0.2,0.2,0.2 (from the checkpoint)"
    teacher = load(tmp_path / "own.pth", std=(1.0, 2.0, 3.0))
    assert_normalizes(teacher, (0.5,) * 3, (1.0, 2.0, 3.0))
    assert str(teacher.normalization) == "mean 0.5,0.5,0.5 (from the checkpoint), std 1,2,3 (from the flag)"


@pytest.mark.parametrize(
    "name, values",
    [("mean", [0.5, 0.5]), ("mean", [0.5, float("nan"), 0.5]), ("mean", "0.5"), ("mean", 0.5), ("mean", [True, 0.5, 0.5]),
     ("mean", [10**400] * 3), ("std", [1e-45] * 3), ("std", [0.2, 0.0, 0.2]), ("std", [0.2, 0.2, -1.0]), ("std", [float("inf")] * 3), ("std", [])],
)  # fmt: skip
def test_wrong_normalizations_are_one_line(tmp_path, state, name, values):
    """A wrong normalization in a checkpoint, which a flag overrides, and a wrong normalization given by a flag."""
    torch.save({"state_dict": state, name: values}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"a.pth has the {name}.*three finite numbers.*--teacher_{name}") as error:
        load(tmp_path / "a.pth")
    assert "\n" not in str(error.value)
    load(tmp_path / "a.pth", **{name: (0.5, 0.5, 0.5)})
    if isinstance(values, list):
        with pytest.raises(UserError, match=f"--teacher_{name} .*three finite numbers"):
            load(tmp_path / "a.pth", **{name: tuple(values)})


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="student .*none.pth does not exist"):
        load_weights(build_network("resnet8", 10), tmp_path / "none.pth", what="student")


def test_public_checkpoint_loads_unmodified():
    path = SHARED / "teachers" / "cifar10_resnet20.pth"
    if not path.is_file():
        pytest.skip("shared/teachers/cifar10_resnet20.pth is not here")
    assert load_weights(build_network("resnet20", 10), path) == {"best_acc1": 94.0}
