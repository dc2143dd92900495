"""How long a run is: one rule that makes a method's published lengths shorter or longer (``--scale``, ``--minutes``).

``--scale F`` multiplies each length by sqrt(F) and rounds it to the nearest whole number, at least 1:

- how many rounds there are: ``epochs``, ``warmup_epochs``, ``init_rounds``, ``images_per_class``, passes over a bank;
- how many steps a round has: ``kd_steps``, and the steps of an inversion (``g_steps``, ``init_g_steps``).

So a run has F times the student steps and F times the inversion steps, and a bank (rounds x batch) sqrt(F) times as large.
A flag says itself that it is such a length: ``flag(..., scales=True)``. All else stays as published:
weights, rates, batch sizes, batches a round, and the few steps that a generator which lives on takes for each batch
(``g_steps`` of a method whose generator is streaming, meta-learned or renewed), because they are what the method is.

Where a run has ``ep_steps``, an epoch has many short rounds. Then ``kd_steps``, the student's part of a round, stays too, and
``ep_steps`` is scaled in whole rounds: one generator step stays one to five student steps.

A length that the command gives is taken as it is. 0 and unset stay what they are.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from engine.loops.settings import DistillFlags


def scaled(groups: list, scale: float, given: Collection[str] = ()) -> list:
    """The flags of a run with their lengths scaled by the rule above.

    Args:
        groups: frozen dataclasses of flags, ``DistillFlags`` among them.
        scale: F > 0.
        given: names of flags that the command gives.
    """
    if scale == 1:
        return groups
    return [dataclasses.replace(group, **_lengths(group, math.sqrt(scale), given)) for group in groups]


def _lengths(group: Any, factor: float, given: Collection[str]) -> dict[str, int]:
    """{name: new value} of the lengths of one group of flags."""
    names = [field.name for field in dataclasses.fields(group) if field.metadata["scales"] and field.name not in given]
    lengths = {name: max(1, round(value * factor)) for name in names if (value := getattr(group, name))}
    if isinstance(group, DistillFlags) and group.ep_steps:
        lengths.pop("kd_steps", None)
        if "ep_steps" in lengths:
            lengths["ep_steps"] = group.kd_steps * max(1, round(group.ep_steps * factor / group.kd_steps))
    return lengths
