"""Cache of teacher logits: the teacher runs only once on each view of an image.

The images of a bank are uint8, each has a finite number of views (crop and flip), and the teacher is frozen. Its logits are
therefore a finite table, indexed by the key of image and view. Before every few student steps, the teacher runs on all their
views that are not in the cache, in batches as large as the student's. Cached logits equal those of a run without the cache
and do not depend on the batch in which they were computed. A cache lost in a kill is computed again. The GPU is synchronized
once before these steps, not at each step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.data.crops import KeyedViews
from engine.data.image_bank import memory_limit
from engine.runtime.errors import UserError
from engine.runtime.processes import Processes

STEPS = 16  # student steps whose missing logits are computed together
WORTHWHILE = 0.1  # share of views that come again, below which "auto" uses no cache


class LogitCache:
    """Cache of teacher logits by key of image and view.

    Args:
        compute_logits: function keys (b,) -> teacher logits (b, C) of the images in these views.
        keys: number of different keys.
        rows: number of keys whose logits are kept; all others are computed again each time.
        block: number b of keys in a call of ``compute_logits``, the same in all calls.
        device: device of the cache.
        processes: processes that share the computation; each of them holds the whole cache.
    """

    def __init__(
        self,
        compute_logits: Callable[[Tensor], Tensor],
        keys: int,
        rows: int,
        block: int,
        device: torch.device,
        processes: Processes = Processes(),
    ):
        self.compute_logits, self.rows, self.block, self.processes = compute_logits, rows, block, processes
        self.row_of = torch.zeros(keys, dtype=torch.int32, device=device)  # row of each key in ``logits``; 0: not computed
        self.logits: Tensor | None = None  # row 0 is unused
        self.used = self.lookups = self.misses = 0
        self.passing = self.row_of.new_empty(0, dtype=torch.long)

    def prepare(self, keys: Tensor) -> None:
        """Computes the missing logits for the next student steps.

        Args:
            keys: keys (steps, B) of the batches of all processes, for at most ``STEPS`` steps.
        """
        self.row_of[self.passing] = 0
        new = keys[self.row_of[keys] == 0].unique()
        self.lookups, self.misses = self.lookups + keys.numel(), self.misses + len(new)
        if not len(new):
            return
        computed = self._compute(new)
        if self.logits is None:
            room = 1 + self.rows + STEPS * self.block * self.processes.count
            self.logits = computed.new_empty(room, computed.shape[1])
        first = 1 + self.used
        self.logits[first : first + len(new)] = computed
        self.row_of[new] = torch.arange(first, first + len(new), dtype=torch.int32, device=new.device)
        kept = min(len(new), self.rows - self.used)
        self.used, self.passing = self.used + kept, new[kept:]

    def _compute(self, keys: Tensor) -> Tensor:
        """Computes teacher logits (n, C) for keys (n,) in full blocks; each process computes its share of the blocks."""
        rank, count = self.processes.rank, self.processes.count
        filled = torch.cat([keys, keys[:1].expand(-len(keys) % (self.block * count))])
        blocks = filled.view(-1, count, self.block)
        computed = torch.stack([self.compute_logits(block) for block in blocks[:, rank]])  # (n', block, C)
        return self.processes.gather_tensor(computed).transpose(0, 1).flatten(0, 2)[: len(keys)]

    def __call__(self, keys: Tensor) -> Tensor:
        """Returns the logits (B, C) of keys (B,) that were given to ``prepare`` before."""
        return self.logits.index_select(0, self.row_of.index_select(0, keys))

    @property
    def description(self) -> str:
        """Use and size of the cache, as one log line."""
        hits = 100 * (1 - self.misses / max(1, self.lookups))
        size = 0 if self.logits is None else self.used * self.logits[0].nbytes
        return (
            f"logit cache: {hits:.1f} % of {self.lookups} teacher outputs came from the cache; {self.used} entries, "
            f"{size / 1e6:.0f} MB"
        )


def check_logit_cache(choice: str) -> None:
    """Raises a UserError if the value of ``--logit_cache`` is not one that ``cached_keys`` accepts."""
    if choice not in ("auto", "no") and not choice.isdecimal():
        raise UserError(f"--logit_cache {choice} found, auto, no, or a number of MiB wanted")


def cached_keys(choice: str, views: KeyedViews, lookups: int, row_bytes: int, device: torch.device) -> tuple[int, str]:
    """Returns (number of keys whose logits are cached, log line with this number or the reason for no cache).

    Args:
        choice: value of ``--logit_cache``: "auto", "no" or a size in MiB.
        views: views of the images, which define the keys.
        lookups: number of images in all student steps of the run, over all processes.
        row_bytes: bytes of the logits of one key.
        device: device of the cache.
    """
    if choice == "no":
        return 0, ""
    again = repeated(lookups, len(views))
    if choice == "auto" and again < WORTHWHILE:
        return 0, f"logit cache: none, because only {100 * again:.0f} % of the teacher's outputs would come from it"
    bound = memory_limit(device) // 2 if choice == "auto" else int(choice) * 2**20
    index = 4 * len(views)
    rows = min(len(views), lookups, (bound - index) // row_bytes)
    if rows < 1:
        found = f"needs {index / 2**20:.0f} of at most {bound / 2**20:.0f} MiB; give a larger --logit_cache"
        return 0, f"logit cache: none, because its index of {len(views)} views {found}"
    return rows, (
        f"logit cache: room for {rows} of {len(views)} image views, at most {(index + rows * row_bytes) / 1e6:.0f} MB on "
        f"{device}; about {100 * again:.0f} % of the teacher's outputs will come from it"
    )


def repeated(lookups: int, keys: int) -> float:
    """Returns the expected share of repetitions among random draws from ``keys`` keys: 1 - k (1 - (1 - 1/k)^q) / q.

    Args:
        lookups: number of draws q.
        keys: number of different keys k.
    """
    known = -torch.expm1(torch.tensor(-lookups / keys, dtype=torch.double)).item()
    return 1 - keys * known / lookups
