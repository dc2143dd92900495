"""How a network's inputs are normalized, and who says so: a flag, else its checkpoint, else the dataset.

Of weights that come with their model's own configuration (``timm:resnet18``), this stands in the checkpoint's place.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.runtime.errors import UserError


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
