"""Guides a diffusion prior by a teacher at every timestep, as in DiffDFKD (Qi et al., IEEE ICME 2025, arXiv 2504.00870).

The latents z_k are moved along a gradient. The prior's output o(z_k) includes classifier-free guidance. T is the teacher, S
the student, B the batch size:

    x = resize(clamp(decode(clean(z_k, o))))               the clean images predicted at step k, in [0, 1]
    L = bn * L_bn(x) + oh * CE(T(x), y) + adv * L_adv(x)   L_adv = -KL(T(x) || S(x)) where S and T agree, T(x) held constant
    z_k <- z_k - lr * B * dL/dz_k                          then the sampler's step with the same o

The loss L is a mean over the batch. The factor B gives each image the same step as in a batch of one. CE and L_adv of an
image therefore do not depend on the rest of the batch. L_bn compares statistics *of the batch*. With ``bn`` an image thus
depends on the other images of its batch.

``max_step`` limits the length of a step. In pixel space the gradient through the network is sometimes ten times as long as
usual. Such a step leads to latents on which the prior was never trained, and the image ends as coloured grain.

The predicted images are clamped to [0, 1] like the final images, so that the teacher sees what the student will see. A
clamped pixel has a zero gradient. L_adv treats the teacher's logits as a constant. Its gradient therefore leads to images
that the student gets wrong, and not to images for which the teacher's prediction changes.

The gradient goes through the decoder and the denoising network (``backprop`` "unet", as in the paper). With "decoder", o is
a constant, and there is no backward pass through the denoising network. The gradient is computed in two parts. The first is
the gradient of the loss with respect to x, for the whole batch at once, in float32. The second multiplies it by the Jacobian
of x with respect to z_k, in micro-batches, which do not change L_bn. The gradient of each image is scaled to a largest
absolute value of 1 before the second part and scaled back after it. It therefore neither overflows nor underflows in half
precision.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.prior_base import DiffusionPrior
from datafree.diffusion.sampling import Trajectory
from datafree.diffusion.variation import resize
from datafree.losses import BNStatistics, adversarial_loss, bn_loss, collected
from engine.runtime.errors import UserError, is_out_of_memory

BACKPROP = ("unet", "decoder")


@dataclass
class Guidance:
    """Guidance loss L of images and its gradient with respect to latents; see the module for the formulas.

    Args:
        teacher: frozen network that maps images (B, 3, S, S) in [0, 1] to logits.
        image_size: S in px.
        bn, oh, adv: weights of the three terms.
        lr: step size along the gradient.
        backprop: "unet" or "decoder".
        micro_batch: number of latents in one forward pass of prior and decoder; 0: the whole batch.
        max_step: largest length of an image's step, |lr * B * dL/dz|_2; longer steps are shortened to it; 0: no limit.
        student: student S of L_adv, in eval mode; None: the term is 0.
    """

    teacher: nn.Module
    image_size: int
    bn: float = 0.0
    oh: float = 1.0
    adv: float = 0.0
    lr: float = 1.0
    backprop: str = "unet"
    micro_batch: int = 0
    max_step: float = 0.0
    student: nn.Module | None = None
    statistics: BNStatistics | None = field(init=False, default=None)

    def __post_init__(self):
        assert self.backprop in BACKPROP, self.backprop
        self.statistics = BNStatistics(self.teacher) if self.bn else None

    @property
    def active(self) -> bool:
        """Whether the guidance moves latents: ``lr`` and the weight of a term are not 0, and ``adv`` has its student."""
        return bool(self.lr and (self.bn or self.oh or (self.adv and self.student is not None)))

    def steer(
        self, prior: DiffusionPrior, trajectory: Trajectory, latents: Tensor, k: int, condition: Any, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Takes a guidance step from latents (B, C, h, w) at step k.

        Args:
            targets: class probabilities (B, C).
        Returns:
            The moved latents and the prior's output for the original latents, both (B, C, h, w).
        """
        if self.active:
            output, gradient = self.gradient(prior, trajectory, latents, k, condition, targets)
            step = self.lr * gradient
            if self.max_step:
                size = torch.linalg.vector_norm(step, dim=(1, 2, 3), keepdim=True)
                step = step * (self.max_step / size.clamp_min(torch.finfo(step.dtype).tiny)).clamp(max=1)
            return latents - step, output
        return latents, self.predict(prior, trajectory, latents, k, condition)

    def predict(self, prior: DiffusionPrior, trajectory: Trajectory, latents: Tensor, k: int, condition: Any) -> Tensor:
        """The prior's output for latents (B, C, h, w) at step k, computed in micro-batches."""
        parts = batches(len(latents), self.micro_batch)
        return torch.cat([prior.predict(latents[part], trajectory.times[k], condition[part]) for part in parts])

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Guidance loss B * L of images (B, 3, S, S) for class probabilities ``targets`` (B, C), scalar."""
        with collected(self.statistics) as batch_stats:
            logits = self.teacher(images)
        loss = self.oh * F.cross_entropy(logits, targets.to(logits))
        if self.statistics:
            loss = loss + self.bn * bn_loss(batch_stats, self.statistics.running)
        if self.adv and self.student is not None:
            loss = loss + self.adv * adversarial_loss(self.student(images), logits.detach(), agreeing_only=True)
        return len(images) * loss

    def view(self, prior: DiffusionPrior, trajectory: Trajectory, latents: Tensor, k: int, output: Tensor) -> Tensor:
        """Clean images (B, 3, S, S) in [0, 1], predicted from latents at step k and the prior's output for them."""
        images = prior.decode(trajectory.clean(latents, k, output)).clamp(0, 1)
        return resize(images, (self.image_size, self.image_size))

    def gradient(
        self, prior: DiffusionPrior, trajectory: Trajectory, latents: Tensor, k: int, condition: Any, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The prior's output for latents (B, C, h, w) at step k and the gradient B * dL/dz, both (B, C, h, w)."""
        parts = batches(len(latents), self.micro_batch)

        def draw(part: slice, graph: bool) -> tuple[Tensor, Tensor, Tensor]:
            z = latents[part].detach().requires_grad_()
            with torch.set_grad_enabled(graph and self.backprop == "unet"):
                output = prior.predict(z, trajectory.times[k], condition[part])
            with torch.set_grad_enabled(graph):
                return z, output, self.view(prior, trajectory, z, k, output)

        drawn = [draw(part, graph=len(parts) == 1) for part in parts]
        output = torch.cat([output.detach() for _, output, _ in drawn])
        images = torch.cat([x.detach() for _, _, x in drawn]).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.loss(images, targets), images)
        size = slope.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        gradients = []
        for number, part in enumerate(parts):
            z, _, x = drawn[number] if len(parts) == 1 else draw(part, graph=True)
            gradients.append(torch.autograd.grad(x, z, slope[part] / size[part])[0] * size[part])
        return output, torch.cat(gradients)


