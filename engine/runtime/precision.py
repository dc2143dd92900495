"""Mixed precision in two lines: where networks run, and how a loss is minimized."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from engine.runtime.errors import UserError
from engine.runtime.processes import local_rank

AMP = ("auto", "no", "bf16", "fp16")


def choose_amp(amp: str, device: torch.device, earlier: str | None = None) -> str:
    """``--amp`` without "auto": what the run began with, else bf16 where the device multiplies it in hardware, else float32.

    Args:
        earlier: of a run that goes on, perhaps on another machine; see ``engine.runtime.run.earlier_value``.
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
        able = found.get("avx512_bf16") or found.get("amx_bf16")
    return "bf16" if able else "no"


class Precision:
    """``autocast()`` around networks, ``minimize(loss, optimizer)`` for backward and step, with loss scaling for fp16.

    The scale of fp16 follows the losses of one optimizer: each optimizer has a Precision of its own, which lives as long. One
    that outlives a round is part of its owner's state.

    Args:
        amp: "no", "bf16" or "fp16".
    Raises:
        UserError: fp16 off a GPU, where it has no loss scaling and no speed.
    """

    def __init__(self, amp: str, device: torch.device):
        if amp == "fp16" and device.type != "cuda":
            raise UserError(f"--amp fp16 needs a GPU, the device is {device}; give --amp no or --amp bf16")
        self.amp = amp
        self.dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def fresh(self) -> "Precision":
        """The same for another optimizer: a scale of its own, as at the beginning."""
        return type(self)(self.amp, self.device)

    def autocast(self) -> AbstractContextManager:
        """The context in which networks run; losses are computed in float32 outside it or by autocast's own rules."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def minimize(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One optimizer step down the gradient of ``loss``."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The scale and what it follows; empty without fp16."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)


def choose_device(gpu: int | None) -> torch.device:
    """``--gpu N`` -> that GPU; None -> this process's of several, the first one, else the CPU; -1 -> the CPU.

    Raises:
        UserError: that GPU does not exist.
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


# The state of an optimizer: at its beginning, and taken up from a checkpoint.


OPTIMIZER = {"state": dict, "param_groups": [dict]}
# What torch raises on states of other networks, or that no optimizer has left.
DOES_NOT_FIT = (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError)


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Gives every parameter the momentum 0 that its first step would begin with.

    Without it fused SGD (torch 2.11) allots the buffers in the first step and, where fp16's loss scale overflows there, leaves
    them as they are: whatever was in that memory becomes the momentum.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes up what an optimizer remembers of each parameter; rates and the like stay those of the flags.

    Args:
        optimizer: after ``begin_momentum``, which says what there is to remember.
    Raises:
        ValueError: something is missing or of another shape, or one of ``DOES_NOT_FIT``.
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
