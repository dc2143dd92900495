"""DeepInversion: images from the teacher's weights alone (Yin et al., CVPR 2020, arXiv 1912.08795).

The pixels of a batch are optimised directly, without a generator. The teacher should classify each image as its wanted
class, and the batch should have the BN statistics of the teacher's training data. The student plays no part in synthesis
(``datafree.adi`` adds it). The student is trained on all images made so far.

    synthesis   oh * CE(T(x), y) + bn * L_bn + tv * TV(x) + l2 * mean_b ||x_b||_2
    TV          mean |x_p - x_q| for the right, lower and both diagonal neighbours, the four means summed
    student     KL_T

Before each forward pass of the teacher, the whole batch is rolled by up to an eighth of its height and width. If the task
allows flips, it is also mirrored with probability 1/2. One roll and one flip are drawn for the whole batch, anew at every
step. Pixels are optimised in the teacher's normalized space, starting from N(0, 1). An Adam step is about as long as its
learning rate, and the published .1 refers to this space. In [0, 1] the same rate would make steps four to five times as
long. After every step the pixels are clipped to the range that corresponds to [0, 1].

Published settings (CIFAR): 200 rounds of 256 images, 1000 steps per round (2000 in the tables), Adam lr .1 with betas (.5,
.99); bn 10, oh 1, tv .001, l2 0; 400 student steps per round, SGD lr .1, T 20.

Deviations:
- Labels are drawn class-balanced, not independently.
- The images kept are a copy of the batch at its lowest loss. The published script keeps an alias of the batch, which later
  steps change.
- TV is the published script's mean of absolute differences. The paper's code for CIFAR takes norms of the whole batch.
- As in the published script, TV is computed before the roll, because the roll makes opposite edges neighbours.
- L2 is the mean norm of an image, as in the paper. The script takes the norm of the whole batch, which grows with its size.
- The initial pixels are clipped, as the pixels after every step are.

Left out: the multi-resolution start and the separate weight of the first BN layer, which the paper's code uses for ImageNet.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.base import ImageBatch, LowestLoss, Method, Synthesizer, Task, balanced_labels
from datafree.losses import BNStatistics, KLDistillation, Terms, bn_loss, collected, one_hot_loss, weighted_sum
from engine.runtime.compilation import CompileTarget
from engine.runtime.flags import flag

DISTILL = ("distill",)


@dataclass(frozen=True)
class DeepInversionConfig:
    """Flags of DeepInversion."""

    g_steps: int = flag(1000, "inversion steps per round", affects=DISTILL, scales=True, least=1)
    synthesis_batch_size: int = flag(256, "images synthesized per round", affects=DISTILL, least=1, most=1_000_000)
    lr_g: float = flag(0.1, "Adam learning rate of the pixels, in the teacher's normalized space", affects=DISTILL, above=0)
    bn: float = flag(10.0, "weight of the BN-statistics loss in synthesis", affects=DISTILL, least=0)
    oh: float = flag(1.0, "weight of the one-hot loss CE(T(x), y) in synthesis", affects=DISTILL, least=0)
    tv: float = flag(
        1e-3,
        "weight of the total variation in synthesis: mean |x_p - x_q|, summed over four neighbour directions",
        affects=DISTILL,
        least=0,
    )
    l2: float = flag(0.0, "weight of the mean L2 norm of an image in synthesis", affects=DISTILL, least=0)
    T: float = flag(20.0, "temperature of the distillation loss", affects=DISTILL, above=0)


def total_variation(images: Tensor) -> Tensor:
    """Total variation of images (B, C, H, W), scalar.

    It is the mean absolute difference to the right, lower and both diagonal neighbours, the four means summed.
    """
    right = images[..., 1:] - images[..., :-1]
    below = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    return sum(difference.abs().mean() for difference in (right, below, falling, rising))


def l2_norm(images: Tensor) -> Tensor:
    """Mean L2 norm of an image: (B, C, H, W) -> scalar."""
    return torch.linalg.vector_norm(images.flatten(1), dim=1).mean()


def jitter(images: Tensor, flip: bool) -> Tensor:
    """Rolls a batch (B, C, H, W) by up to an eighth of its height and width; if ``flip``, mirrors half of the batches."""
    height, width = images.shape[2:]
    # Drawn on the CPU, because numbers drawn on a GPU would have to be waited for.
    down, right, mirrored = torch.rand(3).tolist()
    shifts = int(down * (2 * (height // 8) + 1)) - height // 8, int(right * (2 * (width // 8) + 1)) - width // 8
    rolled = torch.roll(images, shifts, (2, 3))
    rolled = rolled.flip(3) if flip and mirrored < 0.5 else rolled
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return rolled.contiguous(memory_format=layout)  # torch.roll does not keep the memory format


class DeepInversionSynthesizer(Synthesizer):
    """Optimises the pixels of one batch per round."""

    def __init__(self, config: DeepInversionConfig, teacher: nn.Module, task: Task):
        self.config, self.teacher, self.task = config, teacher, task
        self.statistics = BNStatistics(teacher) if config.bn else None
        self.measure = self.losses

    def compile_targets(self) -> list[CompileTarget]:
        return [CompileTarget(self, "measure", self.config.g_steps, "synthesis losses")]

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Inverts one batch; returns its images at the step of lowest total loss."""
        config, task, mean, std = self.config, self.task, self.teacher.mean, self.teacher.std
        black, white = (0 - mean) / std, (1 - mean) / std
        labels = balanced_labels(config.synthesis_batch_size, task.info.num_classes, task.device)
        pixels = torch.randn(len(labels), 3, task.info.image_size, task.info.image_size, device=task.device).clamp_(
            black, white
        )
        pixels = pixels.contiguous(memory_format=torch.channels_last).requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=config.lr_g, betas=(0.5, 0.99), fused=True)
        best, precision = LowestLoss(), task.precision.fresh()
        for _ in range(config.g_steps):
            losses = self.measure(pixels, jitter(pixels, task.info.flip), labels, student)
            best.update(pixels, losses)
            precision.minimize(losses["loss"], optimizer)
            with torch.no_grad():
                pixels.clamp_(black, white)
        return ImageBatch((best.images * std + mean).clamp(0, 1), labels, best.scalars())

    def losses(self, pixels: Tensor, jittered: Tensor, labels: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """Named synthesis losses; "loss" is their weighted sum.

        Args:
            pixels: normalized images (B, 3, H, W), for total variation and L2.
            jittered: the same images after ``jitter``, for the networks.
            labels: wanted classes (B,).
            student: the student, for ``student_terms``.
        """
        config = self.config
        images = jittered * self.teacher.std + self.teacher.mean
        with collected(self.statistics) as batch_stats, self.task.precision.autocast():
            logits = self.teacher(images)
        terms = {"loss_oh": (config.oh, one_hot_loss(logits, labels))}
        if self.statistics:
            terms["loss_bn"] = config.bn, bn_loss(batch_stats, self.statistics.running)
        if config.tv:
            terms["loss_tv"] = config.tv, total_variation(pixels)
        if config.l2:
            terms["loss_l2"] = config.l2, l2_norm(pixels)
        return weighted_sum(terms | self.student_terms(images, logits, student))

    def student_terms(self, images: Tensor, teacher_logits: Tensor, student: nn.Module) -> Terms:
        """Loss terms that depend on the student; none here."""
        return {}


class DeepInversion(Method):
    """Method with stage distill only. The image bank starts empty, and each round adds its batch."""

    Config = DeepInversionConfig
    defaults = {"epochs": 200, "kd_steps": 400, "batch_size": 256, "lr": 0.1}

    def synthesizer(self) -> DeepInversionSynthesizer:
        return DeepInversionSynthesizer(self.config, self.teacher, self.task)

    def objective(self) -> KLDistillation:
        return KLDistillation(self.config.T)
