"""Every network, dataset and method by name, as flat literal tables: the only place where a method is named.

Values are ``"module:attribute"``, imported when chosen, so that ``--help`` loads neither networks nor diffusers.
"""

import difflib
import importlib
from typing import Any

from engine.errors import UserError

METHODS = {
    "csd": "datafree.csd:CSD",
    "dda": "datafree.dda:DDA",
}

# Factories are called as factory(num_classes=...). Names without a suffix are the field's CIFAR networks.
MODELS = {}

# How real data is found, shaped and normalized.
DATASETS = {}


def lookup(table: dict[str, Any], name: str, kind: str) -> Any:
    """The entry ``name`` of one of the tables above.

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
