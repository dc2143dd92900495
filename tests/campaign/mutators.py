"""Damages to a file: bits, lengths and blocks of any file; values, names, dtypes and shapes inside files of a known kind.

Every mutator takes the file's bytes and a ``random.Random`` and returns changed bytes. ``KINDS`` lists those of each kind.
"""

import functools
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

Mutator = Callable[[bytes, random.Random], bytes]
ODD = (
    None, True, 0, -1, 1, 2, 10**9, 10**30, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "a\nb", "é\u2028",
    "x" * 5000, [], {}, [[]], [None], {"": 0}, "../../x", "/dev/null",
)  # fmt: skip


def flip(data: bytes, draw: random.Random) -> bytes:
    """Flips one or eight bits."""
    changed = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 1, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def swap(data: bytes, draw: random.Random) -> bytes:
    """Swaps two neighbouring blocks."""
    a, b, c = sorted(draw.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def insert(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(draw.choice((1, 8, 64))) + data[at:]


def remove(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[at + draw.choice((1, 8, 64)) :]


def blank(data: bytes, draw: random.Random) -> bytes:
    """Overwrites a block with zeros or ones, like a page that never reached the disk."""
    at, length = draw.randrange(len(data) + 1), draw.choice((1, 8, 512))
    return data[:at] + draw.choice((b"\0", b"\xff")) * len(data[at : at + length]) + data[at + length :]


def length(data: bytes, draw: random.Random) -> bytes:
    """Overwrites four or eight bytes with a number that a reader may take for a length."""
    size = draw.choice((4, 8))
    number = draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(data), len(data) + 1, draw.getrandbits(31)))
    at = draw.choice((0, draw.randrange(max(1, len(data) - size)), max(0, len(data) - draw.randrange(1, 64))))
    return data[:at] + number.to_bytes(8, draw.choice(("little", "big")))[:size] + data[at + size :]


BYTES = (flip, flip, truncate, swap, insert, remove, blank, length)


def change(value: Any, draw: random.Random, odd: Callable[[Any], Any]) -> Any:
    """Replaces, renames, repeats or removes one node, at any depth, of a nested value."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.25:
            return {(draw.choice(("x", "", f"{k}2")) if k == key else k): v for k, v in value.items()}
        return value | {key: change(value[key], draw, odd)}
    if isinstance(value, list | tuple) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        kind = draw.random()
        parts = [] if kind < 0.2 else [value[at]] * 2 if kind < 0.4 else [change(value[at], draw, odd)]
        return type(value)([*value[:at], *parts, *value[at + 1 :]])
    return odd(value)


def json_value(data: bytes, draw: random.Random) -> bytes:
    """Changes one value of a JSON text in kind or size."""
    raw = draw.choice(
        ("",) * 6 + ("9" * 5000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "1e999")
    )
    text = json.dumps(change(json.loads(data), draw, lambda value: "RAW" if raw else draw.choice(ODD)))
    return text.replace('"RAW"', raw).encode()


def json_line(data: bytes, draw: random.Random) -> bytes:
    """Changes one line of a JSON-lines file by ``json_value``."""
    lines = data.splitlines()
    at = draw.randrange(len(lines))
    return b"\n".join([*lines[:at], json_value(lines[at], draw), *lines[at + 1 :], b""])


def odd_tensor(tensor: Tensor, draw: random.Random) -> Any:
    """A tensor of another dtype, shape, layout or content."""
    tensor = tensor.clone()
    kind = draw.randrange(14)
    if kind < 4 and tensor.numel():
        number = (float("nan"), float("inf"), -1.0, 3e38)[kind] if tensor.is_floating_point() else (-1, 2**40, 127, 1)[kind]
        tensor.view(-1)[draw.randrange(tensor.numel())] = (
            number if tensor.dtype == torch.int64 or tensor.is_floating_point() else 1
        )
        return tensor
    if kind == 4:
        return tensor.to(draw.choice((torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)))
    if kind == 5:
        return tensor.to(draw.choice((torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16)))
    if kind == 6:
        return tensor.reshape(-1)[:-1].clone()
    if kind == 7:
        return tensor[None]
    if kind == 8:
        return torch.zeros(0)
    if kind == 9:
        return torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    if kind == 10:
        return tensor.reshape(-1).flip(0).reshape(tensor.shape)
    if kind == 11:
        return -tensor if tensor.is_floating_point() else tensor + 1 if tensor.dtype != torch.bool else ~tensor
    if kind == 12:
        return tensor.reshape(1, -1) if tensor.dim() != 2 else tensor.T.contiguous()
    return torch.zeros(1, dtype=tensor.dtype).expand(2**40)


def odd_value(value: Any, draw: random.Random) -> Any:
    if not isinstance(value, Tensor) or draw.random() < 0.15:
        return draw.choice(ODD)
    kind = draw.random()
    if kind < 0.08:
        return value.float().to_sparse()
    if kind < 0.12:
        return value.to("meta")
    return odd_tensor(value, draw)


@functools.lru_cache(maxsize=8)
def torch_state(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def torch_value(data: bytes, draw: random.Random) -> bytes:
    """Changes one value or tensor in a file of ``torch.save``."""
    file = io.BytesIO()
    torch.save(change(torch_state(data), draw, lambda value: odd_value(value, draw)), file)
    return file.getvalue()


def safetensors_value(data: bytes, draw: random.Random) -> bytes:
    """Changes one tensor, name or metadata entry of a safetensors file."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        with safe_open(file.name, framework="pt") as opened:
            tensors, about = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()
    if about and draw.random() < 0.5:
        key = draw.choice(list(about))
        about = {name: text for name, text in about.items() if name != key} | draw.choice(
            ({}, {key: json.dumps(change(json.loads(about[key]), draw, lambda value: draw.choice(ODD)))}, {key: "{"})
        )
        return save(tensors, about)
    key = draw.choice(list(tensors))
    changed = {name: tensor for name, tensor in tensors.items() if name != key}
    if draw.random() < 0.85:
        odd = odd_tensor(tensors[key], draw)
        changed[draw.choice((key,) * 6 + ("x",))] = (
            odd.clone() if odd.untyped_storage().nbytes() >= odd.nbytes else odd[:9].clone()
        )
    return save({name: tensor.contiguous() for name, tensor in changed.items()}, about)


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz_member(data: bytes, draw: random.Random) -> bytes:
    """Replaces one member of an npz archive by one of another dtype or shape, without data, or that is no array."""
    arrays = dict(np.load(io.BytesIO(data)))
    key = draw.choice(list(arrays))
    array = arrays.pop(key)
    huge = f"{{'descr': '{draw.choice(('|u1', '<i8', '<f8'))}', 'fortran_order': False, 'shape': ({draw.choice((10**6, 2**40))}, 32, 32, 3)}}"
    odd = draw.choice(
        (
            lambda: npy(huge),
            lambda: npy(huge, bytes(1000)),
            lambda: b"text",
            lambda: b"",
            lambda: npy("{}"),
            lambda: npy("(" * 9000),
            lambda: npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(64)),
            array.astype(np.float32),
            array.astype(np.int16),
            -array.astype(np.int64),
            array[:-1],
            array[None],
            array[..., :0],
            array.astype(str),
            np.array(3),
            np.array([b"\xff\xfe"] * len(array)),
            array.reshape(-1),
            None,
        )
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, value in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, value)
        if callable(odd):
            archive.writestr(draw.choice((f"{key}.npy", key)), odd())
        elif odd is not None:
            with archive.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, odd)
    return file.getvalue()