def batches(count: int, size: int) -> list[slice]:
    """Consecutive slices of at most ``size`` that cover ``count`` items; a single slice if ``size`` is 0."""
    size = size or count
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def check_latents(finite: list[bool]) -> None:
    """Checks that all latents were finite after each denoising step.

    Args:
        finite: one value per denoising step.
    Raises:
        UserError: a value is False; the message names the first such step.
    """
    if not all(finite):
        raise UserError(
            f"latents became NaN or infinite at denoising step {finite.index(False) + 1} of {len(finite)}; finished images "
            "are kept: give --diffusion_dtype fp32 or a lower --guidance_lr, --bn, --oh or --adv"
        )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns an out-of-memory error into a UserError of one line that names the flags that save memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory while drawing images; finished images are kept: give --guidance_micro_batch 1, "
            "--gradient_checkpointing, --guidance_backprop decoder, --diffusion_dtype bf16, a lower --resolution or a "
            "smaller --diffusion_batch_size"
        ) from error


def lca_steps(steps: int, every: int | None) -> list[int]:
    """Indices of the denoising steps before which latent CutMix is applied.

    There is none before the first step, whose latents are pure noise, and none after the last, since no step would follow to
    blend the pasted boxes.

    Args:
        every: number of denoising steps between two mixings; None: a fifth of ``steps``, rounded up; 0: no mixing.
    """
    every = max(1, math.ceil(steps / 5)) if every is None else every
    return list(range(every, steps, every)) if every else []
