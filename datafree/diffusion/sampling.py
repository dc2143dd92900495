"""Sampling steps from noise to a clean latent, in one parametrization for every prior, and the training of small priors.

A latent at step k is x_k = alpha_k x_0 + sigma_k noise with alpha^2 + sigma^2 = 1, for every model. The noise levels are
read from the model's scheduler. Its output is converted into a clean latent. Three rules lead from x_k to x_{k+1}. They are
written out here because guidance moves x_k, latent CutMix mixes it, and the repair of CutMix goes back one step. The
stateful schedulers of libraries do not allow that.

    ddim         Song et al. 2020 (arXiv 2010.02502), deterministic; Euler steps of the probability flow are the same
    dpmsolver++  the second-order multistep solver of Lu et al. 2022 (arXiv 2211.01095)
    ancestral    DDPM's posterior (Ho et al. 2020, arXiv 2006.11239): DDIM with eta 1 and Euler-ancestral are the same
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.patch_unet import PatchUNet, add_noise, velocity

# Training of this project's own priors: AdamW on the error of v, and a moving average of the weights for any training
# length.
#
# The average has the power-function profile of Karras et al. 2023 (arXiv 2312.02696). After s steps its decay is
# (1 - 1 / s)^(g + 1). It therefore always covers the same share of the training so far, about ``EMA_WIDTH``. Neither a
# half-life nor the length of the training must be chosen in advance. At a constant learning rate the average takes the place
# of a learning rate decay. A training can therefore be stopped and resumed at any step.


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


RULES = ("ddim", "dpmsolver++", "ancestral")


@dataclass(frozen=True)
class Trajectory:
    """Noise levels of a sampling in K steps, from the noisiest latent at k = 0 to the clean latent at k = K.

    Args:
        times: K values of the model's time input.
        alphas, sigmas: K + 1 numbers each; the last ones are 1 and 0.
        prediction: quantity that the model predicts: "epsilon", "v_prediction" or "sample".
        clip: bound of the clean latents of pixel models, which ``clamp`` limits to [-clip, clip]; None: no bound.
    """

    times: Tensor
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    prediction: str
    clip: float | None = None

    def __len__(self) -> int:
        return len(self.times)

    def clean(self, latents: Tensor, k: int, output: Tensor) -> Tensor:
        """The clean latents (B, C, h, w) predicted from latents at step k and the model's output for them; not clamped."""
        alpha, sigma = self.alphas[k], self.sigmas[k]
        if self.prediction == "epsilon":
            return (latents - sigma * output) / alpha
        return alpha * latents - sigma * output if self.prediction == "v_prediction" else output

    def step(
        self, rule: str, latents: Tensor, k: int, clean: Tensor, previous: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Takes the sampling step from x_k to x_{k+1}.

        Args:
            rule: one of ``RULES``.
            latents: x_k, (B, C, h, w).
            clean: clean latents predicted at step k, (B, C, h, w), after ``clamp``.
            previous: clean latents predicted at step k - 1, for "dpmsolver++"; None if there are none.
            noise: standard normal noise (B, C, h, w), needed by "ancestral".
        """
        (alpha, alpha_next), (sigma, sigma_next) = self.alphas[k : k + 2], self.sigmas[k : k + 2]
        if rule == "dpmsolver++":
            if previous is not None:
                clean = clean + 0.5 * self._ratio(k) * (clean - previous)
            return sigma_next / sigma * latents + (alpha_next - alpha * sigma_next / sigma) * clean
        direction = (latents - alpha * clean) / sigma
        fresh = 0.0
        if rule == "ancestral" and sigma_next:
            fresh = sigma_next / sigma * math.sqrt(max(0.0, 1 - (alpha / alpha_next) ** 2))
        latents = alpha_next * clean + math.sqrt(max(0.0, sigma_next**2 - fresh**2)) * direction
        return latents + fresh * noise if fresh else latents

    def clamp(self, clean: Tensor) -> Tensor:
        """Clean latents clamped to [-clip, clip]."""
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def renoise(self, latents: Tensor, k: int, noise: Tensor) -> Tensor:
        """The latents x_{k-1}, made from x_k by adding fresh noise (B, C, h, w), as in RePaint (arXiv 2201.09865)."""
        ratio = self.alphas[k - 1] / self.alphas[k]
        return ratio * latents + math.sqrt(max(0.0, self.sigmas[k - 1] ** 2 - (ratio * self.sigmas[k]) ** 2)) * noise

    def _ratio(self, k: int) -> float:
        """The ratio h_k / h_{k-1} of this step's length to the previous one's, in half the log signal-to-noise ratio.

        It is 0 next to pure noise and in the last step, where DPM-Solver++ thus takes a first-order step.
        """
        if k < 1 or not self.sigmas[k + 1] or not self.alphas[k - 1]:
            return 0.0
        before, here, after = (math.log(self.alphas[j] / self.sigmas[j]) for j in (k - 1, k, k + 1))
        return (after - here) / (here - before)


def cosine_trajectory(steps: int, device: torch.device | str, start: float = 1.0) -> Trajectory:
    """Trajectory of a ``PatchUNet`` prior: time from ``start`` to 0, angle t * pi / 2, v-prediction, images in [-1, 1]."""
    angles = [math.pi / 2 * start * (1 - k / steps) for k in range(steps)]
    times = torch.linspace(start, 0, steps + 1, device=device)[:-1]
    alphas = (math.cos(angles[0]) if start < 1 else 0.0, *(math.cos(angle) for angle in angles[1:]), 1.0)
    return Trajectory(times, alphas, (*(math.sin(angle) for angle in angles), 0.0), "v_prediction", clip=1.0)


def scheduler_trajectory(scheduler, steps: int, device: torch.device | str) -> Trajectory:
    """Trajectory with the betas, the timestep spacing and the prediction type of a diffusers scheduler.

    Raises:
        ValueError: the scheduler has no beta schedule or another prediction type (for example a flow-matching model), or it
            does not allow ``steps`` steps.
    """
    from diffusers import DDIMScheduler

    config = scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if "beta_schedule" not in config or prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"a {type(scheduler).__name__} with prediction '{prediction}' is not supported")
    spaced = DDIMScheduler.from_config(config)
    spaced.set_timesteps(steps)
    kept = spaced.alphas_cumprod.double()[spaced.timesteps].tolist()
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
    alphas, sigmas = (*(a**0.5 for a in kept), 1.0), (*((1 - a) ** 0.5 for a in kept), 0.0)
    return Trajectory(spaced.timesteps.to(device), alphas, sigmas, prediction, clip)


def own_rule(scheduler) -> str:
    """The entry of ``RULES`` that is closest to a diffusers scheduler.

    Stable Diffusion 1 is saved with PNDM. Like DPM-Solver++, PNDM is a multistep solver.
    """
    name = type(scheduler).__name__
    if "Ancestral" in name or name.startswith(("DDPM", "LCM")):
        return "ancestral"
    return "dpmsolver++" if name.startswith(("DPMSolver", "PNDM", "UniPC", "DEIS", "LMS", "Heun")) else "ddim"
