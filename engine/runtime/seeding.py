"""Randomness as a function of position: what step a run is at decides its numbers, not how it got there."""

import hashlib

import torch


def position_seed(*position: int | str) -> int:
    """A 63-bit seed that is the same wherever and whenever ``position``, like ("distill", round), is reached."""
    return int.from_bytes(hashlib.sha256(repr(position).encode()).digest()[:8], "big") >> 1


def seed_position(*position: int | str) -> None:
    """Seeds torch's global random streams (CPU and every GPU) for ``position``."""
    torch.manual_seed(position_seed(*position))
