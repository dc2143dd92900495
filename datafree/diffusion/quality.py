"""How near generated images come to real ones, measured on the features of a classifier: beside density and coverage
(``engine.loops.measures``) the Fréchet distance between two Gaussians (Heusel et al. 2017, arXiv 1706.08500, there with
Inception's features).
"""

import torch
from torch import Tensor


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features (N, D) and (M, D); 0 for equal moments.

    Few samples raise it: compare numbers that were taken with equally many.
    """
    real, generated = real.double(), generated.double()
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), torch.cov(x.T)) for x in (real, generated))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace_root = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root)
