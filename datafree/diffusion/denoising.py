"""How this project's own priors learn: steps of AdamW on the error of v, and a moving average that fits any length.

The average is the power function of Karras et al. 2023 (arXiv 2312.02696): after s steps its decay is (1 - 1 / s)^(g + 1),
so that it always reaches over the same share of the training so far, about ``EMA_WIDTH`` of it. It needs no half-life, and
so neither a length known in advance nor a learning rate that falls: at a constant rate the average takes the place of the
decay, and a training can be stopped, and gone on with, at any step.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.patch_unet import PatchUNet, add_noise, velocity

LABEL_DROP = 0.1  # share of training images that carry the null label, for guidance
EMA_WIDTH = 0.1  # standard deviation of the average's weights over steps, as a share of the steps taken
EMA_POWER = 6.94  # g for that width: (g + 1) / ((g + 2)^2 (g + 3)) = EMA_WIDTH^2


class Diverged(Exception):
    """The loss is no longer a number; says at which step."""


class Denoising:
    """A network that learns to denoise, its moving average, and its optimizer.

    Args:
        network: on its device, in channels_last; label ``null_label`` stands for none.
        learning_rate: AdamW's, of the number of steps taken so far.
        flip: whether the mirror image of a training image is as good as itself.
        autocast: the context in which the network runs, for mixed precision.
        start: steps that the network has taken elsewhere; the average counts them.
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
        """One step a batch; returns their mean loss.

        Args:
            images_u8: (N, 3, H, W) uint8; labels: (N,) int64.
            batches: indices (B,) into them.
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
        """One step on images (B, 3, H, W) uint8 and labels (B,) on the device; returns its loss, a scalar without a graph."""
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
        """Mean squared error of v at random times, scalar. The times of a batch are spread evenly (Kingma et al. 2021,
        arXiv 2107.00630), for less noise in the gradient."""
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
        """Everything that training goes on from, by reference: save or copy it before the next round."""
        return {
            "unet": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where ``state_dict`` was called."""
        self.network.load_state_dict(state["unet"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
