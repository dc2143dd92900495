"""Random numbers are a function of the position in a run."""

import torch

from engine.runtime.processes import position_seed, seed_position


def test_seeds_are_functions_of_position():
    assert position_seed(0, "a", 1) == position_seed(0, "a", 1) != position_seed(0, "a", 2)
    seed_position(3, "x")
    first = torch.rand(2)
    torch.rand(5)
    seed_position(3, "x")
    assert torch.equal(first, torch.rand(2))
