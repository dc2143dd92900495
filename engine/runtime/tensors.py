"""Tensors in files: safetensors, and ``torch.save`` files that are read without running code. Digests of tensors."""

import argparse
import hashlib
import io
import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.runtime import checksums
from engine.runtime.errors import UserError, reason_of
from engine.runtime.files import atomic_path

DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool,
}  # fmt: skip


class _NumpyType:
    """Stands for a ``numpy.dtype`` in a checkpoint; keeps its code, for example 'f8'."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _numpy_scalar(kind: _NumpyType, data: bytes) -> bool | int | float:
    if kind.code not in NUMPY_CODES:
        raise pickle.UnpicklingError(f"Unsupported numpy scalar {kind.code}")
    return struct.unpack("<" + NUMPY_CODES[kind.code], data)[0]


NUMPY_CODES = {"b1": "?", "i4": "i", "i8": "q", "f4": "f", "f8": "d"}  # those of numpy and of struct
# What published checkpoints hold beside tensors: flags (timm, RepDistiller), and accuracies as numpy scalars. Numpy's own
# constructors are not called, because a crafted file could crash them.
BESIDE_WEIGHTS = [
    argparse.Namespace,
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a flat dict of tensors as one safetensors file, atomically."""
    _require_finite(tensors, path)
    # The library's own file writer hides the reason of a failed write, so the bytes are made first.
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, memory-mapped.

    Raises:
        UserError: the file is missing, truncated or not safetensors, or it has unusual or non-finite tensors.
    """
    try:
        checksums.check(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if found := _unusable(tensors):
            raise UserError(f"{path} {found}; use another file")
        return tensors
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); delete it and make it again") from None
    except RuntimeError as error:  # by default, Linux allows 65530 memory maps per process
        raise UserError(
            f"{path} cannot be memory-mapped ({error}); if there are very many files, raise sysctl vm.max_map_count"
        ) from None


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint with ``torch.save``, atomically.

    Raises:
        UserError: a tensor in it is NaN or infinite; the old file is kept.
    """
    _require_finite(state, path)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, what: str = "checkpoint") -> Any:
    """Reads a ``torch.save`` or safetensors file to CPU memory without running code from it.

    Args:
        path: file to read.
        what: kind of the file, for the error message, for example "teacher checkpoint".
    Raises:
        UserError: the file is missing or truncated, or holds other objects than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path} {'is a directory' if path.is_dir() else 'does not exist'}")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        checksums.check(path)
        with torch.serialization.safe_globals(BESIDE_WEIGHTS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises a dozen unrelated types on damaged files
        reason = reason_of(error).split(". ")[0]
        if "Unsupported operand" in str(error) or isinstance(
            error, LookupError | EOFError | ValueError | TypeError | AttributeError
        ):
            reason = "it is not a complete file of torch.save"
        elif "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it contains pickled objects other than tensors, which could run code and are never loaded"
        raise UserError(f"{what} {path} cannot be read: {reason}; give a file with a plain state_dict") from None
    if found := _unusable(loaded):
        raise UserError(f"{what} {path} {found}; use another file")
    return loaded


def _named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for all tensors in nested dicts, lists and tuples; the name is the innermost dict key."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named_tensors(item, str(key) if isinstance(value, Mapping) else name)


def _unusable(loaded: Any) -> str | None:
    """Describes the first tensor that is not a dense CPU tensor of a usual dtype with finite values; None: there is none."""
    for name, tensor in _named_tensors(loaded):
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.is_quantized
            or tensor.dtype not in DTYPES
        ):
            kind = tensor.dtype if tensor.layout == torch.strided and tensor.device.type == "cpu" else "sparse or empty"
            return f"has a tensor of an unsupported kind ({name}: {kind}), dense tensors of a usual dtype wanted"
        if tensor.nbytes > max(tensor.untyped_storage().nbytes(), 2**20):
            return f"has a tensor that is larger than its stored data ({name})"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"has NaN or infinite weights ({name}), finite ones wanted"
    return None


def _require_finite(state: Any, path: Path) -> None:
    for name, tensor in _named_tensors(state):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{path} was not written, because {name} became NaN or infinite; files written so far are complete: lower "
                "the learning rate or the loss weights, and run again"
            )


def digest(*parts: Any) -> str:
    """Returns a digest of the values, twelve hex digits of SHA-256; tensors by content, other values by their JSON."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(str((tuple(part.shape), part.dtype)).encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
    return sha.hexdigest()[:12]


def weights_digest(state: dict[str, Tensor]) -> str:
    """Returns a digest of a network's weights and buffers, twelve hex digits, independent of their order."""
    return digest(*(part for name in sorted(state) for part in (name, state[name])))
