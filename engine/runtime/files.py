"""Files that are either whole or absent: atomic writes, and reads that never unpickle code."""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.runtime.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; renamed onto it at the end, removed after an error.

    A reader sees the old file or the whole new one, whenever the writer is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); delete it, or restore it from a copy") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a flat dict of tensors as one safetensors file, atomically."""
    # Bytes first: the library's own file writer hides from us why a write failed.
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Maps a safetensors file: what is not looked at is not read.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); delete it and make it again") from None
    except RuntimeError as error:  # Linux allows a process 65530 maps unless told otherwise
        raise UserError(f"{path} cannot be mapped ({error}); of very many files, raise sysctl vm.max_map_count") from None


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """``torch.save`` that leaves the old file or the whole new one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, what: str = "checkpoint") -> Any:
    """Reads a ``torch.save`` or safetensors file to CPU memory without ever running code from it.

    Args:
        what: how the error calls the file ("teacher checkpoint").
    Raises:
        UserError: the file is missing, truncated, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path} {'is a directory' if path.is_dir() else 'does not exist'}")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen unrelated types on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds pickled objects other than tensors, which may run code and are never loaded"
        raise UserError(f"{what} {path} cannot be read: {reason}; a file with a plain state_dict is wanted") from None


def digest(*parts: Any) -> str:
    """Twelve hex digits that name the values: tensors by content, anything else by its JSON."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(str((tuple(part.shape), part.dtype)).encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
    return sha.hexdigest()[:12]


def weights_digest(state: dict[str, Tensor]) -> str:
    """Twelve hex digits that name a network's weights and buffers, whatever their order."""
    return digest(*(part for name in sorted(state) for part in (name, state[name])))
