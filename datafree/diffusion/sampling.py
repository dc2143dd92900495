"""Sampling steps from noise to a clean latent, in one parametrization for every prior.

A latent at step k is x_k = alpha_k x_0 + sigma_k noise with alpha^2 + sigma^2 = 1, for every model. The noise levels are
read from the model's scheduler. Its output is converted into a clean latent. Three rules lead from x_k to x_{k+1}. They are
written out here because guidance moves x_k, latent CutMix mixes it, and the repair of CutMix goes back one step. The
stateful schedulers of libraries do not allow that.

    ddim         Song et al. 2020 (arXiv 2010.02502), deterministic; Euler steps of the probability flow are the same
    dpmsolver++  the second-order multistep solver of Lu et al. 2022 (arXiv 2211.01095)
    ancestral    DDPM's posterior (Ho et al. 2020, arXiv 2006.11239): DDIM with eta 1 and Euler-ancestral are the same
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
