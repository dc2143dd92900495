"""How near generated images come to real ones, measured on the features of a classifier.

    Fréchet distance   Heusel et al. 2017 (arXiv 1706.08500), there with Inception's features: between two Gaussians
    density, coverage  Naeem et al. 2020 (arXiv 2002.09797): how deep samples lie among real images, and how many of
                       these have a sample near
"""

import torch
from torch import Tensor

NEIGHBOURS = 5  # k of density and coverage


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


def density_coverage(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Density (about 1 where the two agree, may exceed it) and coverage in [0, 1] of features (N, D), N > k, and (M, D)."""
    real, generated = real.float(), generated.float()
    radii = torch.cdist(real, real).kthvalue(k + 1, 1).values  # the nearest is the image itself
    inside = torch.cdist(real, generated) < radii[:, None]
    return float(inside.sum(0).float().mean() / k), float(inside.any(1).float().mean())
