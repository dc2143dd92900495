"""PixelPrior: a diffusion model in pixel space, trained on the image bank itself, so that nothing is downloaded.

A small class-conditional U-Net learns to predict v (Salimans & Ho 2022, arXiv 2202.00512) under the cosine schedule
(Nichol & Dhariwal 2021, arXiv 2102.09672). A variant is a bank image, noised to time ``strength`` and denoised again with
its label (SDEdit, Meng et al. 2021, arXiv 2108.01073) by deterministic DDIM (Song et al. 2020, arXiv 2010.02502), with
classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) where ``guidance_scale`` is not 1.

Time t runs from 0 (clean) to 1 (pure noise); images are in [-1, 1] here. With the angle phi = t * pi / 2,

    x_t = cos(phi) x + sin(phi) noise        v = cos(phi) noise - sin(phi) x        x = cos(phi) x_t - sin(phi) v

Deviations from DDA (Li et al. 2024), which varies images with a pretrained Stable Diffusion: this prior knows only what
the teacher's bank holds, so it mixes and redraws what was inverted and adds nothing from outside.

Sizes were chosen by measuring, at an equal time on one CPU core, with 1500 scikit-learn digits of 16 px: a U-Net on 2 x 2
pixel patches is as good as one on pixels and draws variants three times as fast; batches of 16 or 32 beat 64 by far, since
it is steps that are short; one 128-channel level on 4 x 4 patches was the worst. With them: 27 training steps/s and 275
variants/s (strength .5, 12 steps), 32 px (default network) 3.2 and 29. Two threads that share their cores with anything else
fall to a tenth of that or less, unless OMP_WAIT_POLICY=PASSIVE is set.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.prior import Augmenter, denoising_steps, seeded_noise
from engine.errors import UserError

LABEL_DROP = 0.1  # share of training images that carry the null label, for guidance
EMA_DECAY = 0.995
WARMUP_STEPS = 100
GROUPS = 8


def default_network(image_size: int) -> dict[str, Any]:
    """``patch``, ``channels`` and ``attention`` for square images of ``image_size`` px: below 32 px for two CPU cores."""
    if image_size < 32:
        return {"patch": 2 if image_size >= 16 and image_size % 4 == 0 else 1, "channels": (32, 64), "attention": False}
    return {"patch": 2 * max(1, image_size // 64), "channels": (64, 128, 128), "attention": True}


class PixelPrior(Augmenter):
    """The embedded augmenter: learns the bank, then redraws its images.

    Args:
        num_classes: C.
        image_size: H = W in px.
        patch, channels, attention: of the network (``PatchUNet``); None: chosen by ``image_size``.
        fit_rounds: rounds of training, each a call of ``fit``.
        fit_steps: steps a round.
        fit_batch_size: images a step.
        fit_lr: highest AdamW learning rate, warmed up over 100 steps and falling to 0 over all rounds as a cosine.
        strength: in (0, 1], the time to which a source is noised.
        num_inference_steps: steps from pure noise; ``int(strength * num_inference_steps)`` of them are taken.
        guidance_scale: 1 is none and costs half.
        flip: whether the mirror image of a training image is as good as itself.
        seed: of the initial weights, which must not depend on what ran before.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        *,
        patch: int | None = None,
        channels: tuple[int, ...] | None = None,
        attention: bool | None = None,
        fit_rounds: int = 10,
        fit_steps: int = 100,
        fit_batch_size: int = 16,
        fit_lr: float = 2e-3,
        strength: float = 0.5,
        num_inference_steps: int = 12,
        guidance_scale: float = 1.0,
        flip: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.steps = denoising_steps(strength, num_inference_steps)
        self.strength, self.guidance_scale, self.flip = strength, guidance_scale, flip
        self.fit_rounds, self.fit_steps = fit_rounds, fit_steps
        self.fit_batch_size, self.fit_lr = fit_batch_size, fit_lr
        self.null_label, self.device = num_classes, torch.device(device)
        given = {"patch": patch, "channels": channels, "attention": attention}
        network = default_network(image_size) | {name: value for name, value in given.items() if value is not None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = PatchUNet(num_classes, image_size, **network)
        self.unet = unet.to(self.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=fit_lr, betas=(0.9, 0.99), fused=True)
        self.step = 0  # taken so far, over all rounds

    def fit(self, images_u8: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        """``fit_steps`` steps on random images of the bank; see ``Augmenter.fit``.

        Raises:
            UserError: the loss became NaN or infinite.
        """
        losses = torch.empty(self.fit_steps, device=self.device)
        weights, averages = list(self.unet.parameters()), list(self.ema.parameters())
        for k in range(self.fit_steps):
            learning_rate = self._learning_rate()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            index = torch.randint(len(images_u8), (self.fit_batch_size,), device=images_u8.device)
            loss = self._loss(images_u8[index].to(self.device), labels[index].to(self.device))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            self.optimizer.step()
            decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
            losses[k] = loss.detach()
            self.step += 1
        diverged = (~losses.isfinite()).nonzero()
        if len(diverged):
            step = self.step - self.fit_steps + int(diverged[0])
            raise UserError(f"diffusion training diverged (loss NaN at step {step}); lower --fit_lr {self.fit_lr:g}")
        return {"loss": losses.mean(), "lr": learning_rate}

    def _learning_rate(self) -> float:
        total = self.fit_rounds * self.fit_steps
        warmup = (self.step + 1) / max(1, min(WARMUP_STEPS, total // 10))
        return self.fit_lr * min(warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, self.step / total)))

    def _loss(self, images_u8: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of v at random times, scalar."""
        count = len(images_u8)
        clean = images_u8.float().div_(127.5).sub_(1)
        if self.flip:
            mirrored = torch.rand(count, 1, 1, 1, device=self.device) < 0.5
            clean = torch.where(mirrored, clean.flip(3), clean)
        labels = torch.where(torch.rand(count, device=self.device) < LABEL_DROP, self.null_label, labels)
        t = torch.rand(count, device=self.device)
        noise = torch.randn_like(clean)
        return F.mse_loss(self.unet(add_noise(clean, noise, t), t, labels), velocity(clean, noise, t))

    def predict(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """v by the averaged weights, guided by the label: (B, 3, H, W), t (B,), labels (B,) -> (B, 3, H, W)."""
        v = self.ema(x_t, t, labels)
        if self.guidance_scale == 1:
            return v
        unconditional = self.ema(x_t, t, torch.full_like(labels, self.null_label))
        return unconditional + self.guidance_scale * (v - unconditional)

    @torch.no_grad()
    def augment(self, images: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        """See ``Augmenter.augment``. One network call a step, two with guidance."""
        clean = images.to(self.device) * 2 - 1
        labels = labels.to(self.device)
        noise = seeded_noise(seeds, tuple(clean.shape[1:])).to(self.device)
        times = torch.linspace(self.strength, 0, self.steps + 1, device=self.device)
        x_t = add_noise(clean, noise, times[:1])
        for t, t_next in zip(times[:-1], times[1:]):
            v = self.predict(x_t, t.expand(len(x_t)), labels)
            x_t = ddim_step(x_t, clean_estimate(x_t, v, t).clamp(-1, 1), t, t_next)
        return x_t.clamp(-1, 1) / 2 + 0.5

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from, by reference: save or copy it before the next round."""
        return {
            "unet": self.unet.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where ``state_dict`` was called."""
        self.unet.load_state_dict(state["unet"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
