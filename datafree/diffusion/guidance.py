"""Teacher guidance: what DiffDFKD does to a latent at every timestep (Qi et al., IEEE ICME 2025, arXiv 2504.00870).

From latents z_k, with the prior's output o(z_k) under classifier-free guidance:

    x = resize(clamp(decode(clean(z_k, o))))               the images that the step would end in, in [0, 1]
    L = bn * L_bn(x) + oh * CE(T(x), y) + adv * L_adv(x)   L_adv = -KL(S || T) where S and T agree, T held fixed
    z_k <- z_k - lr * B * dL/dz_k                          and then the sampler's step with the same o

B times the loss, a batch mean, makes an image's step as large as if it were alone: CE and L_adv then do not depend on the
batch at all. L_bn compares statistics *of the batch*, so with ``bn`` an image depends on those that it is drawn with.

A step may be shortened to ``max_step``. In pixel space the way back through the network now and then has a gradient ten
times as long as usual, which leads to where the prior was never trained, and the image ends as coloured grain.

Clamped to [0, 1] as the images that are kept, so that the teacher judges what the student will see. The gradient of a pixel
outside is zero: to move it a little changes nothing. In L_adv the teacher's answer is a constant, so that guidance looks for
images that the student gets wrong and not for others of which the teacher thinks otherwise.

The gradient goes through decoder and denoising network (``backprop`` "unet", the paper's), or takes o for a constant
("decoder"), which spares the way back through the network. It is taken in two halves that meet at the images: the loss's
gradient at x for the whole batch at once, in float32, and from there to z_k by a product with the Jacobian, which splits
into micro-batches without changing L_bn and, scaled to 1 image by image, neither over- nor underflows in half precision.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.priors import DiffusionPrior
from datafree.diffusion.sampling import Trajectory
from datafree.diffusion.variation import resize
from datafree.losses import BNStatistics, adversarial_loss, bn_loss, collected, layers_with_statistics
from engine.runtime.errors import UserError

# What the teacher says of finished images.


AT_ONCE = 512  # images


class Judgement:
    """The teacher's labels of images, and figures of how near they come to what it was trained on.

    Args:
        teacher: frozen, images (B, 3, H, W) in [0, 1] to logits.
        device: the teacher's.
        statistics: those of the teacher, where there are any already.
    """

    def __init__(self, teacher: nn.Module, device: torch.device, statistics: BNStatistics | None = None):
        self.teacher, self.device = teacher, device
        self.statistics = statistics or (BNStatistics(teacher) if layers_with_statistics(teacher) else None)

    @torch.no_grad()
    def labels(self, images_u8: Tensor) -> Tensor:
        """(N,) int64 on the CPU, of (N, 3, H, W) uint8."""
        parts = [self.teacher(self._batch(images_u8, start)).argmax(1) for start in range(0, len(images_u8), AT_ONCE)]
        return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def figures(self, images_u8: Tensor, labels: Tensor) -> dict[str, float]:
        """teacher_acc1 in % against labels (N,), the cross-entropy loss_oh, and the mean L_bn over batches of up to 512.

        L_bn falls with the size of a batch: compare it between equally many images.
        """
        count, sums = len(labels), {}
        for start in range(0, count, AT_ONCE):
            images, wanted = self._batch(images_u8, start), labels[start : start + AT_ONCE].to(self.device)
            with collected(self.statistics) as batch_stats:
                logits = self.teacher(images)
            found = {
                "teacher_acc1": 100.0 * (logits.argmax(1) == wanted).sum(),
                "loss_oh": F.cross_entropy(logits, wanted, reduction="sum"),
            }
            if self.statistics:
                found["loss_bn"] = bn_loss(batch_stats, self.statistics.running) * len(images)
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
        return {name: total / count for name, total in sums.items()}

    def _batch(self, images_u8: Tensor, start: int) -> Tensor:
        return images_u8[start : start + AT_ONCE].to(self.device).float().div_(255)


BACKPROP = ("unet", "decoder")


@dataclass
class Guidance:
    """The teacher's part: L of images, and its gradient at latents.

    Args:
        teacher: frozen, images (B, 3, S, S) in [0, 1] to logits.
        image_size: S in px.
        bn, oh, adv: weights of the three terms.
        lr: of the step along the gradient.
        backprop: "unet" or "decoder".
        micro_batch: latents that go through prior and decoder at a time; 0: all.
        max_step: greatest length of an image's step, |lr * B * dL/dz|_2; longer ones are shortened to it; 0: any.
        student: the competitor of ``adv``, in eval mode; None: the term is 0.
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
        """Whether any term would move a latent."""
        return bool(self.lr and (self.bn or self.oh or (self.adv and self.student is not None)))

    def steer(
        self, prior: DiffusionPrior, trajectory: Trajectory, latents: Tensor, k: int, condition: Any, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) at step k, moved, and the prior's output where they were, of one shape; targets (B, C)."""
        if self.active:
            output, gradient = self.gradient(prior, trajectory, latents, k, condition, targets)
            step = self.lr * gradient
            if self.max_step:
                size = torch.linalg.vector_norm(step, dim=(1, 2, 3), keepdim=True)
                step = step * (self.max_step / size.clamp_min(torch.finfo(step.dtype).tiny)).clamp(max=1)
            return latents - step, output
        return latents, self.predict(prior, trajectory, latents, k, condition)

    def predict(self, prior: DiffusionPrior, trajectory: Trajectory, latents: Tensor, k: int, condition: Any) -> Tensor:
        """The prior's output for latents (B, C, h, w) at step k, a micro-batch at a time."""
        parts = batches(len(latents), self.micro_batch)
        return torch.cat([prior.predict(latents[part], trajectory.times[k], condition[part]) for part in parts])

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """B * L of images (B, 3, S, S) for class probabilities (B, C), scalar."""
        with self.statistics.collect() if self.statistics else nullcontext() as batch_stats:
            logits = self.teacher(images)
        loss = self.oh * F.cross_entropy(logits, targets.to(logits))
        if self.statistics:
            loss = loss + self.bn * bn_loss(batch_stats, self.statistics.running)
        if self.adv and self.student is not None:
            loss = loss + self.adv * adversarial_loss(self.student(images), logits.detach(), agreeing_only=True)
        return len(images) * loss

    def view(self, prior: DiffusionPrior, trajectory: Trajectory, latents: Tensor, k: int, output: Tensor) -> Tensor:
        """The images (B, 3, S, S) in [0, 1] that latents at step k and the prior's output for them stand for."""
        images = prior.decode(trajectory.clean(latents, k, output)).clamp(0, 1)
        size = (self.image_size, self.image_size)
        return images if images.shape[2:] == size else resize(images, size)

    def gradient(
        self, prior: DiffusionPrior, trajectory: Trajectory, latents: Tensor, k: int, condition: Any, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The prior's output for latents (B, C, h, w) at step k, and B * dL/dz there, of one shape."""
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
    """Slices of at most ``size`` that cover ``count``; one if ``size`` is 0."""
    size = size or count
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def check_finite(finite: list[bool]) -> None:
    """Given whether all latents were finite after each denoising step.

    Raises:
        UserError: names the first step after which some were not.
    """
    if not all(finite):
        raise UserError(
            f"latents became NaN or infinite at denoising step {finite.index(False) + 1} of {len(finite)}; images made before "
            "are kept: give --diffusion_dtype fp32 or a lower --guidance_lr, --bn, --oh or --adv"
        )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns running out of memory into one line that names the flags that help."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("allocate memory|ALLOC_FAILED", str(error)):
            raise
        raise UserError(
            "out of memory while drawing images; what was made before is kept: give --guidance_micro_batch 1, "
            "--gradient_checkpointing, --guidance_backprop decoder, --diffusion_dtype bf16, a lower --resolution or a "
            "smaller --diffusion_batch_size"
        ) from error


def lca_steps(steps: int, every: int | None) -> list[int]:
    """The steps before which latent CutMix comes: every ``every``-th, unset every fifth part of ``steps``, 0 none.

    Not the first, which is pure noise, and none after the last, which nothing would blend.
    """
    every = max(1, math.ceil(steps / 5)) if every is None else every
    return list(range(every, steps, every)) if every else []
