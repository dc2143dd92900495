"""A wrapper around any classification network, which normalizes the images and extracts features with forward hooks."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ADAPTIVE_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
POOLS = (*ADAPTIVE_POOLS, nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d, nn.FractionalMaxPool2d)
PASSIVE = (*POOLS, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Output(NamedTuple):
    """Outputs of a classifier for a batch. If the logits come from a cache, the other fields are None.

    Attributes:
        logits: (B, C).
        features: (B, D), the input of the last linear layer.
        feature_map: (B, Cf, h, w), the last feature map before pooling; None if the network has no such map (ViT) or is a
            timm network with channels last (Swin).
        feature_maps: the last feature map of every size, {(h, w): map} from fine to coarse, ``feature_map`` included; empty
            if ``feature_map`` is None.
        block_map: (B, Cb, h, w), the output of the last block. This is ``feature_map``, or in a pre-activation network the
            map before the last norm and activation.
    """

    logits: Tensor
    features: Tensor | None = None
    feature_map: Tensor | None = None
    feature_maps: dict[tuple[int, int], Tensor] | None = None
    block_map: Tensor | None = None


class Classifier(nn.Module):
    """A network that takes images in [0, 1] and returns logits, on request with its penultimate features.

    One forward pass on zeros in eval mode finds the layers of the features. It changes neither the network nor the global
    random stream. The attribute ``network`` is the bare network; checkpoints hold its state dict.

    Args:
        network: any module (B, 3, S, S) -> (B, num_classes) that ends in a linear layer or a 1x1 convolution. If the
            ``feature_map`` is not the output of the last block, the network's attribute ``last_block`` names the block.
        num_classes: number of classes of the dataset.
        image_size: S in px.
        mean: value subtracted from each channel of the images in [0, 1].
        std: value by which each channel is divided afterwards.
        name: name in reports.
    Raises:
        ValueError: the network cannot take such images, returns another number of logits, or has no such last layer.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "",
    ):
        super().__init__()
        self.network, self.num_classes, self.image_size, self.name = network, num_classes, image_size, name
        weight = next(network.parameters(), torch.zeros(()))
        for key, values in (("mean", mean), ("std", std)):
            values = torch.tensor(values, dtype=weight.dtype, device=weight.device).view(1, -1, 1, 1)
            self.register_buffer(key, values, persistent=False)
        calls = _trace(network, weight.new_zeros(2, self.mean.shape[1], image_size, image_size), num_classes)
        head = _find_head(calls, num_classes)
        before = calls[: calls.index(head)]
        channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"  # timm's attribute for maps (B, h, w, Cf)
        feature_map = None if channels_last else _find_feature_map(before)
        maps = _find_feature_maps(before, feature_map) if feature_map else []
        self.feature_dim: int = head.shape_in[1]
        self.feature_map_shapes: list[tuple[int, int, int]] = [tuple(call.shape[1:]) for call in maps]
        self.feature_map_shape = self.feature_map_shapes[-1] if maps else None
        named = isinstance(getattr(network, "last_block", None), str)
        block = [_find_block(network, before)] if named else maps[-1:]
        self.block_map_shape = tuple(block[0].shape[1:]) if block else None
        self._features, self._maps = _Tap(head.index), [_Tap(call.index) for call in maps]
        self._block = [_Tap(call.index) for call in block]
        head.module.register_forward_pre_hook(self._features.before)
        for call, tap in zip([*maps, *block], [*self._maps, *self._block]):
            call.module.register_forward_hook(tap.after)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor | Output:
        """Logits (B, C), or an Output if ``return_features``, for images (B, 3, S, S), float in [0, 1]."""
        images = (images - self.mean) / self.std
        if not return_features:
            return self._logits(images)
        for tap in (self._features, *self._maps, *self._block):
            tap.arm()
        logits = self._logits(images)
        features = self._features.take()
        if features.ndim == 4:  # the input of a 1x1 convolution that is pooled afterwards
            features = features.mean((2, 3))
        maps = {(m.shape[2], m.shape[3]): m for m in (tap.take() for tap in self._maps)}
        block_map = self._block[0].take() if self._block else None
        return Output(logits, features, next(reversed(maps.values()), None), maps, block_map)

    def _logits(self, images: Tensor) -> Tensor:
        outputs = self.network(images)
        return outputs[0] if isinstance(outputs, tuple) else outputs  # in train mode GoogLeNet adds auxiliary heads' logits


class _Tap:
    """Keeps one tensor of a forward pass: the input or the output of a module's ``index``-th call.

    A tap keeps the tensor only after ``arm``. A forward pass without features thus keeps no graph alive. The methods
    ``before`` and ``after`` are registered as hooks. ``copy.deepcopy`` binds the copy's hooks to the copy's tap.
    """

    def __init__(self, index: int):
        self.index, self.calls_left, self.tensor = index, -1, None

    def arm(self) -> None:
        self.calls_left, self.tensor = self.index, None

    def take(self) -> Tensor:
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "the network did not run the module whose features are wanted"
        return tensor

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._pass(args[0])

    def after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._pass(output)

    def _pass(self, tensor: Tensor) -> None:
        if self.calls_left == 0:
            self.tensor = tensor
        if self.calls_left >= 0:
            self.calls_left -= 1