def png_header(data: bytes, draw: random.Random) -> bytes:
    """Changes size, depth or colour in the header of a PNG, with a valid checksum."""
    sizes = [draw.choice((0, 1, 2, 16, 4097, 10**5, 2**31 - 1)) for _ in range(2)]
    depth, colour, interlaced = draw.choice((1, 2, 4, 8, 16, 3)), draw.choice((0, 2, 3, 4, 6, 7)), draw.choice((0, 1, 2))
    header = b"IHDR" + struct.pack(">IIBBBBB", *sizes, depth, colour, 0, 0, interlaced)
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def text_line(data: bytes, draw: random.Random) -> bytes:
    """Replaces or removes one line of a list, or inserts an odd one."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    odd = draw.choice(
        (b"", b"x", b"\t\t\t", b"a b c", b"a -1", b"a 99999999999999999999", b"/etc/passwd 0", b"\xff\xfe 0", b"a\t")
    )
    return b"\n".join([*lines[:at], *draw.choice(([odd], [], [odd, lines[at]])), *lines[at + 1 :]])


KINDS: dict[str, tuple[Mutator, ...]] = {
    ".json": (json_value,) * 3, ".jsonl": (json_line,) * 3, ".pth": (torch_value,) * 6, ".safetensors": (safetensors_value,) * 6,
    ".npz": (npz_member,) * 6, ".png": (png_header,) * 3, ".txt": (text_line,) * 3,
}  # fmt: skip


def mutate(file: Path, draw: random.Random) -> str:
    """Changes a file; returns the name of the mutator."""
    mutator = draw.choice(
        BYTES[: 3 if KINDS.get(file.suffix) and draw.random() < 0.5 else None] + KINDS.get(file.suffix, ())
    )
    data = file.read_bytes()
    try:
        file.write_bytes(mutator(data, draw))
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        NotImplementedError,
    ):  # for example a dtype that cannot be saved, or no line to change
        mutator = flip
        file.write_bytes(flip(data, draw))
    return mutator.__name__
