"""Several processes that share a run's work: ``accelerate launch`` or ``torchrun`` start them, on one machine or more."""

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
    """This process's number and how many there are. Process 0, ``main``, keeps the run folder; the others only compute.

    Plain values travel through host memory (gloo), tensors of a GPU from GPU to GPU (nccl). All processes must make the same
    calls in the same order.
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def stream(self) -> tuple[int, ...]:
        """What this process's random stream is a function of besides (seed, stage, round): nothing for the main one."""
        return () if self.main else (self.rank,)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by number; of use to the main one, the others get an empty list."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.main else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any = None) -> Any:
        """The main process's value, in all of them."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        """Every process's tensor, all of one shape, in all of them: (count, ...)."""
        if self.count == 1:
            return tensor[None]
        tensors = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(tensors, tensor.contiguous())
        return torch.stack(tensors)

    def broadcast_tensor(self, tensor: Tensor | None, device: torch.device) -> Tensor:
        """The main process's tensor, on every one's device; the others give None."""
        if self.count == 1:
            return tensor
        shape, dtype = self.broadcast((tensor.shape, tensor.dtype) if self.main else None)
        tensor = tensor.to(device).contiguous() if self.main else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, 0)
        return tensor

    def broadcast_weights(self, module: nn.Module | None) -> None:
        """Gives a module of every process the main one's weights and buffers."""
        if self.count > 1 and module is not None:
            for tensor in module.state_dict().values():
                dense = tensor.contiguous()  # channels_last weights travel as a copy
                dist.broadcast(dense, 0)
                tensor.copy_(dense)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named scalars, each averaged over the processes."""
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
        """A module whose backward averages gradients over the processes; batch statistics are each process's own."""
        if self.count == 1:
            return module
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # channels_last; costs a copy
        return nn.parallel.DistributedDataParallel(module)

    def check_divides(self, batch_size: int) -> None:
        """Every process takes an equal share of a batch.

        Raises:
            UserError: that is not possible.
        """
        if batch_size % self.count:
            raise UserError(
                f"--batch_size {batch_size} cannot be shared by {self.count} processes; give a multiple of {self.count}, "
                f"like {-(-batch_size // self.count) * self.count}"
            )


def join_processes(gpu: int | None = None) -> Processes:
    """This process among those that a launcher has started; alone, without one.

    Args:
        gpu: ``--gpu``; unset, each process of a machine has a GPU of its own, which nccl wants.
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
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and gpu is None else "gloo"
        # The others wait as long as the main process makes images. If one process fails, the launcher ends all of them.
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return Processes(dist.get_rank(), count)


def leave_processes() -> None:
    """Ends a command that succeeded: waits for the main process, since nccl wants all processes to leave together."""
    if dist.is_initialized():
        dist.broadcast_object_list([None])
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine, which is the GPU that it takes."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return launched_rank() == 0


# Randomness as a function of position: what step a run is at decides its numbers, not how it got there.


def position_seed(*position: int | str) -> int:
    """A 63-bit seed that is the same wherever and whenever ``position``, like ("distill", round), is reached."""
    return int.from_bytes(hashlib.sha256(repr(position).encode()).digest()[:8], "big") >> 1


def seed_position(*position: int | str) -> None:
    """Seeds torch's global random streams (CPU and every GPU) for ``position``."""
    torch.manual_seed(position_seed(*position))
