"""Published weights as they are (fetched, checked and loaded), and the normalization that belongs to them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.runtime.errors import UserError
from engine.runtime.files import load_checkpoint

# How a network's inputs are normalized, and who says so: a flag, else its checkpoint, else the dataset.
#
# Of weights that come with their model's own configuration (``timm:resnet18``), this stands in the checkpoint's place.


class Normalization(NamedTuple):
    """Subtracted and divided by, one value a channel of images in [0, 1], and where each comes from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_from: str
    std_from: str

    def as_flags(self, prefix: str = "") -> dict[str, list[float]]:
        """For the fingerprint of what depends on it: {"<prefix>mean": ..., "<prefix>std": ...}."""
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
    """Mean and std, each from the first that has it of flag, checkpoint and dataset.

    Args:
        info: ``engine.data.datasets.DatasetInfo``.
        mean, std: the flags' values; None where unset.
        stored: the plain values beside the checkpoint's weights; published checkpoints have no normalization among them.
        file: how errors call the checkpoint.
        prefix: of the flags' names.
        kind: what ``stored`` is of, as ``Normalization`` names it.
    Raises:
        UserError: a flag or the checkpoint has anything but three finite numbers, std above 0.
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
    numbers = listed and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if not numbers or len(values) != 3 or (name == "std" and min(values) <= 0):
        shown = ",".join(map(str, values)) if listed else values
        above = ", each above 0" if name == "std" else ""
        raise UserError(f"{what} {shown}: wanted three finite numbers r,g,b{above}; {advice}")
    return tuple(map(float, values))


WRAPPERS = ("state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


class WrongNetwork(UserError):
    """A checkpoint is another network's. ``shapes`` are its tensors', without BN's batch counters."""

    def __init__(self, message: str, shapes: dict[str, torch.Size]):
        super().__init__(message)
        self.shapes = shapes


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def load_weights(network: nn.Module, path: Path, what: str = "teacher checkpoint", new_head: bool = False) -> dict[str, Any]:
    """Loads a published checkpoint into ``network``, cast to its dtypes, or leaves it untouched and says why.

    Taken are a plain state dict or one under ``state_dict``, ``model`` or ``net``, with or without the prefixes of
    DataParallel and torch.compile, as ``torch.save`` or safetensors file. No code from the file is ever run.

    Args:
        what: how errors call the file.
        new_head: where the last layer alone differs, in its number of classes, leave the network's as it is.
    Returns:
        The plain values that lie beside a wrapped state dict (arch, epoch, mean, class_names, ...), and ``dropped_head``,
        its name and class count, where that was left out.
    Raises:
        UserError: unreadable, no state dict, NaN or infinite weights, another architecture or number of classes.
    """
    state, metadata = _unwrap(load_checkpoint(path, what), f"{what} {path}")
    wanted = network.state_dict()
    while not state.keys() & wanted.keys() and all(key.startswith(PREFIXES) for key in state):
        state = {key.partition(".")[2]: tensor for key, tensor in state.items()}
    head = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if new_head and head and _is_head(head, state, wanted):
        metadata["dropped_head"] = f"{head[0].rpartition('.')[0]} of {len(state[head[0]])} classes"
        state, wanted = ({key: values[key] for key in values if key not in head} for values in (state, wanted))
    _check_fit(state, wanted, f"{what} {path}", type(network).__name__, metadata.get("arch"))
    for key, tensor in state.items():
        if key.endswith("running_var") and (tensor < 0).any():
            raise UserError(f"{what} {path} has a negative variance ({key}), wanted none below 0; use another file")
    network.load_state_dict(state, strict=False)
    return metadata


def _unwrap(checkpoint: Any, file: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a loaded file into its state dict and the plain values beside it."""
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{file} holds a {type(checkpoint).__name__}, wanted a state_dict")
    wrapper = next((key for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
    state = checkpoint if wrapper is None else checkpoint[wrapper]
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        found = ", ".join(map(str, list(state)[:3])) or "nothing"
        raise UserError(f"{file} holds no state_dict ({found}, ...); wanted one, plain or under {', '.join(WRAPPERS)}")
    metadata = {}
    for key, value in () if wrapper is None else checkpoint.items():
        if isinstance(value, Tensor):
            value = value.item() if value.numel() == 1 else value.flatten().tolist()
        values = value if isinstance(value, (list, tuple)) else [value]
        if all(v is None or isinstance(v, (bool, int, float, str)) for v in values):
            metadata[key] = value
    return dict(state), metadata


def _check_fit(state: dict[str, Tensor], wanted: dict[str, Tensor], file: str, network: str, arch: str | None) -> None:
    """Raises a UserError unless keys and shapes agree; BN's batch counters, which older files lack, do not matter."""
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted and not key.endswith("num_batches_tracked")]
    misshaped = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if not (missing or unexpected or misshaped):
        return
    if not (missing or unexpected) and _is_head(misshaped, state, wanted):
        key = misshaped[0]
        raise UserError(f"{file} has {len(state[key])} classes ({key} {_size(state[key])}), wanted {len(wanted[key])}")
    shapes = [f"{key} {_size(state[key])} for {_size(wanted[key])}" for key in misshaped]
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if keys
    ]
    holds = f"holds {arch}" if arch else "holds another network"
    shapes = {key: tensor.shape for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    raise WrongNetwork(f"{file} {holds}, wanted {network}: {'; '.join(found)}", shapes)


def _is_head(keys: list[str], state: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether ``keys`` are one layer's weight and bias, which differ in the number of outputs only."""
    return len({key.rpartition(".")[0] for key in keys}) == 1 and all(
        state[key].ndim == wanted[key].ndim > 0 and state[key].shape[1:] == wanted[key].shape[1:] for key in keys
    )


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
