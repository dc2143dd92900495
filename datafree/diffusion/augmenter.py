"""An augmenter turns an image of the bank into a new one.

Its random numbers come from one seed an image, drawn on the CPU whatever the device, so that neither the batch size nor the
order of the images changes a variant; but where the BN statistics of those drawn together guide them, they do.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine.runtime.errors import UserError


class Augmenter:
    """A source of variants. Subclasses implement ``augment``, and the rest where they learn from the bank.

    Attributes:
        external_prior: the pretrained model behind the variants as the results table names it, ``"<model id>[@revision]"``,
            or ``"none"``.
        fit_rounds: calls of ``fit`` wanted before the first ``augment``.
        network, steps: the denoising network and its calls for a batch of variants, for torch.compile; None: leave it alone.
    """

    external_prior: str = "none"
    fit_rounds: int = 0
    network: nn.Module | None = None
    steps: int = 0

    def fit(self, images_u8: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        """One round of training on the bank, its randomness from the global stream.

        Args:
            images_u8: (N, 3, H, W) uint8.
            labels: (N,) int64.
        Returns:
            Named scalars for the log.
        """
        raise NotImplementedError(f"{type(self).__name__} does not learn from the bank")

    def augment(self, images: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        """One variant of each image.

        Args:
            images: (B, 3, H, W) float32 in [0, 1].
            labels: (B,) int64.
            seeds: B seeds; an image's variant depends on its own seed alone.
        Returns:
            (B, 3, H, W) float32 in [0, 1], on the augmenter's device.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What ``fit`` has changed: tensors and plain values; empty for a pretrained model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where ``state_dict`` was called."""


def seeded_generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator a seed; diffusers moves what they draw to its own device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seeded_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (len(seeds), *shape) float32 on the CPU, row k from ``seeds[k]`` alone."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in seeded_generators(seeds)])


def denoising_steps(strength: float, num_inference_steps: int) -> int:
    """Network evaluations that ``strength`` leaves of ``num_inference_steps``, rounded down as diffusers does.

    Raises:
        UserError: ``strength`` is outside (0, 1], or no step is left.
    """
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g} is outside (0, 1]: the share of the way back to pure noise")
    steps = int(strength * num_inference_steps)
    if steps < 1:
        raise UserError(
            f"--strength {strength:g} of --num_inference_steps {num_inference_steps} leaves no denoising step; "
            f"give --num_inference_steps {-int(-1 // strength)} or more, or a larger --strength"
        )
    return steps
