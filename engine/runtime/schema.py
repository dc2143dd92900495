"""Schemas of files: types and ranges of their fields, checked before any value is used.

A schema is one of
    str, bool, dict, list, Tensor      a value of that type
    int, float                         a whole or finite number; (int, Range(least=0)): a number in that range
    Array(torch.uint8, (None, 3))      a tensor of that dtype and shape; None: any length
    [schema]                           a list of such values
    {str: schema}                      an object of such values with any names
    {"name": schema, "other?": ...}    an object with these fields; "other" may be missing or null; more are allowed,
                                       and must fit the schema of the key ``str``, if there is one
    None                               null; {schema, schema}: a value of one of these schemas
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.runtime.errors import UserError
from engine.runtime.flags import Range

COUNT = (int, Range(least=0))
SIZE = (int, Range(least=1, most=1_000_000))  # number of classes, or pixels
SECONDS = (float, Range(least=0))
WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    dict: "an object",
    None: "null",
}


class Array(NamedTuple):
    """Schema of a tensor with a dtype and a shape, in which None stands for any length."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]


def require(value: Any, wanted: Any, what: str, advice: str = "restore it from a copy, or make it again") -> None:
    """Raises a UserError that names the first part of ``value`` that does not fit a schema.

    Args:
        value: value to check.
        wanted: the schema.
        what: file that the value is from, at the beginning of the error message ("runs/a/stages.json").
        advice: what the user can do, at the end of the error message.
    """
    if found := wrong(value, wanted):
        raise UserError(f"{what} does not have the expected contents: {found}; {advice}")


def wrong(value: Any, wanted: Any, place: str = "it") -> str | None:
    """Describes the first part of ``value`` that does not fit the schema; None: all parts fit.

    Args:
        value: value to check.
        wanted: the schema.
        place: name of the value in the description.
    """
    if isinstance(wanted, frozenset | set):
        found = [wrong(value, option, place) for option in wanted]
        return next(iter(found)) if all(found) else None
    if isinstance(wanted, Array):
        fits = isinstance(value, Tensor) and value.dtype == wanted.dtype and len(value.shape) == len(wanted.shape)
        fits = fits and all(side in (None, length) for side, length in zip(wanted.shape, value.shape))
        sides = " x ".join("any" if side is None else str(side) for side in wanted.shape)
        return None if fits else f"{place} is {shown(value)}, a tensor {wanted.dtype} of {sides} wanted"
    if isinstance(wanted, tuple):
        kind, legal = wanted
        fits = wrong(value, kind) is None and legal.has(value)
        return None if fits else f"{place} is {shown(value)}, {WORDS[kind]} {legal} wanted"
    if isinstance(wanted, list):
        if not isinstance(value, list | tuple):
            return f"{place} is {shown(value)}, a list wanted"
        return next((e for k, item in enumerate(value) if (e := wrong(item, wanted[0], f"{place}[{k}]"))), None)
    if isinstance(wanted, dict):
        return _wrong_field(value, wanted, place)
    if wanted in (int, float):
        fits = (
            isinstance(value, int if wanted is int else (int, float)) and not isinstance(value, bool) and Range().has(value)
        )
    else:
        fits = value is None if wanted is None else isinstance(value, wanted)
    return None if fits else f"{place} is {shown(value)}, {WORDS.get(wanted) or wanted.__name__} wanted"


def _wrong_field(value: Any, wanted: dict, place: str) -> str | None:
    if not isinstance(value, dict):
        return f"{place} is {shown(value)}, an object wanted"
    inside = "" if place == "it" else f"{place}."
    if str in wanted:
        known = {name.removesuffix("?") for name in wanted if name is not str}
        named = (
            wrong(key, str, f"a name in {place}") or wrong(item, wanted[str], f"{inside}{key}")
            for key, item in value.items()
            if key not in known
        )
        if found := next(filter(None, named), None):
            return found
    for name, schema in wanted.items():
        if name is str:
            continue
        key, optional = name.removesuffix("?"), name.endswith("?")
        if optional and value.get(key) is None:
            continue
        if key not in value:
            return f"{inside}{key} is missing"
        if found := wrong(value[key], schema, f"{inside}{key}"):
            return found
    return None


def shown(value: Any) -> str:
    """Returns a short description of a value for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} of {' x '.join(map(str, value.shape)) or 'one number'}"
    if isinstance(value, str | bool | int | float | None):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of many digits"
        return text if len(text) <= 60 else text[:60] + "..."
    return f"a {type(value).__name__}"
