"""What the teacher has answered, so that it is never asked the same question twice.

A bank is uint8, its views are finite and the teacher is frozen: its logits are a finite table. Before some steps of a round
all their questions that are new go to the teacher together, in batches of the size of the student's. So an answer is that of
a run without a memo, whatever the batch it came in, and one that was lost with a kill comes again. A GPU is waited for before
those steps, not at each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.data.bank import memory_limit
from engine.data.crops import KeyedViews
from engine.runtime.errors import UserError
from engine.runtime.processes import Processes

STEPS = 16  # whose questions are asked together
WORTHWHILE = 0.1  # share of questions that come again, below which "auto" does without


class Memo:
    """The teacher's logits by key.

    Args:
        answer: keys (b,) -> logits (b, C) of the images in these views.
        keys: how many there are.
        rows: answers that are kept; what comes beyond them is asked again.
        block: b, the same in all calls.
        processes: those that share the questions; each keeps all answers.
    """

    def __init__(
        self,
        answer: Callable[[Tensor], Tensor],
        keys: int,
        rows: int,
        block: int,
        device: torch.device,
        processes: Processes = Processes(),
    ):
        self.answer, self.rows, self.block, self.processes = answer, rows, block, processes
        self.row_of = torch.zeros(keys, dtype=torch.int32, device=device)  # 0: not asked yet
        self.logits: Tensor | None = None  # row 0 stays empty
        self.used = self.questions = self.asked = 0
        self.passing = self.row_of.new_empty(0, dtype=torch.long)

    def prepare(self, keys: Tensor) -> None:
        """Asks what is new of keys (steps, B) of all processes, up to ``STEPS`` steps."""
        self.row_of[self.passing] = 0
        new = keys[self.row_of[keys] == 0].unique()
        self.questions, self.asked = self.questions + keys.numel(), self.asked + len(new)
        if not len(new):
            return
        answers = self._asked(new)
        if self.logits is None:
            room = 1 + self.rows + STEPS * self.block * self.processes.count
            self.logits = answers.new_empty(room, answers.shape[1])
        first = 1 + self.used
        self.logits[first : first + len(new)] = answers
        self.row_of[new] = torch.arange(first, first + len(new), dtype=torch.int32, device=new.device)
        kept = min(len(new), self.rows - self.used)
        self.used, self.passing = self.used + kept, new[kept:]

    def _asked(self, keys: Tensor) -> Tensor:
        """The teacher's logits (n, C) for keys (n,), in full blocks, of which every process asks its share."""
        rank, count = self.processes.rank, self.processes.count
        filled = torch.cat([keys, keys[:1].expand(-len(keys) % (self.block * count))])
        blocks = filled.view(-1, count, self.block)
        answers = torch.stack([self.answer(block) for block in blocks[:, rank]])  # (n', block, C)
        return self.processes.gather_tensor(answers).transpose(0, 1).flatten(0, 2)[: len(keys)]

    def __call__(self, keys: Tensor) -> Tensor:
        """Logits (B, C) of keys (B,) that were prepared."""
        return self.logits.index_select(0, self.row_of.index_select(0, keys))

    @property
    def description(self) -> str:
        """What came of it, in one line."""
        known = 100 * (1 - self.asked / max(1, self.questions))
        size = 0 if self.logits is None else self.used * self.logits[0].nbytes
        answers = f"{self.used} answers, {size / 1e6:.0f} MB"
        return f"memo: of {self.questions} questions to the teacher {known:.1f} % were answered before; {answers}"


def check_memo(choice: str) -> None:
    """Raises a UserError if ``--memo`` is none of what ``memo_rows`` takes."""
    if choice not in ("auto", "no") and not choice.isdecimal():
        raise UserError(f"--memo {choice} found; give auto, no, or a number of MiB")


def memo_rows(choice: str, views: KeyedViews, questions: int, row_bytes: int, device: torch.device) -> tuple[int, str]:
    """How many answers are kept, and a line that says so, or why there are none.

    Args:
        choice: "auto", "no" or MiB.
        questions: images that student steps will see, of all processes.
        row_bytes: of an answer.
    """
    if choice == "no":
        return 0, ""
    again = repeated(questions, len(views))
    if choice == "auto" and again < WORTHWHILE:
        return 0, f"memo: none, for {100 * again:.0f} % of the questions to the teacher would come again"
    bound = memory_limit(device) // 2 if choice == "auto" else int(choice) * 2**20
    table = 4 * len(views)
    rows = min(len(views), questions, (bound - table) // row_bytes)
    if rows < 1:
        found = f"takes {table / 2**20:.0f} MiB of {bound / 2**20:.0f}; give --memo MiB"
        return 0, f"memo: none, for its table of {len(views)} views {found}"
    return rows, (
        f"memo: {rows} of the teacher's answers to {len(views)} views are kept, at most {(table + rows * row_bytes) / 1e6:.0f} "
        f"MB on {device}; about {100 * again:.0f} % of the questions come again"
    )


def repeated(questions: int, keys: int) -> float:
    """The share of so many random questions that were asked before, of ``keys`` different ones: 1 - k (1 - (1 - 1/k)^q) / q."""
    known = -torch.expm1(torch.tensor(-questions / keys, dtype=torch.double)).item()
    return 1 - keys * known / questions
