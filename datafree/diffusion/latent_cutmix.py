"""Latent CutMix augmentation (LCA) of DiffDFKD (Qi et al. 2025, arXiv 2504.00870; CutMix: Yun et al. 2019, 1905.04899).

Between denoising steps a box of every latent of a batch is replaced by the same box of another one. All latents are at one
noise level, so the steps that follow blend what was pasted. Each image draws its box and its partner from its own random
stream, the partner counted from its place in the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_SHARE = 0.5  # of the area that is pasted, so that most of an image stays what its label says


@dataclass(frozen=True)
class CutMix:
    """One mixing of a batch: masks (B, 1, h, w) bool, true where pasted; partners (B,); shares (B,) of pasted area."""

    masks: Tensor
    partners: Tensor
    shares: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Mixes (B, C, h, w)."""
        return torch.where(self.masks, values[self.partners], values)

    def targets(self, targets: Tensor) -> Tensor:
        """Mixes class probabilities (B, C) by area."""
        shares = self.shares[:, None].to(targets)
        return (1 - shares) * targets + shares * targets[self.partners]


def draw_cutmix(generators: list[torch.Generator], height: int, width: int, device: torch.device | str = "cpu") -> CutMix:
    """A box for every image of a batch of at least two, of a uniform share of the area up to ``LARGEST_SHARE``."""
    count = len(generators)
    assert count > 1, "latent CutMix needs a batch of two"
    masks = torch.zeros(count, 1, height, width, dtype=torch.bool)
    partners = torch.empty(count, dtype=torch.long)
    for i, generator in enumerate(generators):
        share, top, left = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        partners[i] = (i + 1 + int(torch.randint(count - 1, (), generator=generator))) % count
        rows, columns = (max(1, round((LARGEST_SHARE * share) ** 0.5 * side)) for side in (height, width))
        y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        masks[i, :, y : y + rows, x : x + columns] = True
    return CutMix(masks.to(device), partners.to(device), masks.double().mean((1, 2, 3)).float().to(device))


def seams(masks: Tensor, width: int = 1) -> Tensor:
    """(B, 1, h, w) bool, true within ``width`` latent pixels of the edge of a pasted box, on either side."""
    inside, kernel = masks.float(), 2 * width + 1
    grown = F.max_pool2d(inside, kernel, 1, width)
    shrunk = -F.max_pool2d(-inside, kernel, 1, width)
    return grown > shrunk
