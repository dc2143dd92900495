"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): a convolution's filters take steps of even strength.

    m <- momentum m + (1 - momentum) g
    W <- W - lr (RATE sqrt(max(1, out / in)) O(momentum m + (1 - momentum) g) + weight_decay W)

W and g as matrices (out, in), a filter a row; O replaces singular values by ones near 1. Where plain SGD steps mostly along the few
directions in which gradients are large, these learn along all. What is no such matrix takes Nesterov's steps: biases,
BatchNorm, the last layer, and filters of up to three channels (images' and depthwise ones).

``torch.optim.Muon`` takes matrices alone, so that a network would need two optimizers.
"""

import torch
from torch import Tensor

RATE = 0.25  # of the filters, in learning rates of the rest
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of the Newton-Schulz iteration, as published


class Muon(torch.optim.SGD):
    """See above. Gradients of filters are replaced by the steps to take, which SGD then takes.

    Args:
        parameters: of one network or several.
        lr: of all but the filters.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float):
        filters = [parameter for parameter in parameters if parameter.ndim == 4 and parameter.shape[1] > 3]
        chosen = set(map(id, filters))
        rest = [parameter for parameter in parameters if id(parameter) not in chosen]
        groups = [{"params": rest, "momentum": momentum, "nesterov": momentum > 0}, {"params": filters}]
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        self.average, self.alike = momentum, {}  # filters by the shape of their matrix
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
    """Matrices (N, R, C) with their singular vectors, and singular values between about .7 and 1.2 (of all that are not tiny)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
