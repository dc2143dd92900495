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