class _Call(NamedTuple):
    """A finished call of a module, the ``index``-th of this module; ``passive`` if it only pools, drops or reshapes."""

    module: nn.Module
    index: int
    shape_in: torch.Size
    shape: torch.Size
    passive: bool


def _trace(network: nn.Module, images: Tensor, num_classes: int) -> list[_Call]:
    """All module calls of one forward pass in eval mode, in the order in which they end.

    Raises:
        ValueError: the network cannot take the images or does not return logits (B, num_classes).
    """
    calls, counts, pooled = [], Counter(), None

    def record(module: nn.Module, args: tuple, output) -> None:
        nonlocal pooled
        index, counts[module] = counts[module], counts[module] + 1
        if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            return
        passive = isinstance(module, PASSIVE) or output is pooled  # a container returns the output of its last module
        if passive:
            pooled = output
        calls.append(_Call(module, index, args[0].shape, output.shape, passive))

    hooks = [module.register_forward_hook(record) for module in network.modules()]
    devices = [images.device] if images.is_cuda else []
    try:
        with eval_mode(network), torch.no_grad(), torch.random.fork_rng(devices=devices):
            logits = network(images)
    except Exception as error:  # a user's network may raise anything
        size, reason = "x".join(map(str, images.shape[1:])), f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"network fails on images of {size}: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"network returns {found}, logits ({len(images)}, {num_classes}) wanted")
    if logits.shape[1] != num_classes:
        raise ValueError(f"network returns {logits.shape[1]} logits, dataset has {num_classes} classes")
    return calls


def _find_head(calls: list[_Call], num_classes: int) -> _Call:
    """The last call of a linear layer or 1x1 convolution with ``num_classes`` outputs, which computes the logits."""
    for call in reversed(calls):
        module = call.module
        if isinstance(module, nn.Linear) and module.out_features == num_classes and len(call.shape) == 2:
            return call
        if isinstance(module, nn.Conv2d) and module.out_channels == num_classes and module.kernel_size == (1, 1):
            return call
    raise ValueError(
        f"network has no nn.Linear or 1x1 nn.Conv2d with {num_classes} outputs, whose input could be the features"
    )


def _find_feature_map(calls: list[_Call]) -> _Call | None:
    """The call whose output is the last feature map before pooling, among the calls before the head; None: there is none."""
    pools = [i for i, call in enumerate(calls) if isinstance(call.module, ADAPTIVE_POOLS)]
    if pools:
        size = calls[pools[-1]].shape[2:]
        if all(call.shape[2:] == size for call in calls[pools[-1] :] if len(call.shape) == 4):
            calls = calls[: pools[-1]]  # a norm of the pooled features may follow (ConvNeXt)
    for call in reversed(calls):
        if not call.passive and len(call.shape) >= 3:
            return call if len(call.shape) == 4 else None  # tokens have three dimensions
    return None


def _find_block(network: nn.Module, calls: list[_Call]) -> _Call:
    """The last call of the module that the attribute ``last_block`` of the network names."""
    module = network.get_submodule(network.last_block)
    return next(call for call in reversed(calls) if call.module is module)


def _find_feature_maps(calls: list[_Call], last: _Call) -> list[_Call]:
    """For every size of feature map, the last call with an output of this size, in order and up to ``last``.

    Sizes smaller than that of ``last`` are left out.
    """
    chosen: dict[tuple[int, int], _Call] = {}
    for call in calls[: calls.index(last) + 1]:
        if not call.passive and len(call.shape) == 4:
            chosen[tuple(call.shape[2:])] = call
    size = tuple(last.shape[2:])
    return [call for key, call in chosen.items() if key[0] >= size[0] and key[1] >= size[1] and key != size] + [last]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Sets eval mode inside the block; afterwards every submodule has its previous mode again."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@contextmanager
def weights_fixed(module: nn.Module) -> Iterator[None]:
    """Sets eval mode and turns off gradients for the weights inside the block; gradients for inputs are not affected.

    Afterwards the modes and ``requires_grad`` are as before.
    """
    wanted = [p for p in module.parameters() if p.requires_grad]
    with eval_mode(module):
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


def layers_with_statistics(network: nn.Module) -> list[nn.Module]:
    """The BN layers of a network that keep running statistics."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def frozen(classifier: nn.Module) -> nn.Module:
    """Turns a classifier into a teacher: eval mode, no gradients for its weights, channels-last memory; returns it."""
    return classifier.eval().requires_grad_(False).to(memory_format=torch.channels_last)
