"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): orthogonalized update steps for convolution filters.

    m <- momentum m + (1 - momentum) g
    W <- W - lr (RATE sqrt(max(1, out / in)) O(momentum m + (1 - momentum) g) + weight_decay W)

W and g are matrices (out, in) with one filter per row. O replaces the singular values by values near 1. Plain SGD moves
mostly along the few directions with large gradients; Muon moves along all directions. All other parameters take SGD steps
with Nesterov momentum: biases, BatchNorm, the last layer, and filters of up to three channels (first
layer and depthwise).

``torch.optim.Muon`` accepts only matrices, so a network would need a second optimizer for the other parameters.
"""

import torch
from torch import Tensor

RATE = 0.25  # learning rate of the filters, relative to that of the other parameters
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # Newton-Schulz iteration, as published


class Muon(torch.optim.SGD):
    """Muon for convolution filters, SGD with Nesterov momentum for all other parameters; see above.

    ``step`` replaces the gradients of the filters by the orthogonalized steps, and SGD then applies them.

    Args:
        parameters: parameters of one network or several.
        lr: learning rate of the parameters that are not filters.
        momentum: momentum of both updates.
        weight_decay: weight decay of all parameters.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float):
        filters = [parameter for parameter in parameters if parameter.ndim == 4 and parameter.shape[1] > 3]
        chosen = set(map(id, filters))
        rest = [parameter for parameter in parameters if id(parameter) not in chosen]
        groups = [{"params": rest, "momentum": momentum, "nesterov": momentum > 0}, {"params": filters}]
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        self.average, self.alike = momentum, {}  # filters grouped by the shape of their matrix
        for parameter in filters:
            self.state[parameter]["average"] = torch.zeros_like(parameter)
            self.alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)

    @torch.no_grad()
    def step(self, closure=None):
        for (rows, columns), filters in self.alike.items():
            filters = [parameter for parameter in filters if parameter.grad is not None]
            if not filters:
                continue
            averages = [self.state[parameter]["average"] for parameter in filters]
            gradients = [parameter.grad for parameter in filters]
            torch._foreach_lerp_(averages, gradients, 1 - self.average)
            ahead = torch.stack(torch._foreach_lerp(gradients, averages, self.average)).flatten(2)
            steps = orthogonalized(ahead).mul_(RATE * max(1, rows / columns) ** 0.5)
            for gradient, step in zip(gradients, steps):
                gradient.copy_(step.view_as(gradient))
        return super().step(closure)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Returns matrices (N, R, C) with the same singular vectors and singular values between about .7 and 1.2.

    Singular values that are tiny relative to the largest stay smaller.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
