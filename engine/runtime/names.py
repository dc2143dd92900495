"""Tables of names, like those of ``registry.py``: finding a row, and importing what it names."""

import difflib
import importlib
from typing import Any

from engine.runtime.errors import UserError


def lookup(table: dict[str, Any], name: str, kind: str) -> Any:
    """The entry ``name`` of a table.

    Raises:
        UserError: there is none; the message lists the nearest names, or all.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"unknown {kind} '{name}'; {hint}known: {', '.join(sorted(table))}")


def resolve(path: str) -> Any:
    """Imports ``"package.module:attribute"``."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
