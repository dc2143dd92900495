"""Latent CutMix: boxes, partners, seams, and the steps at which it is applied."""

import pytest
import torch
from torch.nn import functional as F

from datafree.diffusion.guidance import lca_steps
from datafree.diffusion.guided_sampler import LARGEST_SHARE, draw_cutmix, seams
from datafree.diffusion.variation import seeded_generators


def test_cutmix_pastes_boxes_of_partners():
    mix = draw_cutmix(seeded_generators(list(range(40))), 16, 12)
    values = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 2, 16, 12)
    mixed = mix(values)
    assert bool((mix.partners != torch.arange(40)).all()) and 0 <= mix.partners.min() and mix.partners.max() < 40
    assert bool((mixed[mix.masks.expand_as(mixed)].view(-1) >= 0).all())
    for i in range(40):
        rows, columns = mix.masks[i, 0].any(1), mix.masks[i, 0].any(0)
        assert mix.masks[i, 0].sum() == rows.sum() * columns.sum() > 0  # the mask is a box
        assert set(mixed[i].unique().tolist()) == {float(i), float(mix.partners[i])}
        assert mix.shares[i] == pytest.approx(float((mixed[i] != i).float().mean())) and mix.shares[i] < LARGEST_SHARE + 0.1
    targets = mix.targets(F.one_hot(torch.arange(40)).float())
    assert torch.allclose(targets.sum(1), torch.ones(40))
    assert torch.allclose(targets[torch.arange(40), mix.partners], mix.shares)


def test_a_box_is_drawn_from_the_image_s_own_stream():
    one, other = (draw_cutmix(seeded_generators(seeds), 8, 8) for seeds in ([1, 2, 3], [9, 2, 8]))
    assert torch.equal(one.masks[1], other.masks[1]) and one.partners[1] == other.partners[1]
    assert not torch.equal(one.masks, other.masks)


def test_seams_surround_the_box():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6, 2:6] = True
    seam = seams(mask)
    assert bool(seam[0, 0, 1, 3]) and bool(seam[0, 0, 2, 3]) and not bool(seam[0, 0, 3, 3]) and not bool(seam[0, 0, 0, 3])
    assert seam.sum() == 36 - 4


def test_when_latents_are_mixed():
    assert lca_steps(20, None) == [4, 8, 12, 16] and lca_steps(50, 20) == [20, 40] and lca_steps(20, 0) == []
    assert lca_steps(4, None) == [1, 2, 3] and lca_steps(1, None) == []
