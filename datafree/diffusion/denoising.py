"""Training of this project's own priors: AdamW on the error of v, and a moving average for trainings of any length.

The average has the power-function profile of Karras et al. 2023 (arXiv 2312.02696). After s steps its decay is
(1 - 1 / s)^(g + 1). It therefore always covers the same share of the training so far, about ``EMA_WIDTH``. Neither a
half-life nor the length of the training must be chosen in advance. At a constant learning rate the average takes the place
of a learning rate decay. A training can therefore be stopped and resumed at any step.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.patch_unet import PatchUNet, add_noise, velocity

LABEL_DROP = 0.1  # share of training images with the null label, for classifier-free guidance
EMA_WIDTH = 0.1  # standard deviation of the average's weights over the steps, as a share of the steps taken
EMA_POWER = 6.94  # g for that width: (g + 1) / ((g + 2)^2 (g + 3)) = EMA_WIDTH^2


class Diverged(Exception):
    """Raised when the loss became NaN or infinite; the message names the step."""


class Denoising:
    """Trains a denoising network; holds the network, its moving average (``ema``) and its optimizer.

    Args:
        network: network on its device, in channels_last memory format.
        null_label: label for "no class".
        learning_rate: AdamW's learning rate as a function of the number of steps taken so far.
        flip: whether training images are mirrored at random.
        autocast: factory of the context in which the network runs, for mixed precision.
        start: number of training steps that the network has taken before; the decay of the average counts them.
    """

    def __init__(
        self,
        network: PatchUNet,
        null_label: int,
        learning_rate: Callable[[int], float],
        *,
        flip: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        start: int = 0,
    ):
        self.network, self.null_label, self.learning_rate, self.flip = network, null_label, learning_rate, flip
        self.ema = copy.deepcopy(network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate(0), betas=(0.9, 0.99), fused=True)
        self.device = next(network.parameters()).device
        self.autocast = autocast
        self.step, self.start = 0, start

    def fit(self, images_u8: Tensor, labels: Tensor, batches: Sequence[Tensor]) -> float:
        """Takes one training step per batch and returns the mean loss.

        Args:
            images_u8: (N, 3, H, W) uint8.
            labels: (N,) int64.
            batches: the indices (B,) of each batch's images.
        Raises:
            Diverged: the loss became NaN or infinite.
        """
        losses = torch.stack(
            [self.learn(images_u8[index].to(self.device), labels[index].to(self.device)) for index in batches]
        )
        diverged = (~losses.isfinite()).nonzero()
        if len(diverged):
            step = self.step - len(batches) + int(diverged[0])
            raise Diverged(f"diffusion training diverged (loss NaN at step {step})")
        return float(losses.mean())

    def learn(self, images_u8: Tensor, labels: Tensor) -> Tensor:
        """Takes one training step on images (B, 3, H, W) uint8 and labels (B,); returns the loss, a detached scalar."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        loss = self.loss(images_u8, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        weights = list(self.network.parameters())
        nn.utils.clip_grad_norm_(weights, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = (1 - 1 / (self.start + self.step)) ** (EMA_POWER + 1)
        torch._foreach_lerp_(list(self.ema.parameters()), [weight.detach() for weight in weights], 1 - decay)
        return loss.detach()

    def loss(self, images_u8: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of v at random times, scalar.

        The times of a batch are spread evenly, which reduces the noise of the gradient (Kingma et al. 2021, arXiv
        2107.00630).
        """
        count = len(images_u8)
        clean = images_u8.float().div_(127.5).sub_(1)
        if self.flip:
            mirrored = torch.rand(count, 1, 1, 1, device=self.device) < 0.5
            clean = torch.where(mirrored, clean.flip(3), clean)
        labels = torch.where(torch.rand(count, device=self.device) < LABEL_DROP, self.null_label, labels)
        t = (torch.rand(1, device=self.device) + torch.arange(count, device=self.device) / count) % 1
        noise = torch.randn_like(clean)
        with self.autocast():
            v = self.network(add_noise(clean, noise, t), t, labels)
        return F.mse_loss(v.float(), velocity(clean, noise, t))

    def state_dict(self) -> dict[str, Any]:
        """Training state, by reference: save or copy it before the next round."""
        return {
            "unet": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.network.load_state_dict(state["unet"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
