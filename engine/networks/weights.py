"""Loads and checks published weights, and chooses the normalization that belongs to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.runtime.errors import UserError
from engine.runtime.flags import Range
from engine.runtime.schema import shown, wrong
from engine.runtime.tensors import load_checkpoint

# Normalization of a network's inputs: from a flag, else from its checkpoint, else from the dataset.
#
# For weights with a configuration of their own (``timm:resnet18``), the configuration takes the checkpoint's place.


LEAST_STD = 1e-6  # divided by a smaller one, pixels exceed what a network can compute with


class Normalization(NamedTuple):
    """Mean and std of the input normalization, one value a channel of images in [0, 1], and the source of each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_from: str
    std_from: str

    def as_flags(self, prefix: str = "") -> dict[str, list[float]]:
        """{"<prefix>mean": ..., "<prefix>std": ...}, for the fingerprints of stages that depend on the normalization."""
        return {f"{prefix}mean": list(self.mean), f"{prefix}std": list(self.std)}

    def __str__(self) -> str:
        mean, std = (",".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"mean {mean} (from the {self.mean_from}), std {std} (from the {self.std_from})"


def choose_normalization(
    info,
    mean: Any = None,
    std: Any = None,
    stored: dict[str, Any] | None = None,
    file: str = "",
    prefix: str = "--",
    kind: str = "checkpoint",
) -> Normalization:
    """Takes mean and std each from the first source that gives it: the flag, the checkpoint, the dataset.

    Args:
        info: ``engine.data.datasets.DatasetInfo``.
        mean, std: values of the flags; None if a flag is not given.
        stored: plain values stored beside the checkpoint's weights; those of published checkpoints have no mean and std.
        file: name of the checkpoint in error messages.
        prefix: prefix of the flags' names.
        kind: word for the source ``stored`` in the result ('checkpoint' or 'model').
    Raises:
        UserError: a flag or the checkpoint gives anything but three finite numbers, or a std below ``LEAST_STD``.
    """
    chosen, sources = [], []
    for name, given in (("mean", mean), ("std", std)):
        found = (stored or {}).get(name)
        if given is not None:
            chosen.append(_checked(name, given, f"{prefix}{name}", "give others"))
        elif found is not None:
            chosen.append(_checked(name, found, f"{file} has the {name}", f"give the right one with {prefix}{name}"))
        else:
            chosen.append(tuple(getattr(info, name)))
        sources.append("flag" if given is not None else kind if found is not None else "dataset")
    return Normalization(*chosen, *sources)


def _checked(name: str, values: Any, what: str, advice: str) -> tuple[float, ...]:
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    legal = (float, Range(least=LEAST_STD)) if name == "std" else float
    if not listed or len(values) != 3 or wrong(list(values), [legal]):
        text = ",".join(value if isinstance(value, str) else shown(value) for value in values) if listed else shown(values)
        above = f", each at least {LEAST_STD:g}," if name == "std" else ""
        raise UserError(f"{what} {text}, three finite numbers r,g,b{above} wanted; {advice}")
    return tuple(map(float, values))


WRAPPERS = ("state_dict", "model", "net")


class WrongNetwork(UserError):
    """A checkpoint holds another network. ``shapes`` are the shapes of its tensors, without BN's batch counters."""

    def __init__(self, message: str, shapes: dict[str, torch.Size]):
        super().__init__(message)
        self.shapes = shapes


def load_weights(network: nn.Module, path: Path, what: str = "teacher checkpoint", new_head: bool = False) -> dict[str, Any]:
    """Loads a published checkpoint into ``network``, cast to the network's dtypes. After an error ``network`` is unchanged.

    The file is a ``torch.save`` or safetensors file. Its state dict is plain or stored under ``state_dict``, ``model`` or
    ``net``. Prefixes that all keys share are removed: ``module.`` of DataParallel and of averaged weights, ``_orig_mod.`` of
    torch.compile, ``model.`` of Lightning. No code from the file is ever run.

    Args:
        what: name of the file in error messages.
        new_head: if only the last layer differs, in its number of classes, keep that of ``network``.
    Returns:
        The plain values stored beside a wrapped state dict (arch, epoch, mean, class_names, ...), and ``dropped_head``,
        the name and class count of a last layer that was left out.
    Raises:
        UserError: the file is unreadable, has no state dict, has NaN or infinite weights, or is of another architecture or
            number of classes.
    """
    state, metadata = _unwrap(load_checkpoint(path, what), f"{what} {path}")
    wanted = network.state_dict()
    state.pop("n_averaged", None)  # counter of torch's AveragedModel (EMA, SWA)
    while not state.keys() & wanted.keys() and len(first := {key.partition(".")[:2] for key in state}) == 1:
        if "." not in first.pop():
            break
        state = {key.partition(".")[2]: tensor for key, tensor in state.items()}
    head = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if new_head and head and _is_head(head, state, wanted):
        metadata["dropped_head"] = f"{head[0].rpartition('.')[0]} of {len(state[head[0]])} classes"
        state, wanted = ({key: values[key] for key in values if key not in head} for values in (state, wanted))
    _check_fit(state, wanted, f"{what} {path}", type(network).__name__, metadata.get("arch"))
    for key, tensor in state.items():
        if key.endswith("running_var") and (tensor < 0).any():
            raise UserError(f"{what} {path} has a negative variance ({key}), 0 or more wanted; use another file")
        if key in wanted and not tensor.to(wanted[key].dtype).isfinite().all():
            kind = str(wanted[key].dtype).removeprefix("torch.")
            raise UserError(f"{what} {path} has weights that are too large for {kind} ({key}); use another file")
    network.load_state_dict(state, strict=False)
    return metadata


def _unwrap(checkpoint: Any, file: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a loaded file into its state dict and the plain values beside it."""
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{file} contains an object of type {type(checkpoint).__name__}, a state_dict wanted")
    wrapper = next((key for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
    state = checkpoint if wrapper is None else checkpoint[wrapper]
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        found = ", ".join(map(str, list(state)[:3])) or "nothing"
        raise UserError(
            f"{file} contains no state_dict ({found}, ...), one wanted, at the top level or under {', '.join(WRAPPERS)}"
        )
    metadata = {}
    for key, value in () if wrapper is None else checkpoint.items():
        if isinstance(value, Tensor):
            value = value.item() if value.numel() == 1 else value.flatten().tolist()
        values = value if isinstance(value, (list, tuple)) else [value]
        if all(v is None or isinstance(v, (bool, int, float, str)) for v in values):
            metadata[key] = value
    return dict(state), metadata


def _check_fit(state: dict[str, Tensor], wanted: dict[str, Tensor], file: str, network: str, arch: str | None) -> None:
    """Raises a UserError unless keys and shapes agree. BN's batch counters are ignored, because older files lack them."""
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted and not key.endswith("num_batches_tracked")]
    misshaped = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if not (missing or unexpected or misshaped):
        return
    if not (missing or unexpected) and _is_head(misshaped, state, wanted):
        key = misshaped[0]
        raise UserError(
            f"{file} has {len(state[key])} classes ({key} {_size(state[key])}), {len(wanted[key])} wanted; give weights for the "
            "dataset's classes, or the dataset of these weights"
        )
    shapes = [f"{key} {_size(state[key])} for {_size(wanted[key])}" for key in misshaped]
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    holds = f"contains {arch}" if arch else "contains another network"
    shapes = {key: tensor.shape for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    raise WrongNetwork(f"{file} {holds}, {network} wanted: {'; '.join(found)}", shapes)


def _is_head(keys: list[str], state: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether ``keys`` are the weight and bias of one layer and differ only in the number of outputs."""
    return len({key.rpartition(".")[0] for key in keys}) == 1 and all(
        state[key].ndim == wanted[key].ndim > 0 and state[key].shape[1:] == wanted[key].shape[1:] for key in keys
    )


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
