"""Mixed precision, the choice of the device, and the state of an optimizer."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from engine.runtime.errors import UserError
from engine.runtime.processes import local_rank

AMP = ("auto", "no", "bf16", "fp16")


def choose_amp(amp: str, device: torch.device, earlier: str | None = None) -> str:
    """Resolves ``--amp auto``: the precision that the run began with, else bf16 where it is faster, else float32.

    Intel processors with AVX-512 instructions for bf16, but without AMX (which virtual machines may hide), count as slower in
    bf16. That was measured on one of them, a Xeon of model 207 (docs/speed.md). Other hardware that computes in bf16 counts as
    faster.

    Args:
        amp: value of ``--amp``.
        device: device of the networks.
        earlier: precision of a resumed run, perhaps from another machine; see ``engine.runtime.run.earlier_value``.
    Returns:
        "no", "bf16" or "fp16".
    """
    if amp != "auto":
        return amp
    if earlier in AMP[1:]:
        return earlier
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        able = found.get("amx_bf16") or (found.get("avx512_bf16") and "Intel" not in found.get("cpu_name", ""))
    return "bf16" if able else "no"


class Precision:
    """Mixed precision: ``autocast()`` for forward passes, ``minimize(loss, optimizer)`` for backward pass and step.

    fp16 uses loss scaling. The scale adapts to the losses of one optimizer, so each optimizer needs its own Precision
    object. If the optimizer is kept from round to round, its Precision is part of the state to be saved.

    Args:
        amp: "no", "bf16" or "fp16".
        device: device of the networks.
    Raises:
        UserError: fp16 on a CPU, which has no loss scaling and no fast fp16 arithmetic.
    """

    def __init__(self, amp: str, device: torch.device):
        if amp == "fp16" and device.type != "cuda":
            raise UserError(f"--amp fp16 needs a GPU, the device is {device}; give --amp no or --amp bf16")
        self.amp = amp
        self.dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def fresh(self) -> "Precision":
        """Returns a Precision of the same kind for another optimizer, with the initial loss scale."""
        return type(self)(self.amp, self.device)

    def autocast(self) -> AbstractContextManager:
        """Returns the context for forward passes. Losses are computed in float32 outside it, or by autocast's rules."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def minimize(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Runs the backward pass of ``loss`` and one step of the optimizer."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the loss scaling; empty without fp16."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)


def choose_device(gpu: int | None) -> torch.device:
    """Returns the device for ``--gpu``.

    Args:
        gpu: index of a GPU; -1: the CPU; None: the GPU with this process's local rank, or the CPU if there is no GPU.
    Raises:
        UserError: there is no GPU with this index.
    """
    count = torch.cuda.device_count()
    if gpu is None:
        gpu = local_rank() if count else -1
    if gpu < 0:
        return torch.device("cpu")
    if gpu >= count:
        found = f"this machine has GPUs 0 to {count - 1}" if count else "this machine has no GPU that torch can use"
        raise UserError(f"--gpu {gpu}: {found}; leave --gpu out, or give -1 for the CPU")
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


# The state of an optimizer: initialized, or loaded from a checkpoint.


OPTIMIZER = {"state": dict, "param_groups": [dict]}
# Errors that torch raises on states of other networks, and on states that are not of an optimizer.
DOES_NOT_FIT = (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError)


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Sets the momentum of every parameter to 0, the value before the first step.

    Otherwise fused SGD (torch 2.11) allocates the momentum buffers in the first step. If the fp16 loss scale overflows in
    that step, the buffers are not written, and the previous contents of the memory become the momentum.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the per-parameter state of an optimizer. Learning rates and other options keep the values of the flags.

    Args:
        optimizer: optimizer after ``begin_momentum``, whose state has the entries that must be loaded.
        state: ``state_dict`` of an optimizer.
    Raises:
        ValueError: an entry is missing or of another shape or dtype.
        DOES_NOT_FIT: torch refuses the state.
    """
    wanted = {parameter: dict(remembered) for parameter, remembered in optimizer.state.items()}
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own):
        group.update(options)
    for parameter, own_state in wanted.items():
        for name, value in own_state.items():
            found = optimizer.state.get(parameter, {}).get(name)
            if not isinstance(found, Tensor) or (found.shape, found.dtype) != (value.shape, value.dtype):
                raise ValueError(f"a parameter of {tuple(parameter.shape)} has no {name} of that shape")
