"""Several processes for one run, started by ``accelerate launch`` or ``torchrun`` on one or more machines."""

import hashlib
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from engine.runtime.errors import UserError, launched_rank


@dataclass(frozen=True)
class Processes:
    """Rank of this process and number of processes. Process 0, the main one, writes the run folder; the others only compute.

    Plain values are sent through host memory (gloo), GPU tensors from GPU to GPU (nccl). All processes must make the same
    calls in the same order.
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def stream(self) -> tuple[int, ...]:
        """Part of the random stream's position besides (seed, stage, round): () for the main process, else (rank,)."""
        return () if self.main else (self.rank,)

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes by rank in the main process; an empty list in the others."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.main else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any = None) -> Any:
        """Returns the main process's value in all processes."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all processes, which have the same shape, stacked as (count, ...), in all processes."""
        if self.count == 1:
            return tensor[None]
        tensors = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(tensors, tensor.contiguous())
        return torch.stack(tensors)

    def broadcast_tensor(self, tensor: Tensor | None, device: torch.device) -> Tensor:
        """Returns the main process's tensor on the device of each process. The other processes pass None."""
        if self.count == 1:
            return tensor
        shape, dtype = self.broadcast((tensor.shape, tensor.dtype) if self.main else None)
        tensor = tensor.to(device).contiguous() if self.main else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, 0)
        return tensor

    def broadcast_weights(self, module: nn.Module | None) -> None:
        """Copies the main process's weights and buffers to the module of every process."""
        if self.count > 1 and module is not None:
            for tensor in module.state_dict().values():
                dense = tensor.contiguous()  # channels_last weights are sent as a copy
                dist.broadcast(dense, 0)
                tensor.copy_(dense)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns named scalars, each averaged over the processes."""
        if self.count == 1:
            return values
        total = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(total)
        return dict(zip(values, total / self.count))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its mean over the processes."""
        if self.count > 1:
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.count

    def parallel(self, module: nn.Module) -> nn.Module:
        """Returns the module with gradients averaged over the processes in the backward pass.

        BatchNorm uses the batch statistics of each process.
        """
        if self.count == 1:
            return module
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # channels_last; costs a copy
        return nn.parallel.DistributedDataParallel(module)

    def check_divides(self, batch_size: int) -> None:
        """Checks that a batch can be divided equally among the processes.

        Raises:
            UserError: the batch size is not a multiple of the number of processes.
        """
        if batch_size % self.count:
            raise UserError(
                f"--batch_size {batch_size} cannot be divided equally among {self.count} processes; give a multiple of "
                f"{self.count}, for example {-(-batch_size // self.count) * self.count}"
            )


def join_processes(gpu: int | None = None) -> Processes:
    """Joins the processes that a launcher started; without a launcher, returns a single process.

    Args:
        gpu: value of ``--gpu``. If it is None, each process on a machine has its own GPU, as nccl requires.
    Raises:
        UserError: environment variables of the launcher are missing.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return Processes()
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {count} and {missing[0]} is not set; start several processes with accelerate launch or torchrun"
        )
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and gpu is None else "gloo"
        # The other processes wait while the main process makes images. If one process fails, the launcher ends all of them.
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return Processes(dist.get_rank(), count)


def leave_processes() -> None:
    """Leaves the process group after a successful command.

    Waits for the main process first, because nccl requires all processes to leave together.
    """
    if dist.is_initialized():
        dist.broadcast_object_list([None])
        dist.destroy_process_group()


def local_rank() -> int:
    """Returns the rank of this process on its machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this is the main process, which prints and writes."""
    return launched_rank() == 0


# Random numbers depend only on the position in the run (for example the round), not on how the run got there.


def position_seed(*position: int | str) -> int:
    """Returns a 63-bit seed that depends only on ``position``, for example (seed, "distill", round)."""
    return int.from_bytes(hashlib.sha256(repr(position).encode()).digest()[:8], "big") >> 1


def seed_position(*position: int | str) -> None:
    """Seeds torch's global random streams, of the CPU and every GPU, with ``position_seed(*position)``."""
    torch.manual_seed(position_seed(*position))
