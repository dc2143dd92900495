"""Several processes that share a stage's work: ``accelerate launch`` or ``torchrun`` start them, on one machine or more."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from engine.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are. Process 0, ``main``, keeps the run folder; the others only compute.

    What travels between them goes through host memory (gloo): finished images, a student's weights.
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by number; of use to the main one, the others get an empty list."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.main else None
        torch.distributed.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any = None) -> Any:
        """The main process's value, in all of them."""
        if self.count == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]


def join_processes() -> Processes:
    """This process among those that a launcher has started; alone, without one.

    Raises:
        UserError: the launcher's variables are incomplete.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return Processes()
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {count} and {missing[0]} is not set; start several processes with accelerate launch or torchrun"
        )
    if not torch.distributed.is_initialized():
        # A process that waits may do so while the main one trains; the launcher ends all of them if one fails.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    return Processes(torch.distributed.get_rank(), count)


def local_rank() -> int:
    """This process's number on its machine, which is the GPU that it takes."""
    return int(os.environ.get("LOCAL_RANK", 0))
