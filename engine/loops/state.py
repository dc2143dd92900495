"""The state of an optimizer: at its beginning, and taken up from a checkpoint."""

from typing import Any

import torch
from torch import Tensor

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

    Raises:
        ValueError: a state is of another shape than its parameter, or one of ``DOES_NOT_FIT``.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own):
        group.update(options)
    for parameter, remembered in optimizer.state.items():
        for name, value in remembered.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")
