"""DeepInversion: images from the teacher's weights alone (Yin et al., CVPR 2020, arXiv 1912.08795).

The pixels of a batch are optimised, without a generator, until the teacher names their classes and finds the BN
statistics of its training data in them. The student plays no part in it (that is ``datafree.adi``) and learns from all
images so far.

    synthesis   oh * CE(T(x), y) + bn * L_bn + tv * TV(x) + l2 * mean_b ||x_b||_2
    TV          sum over the right, lower and both diagonal neighbours of the mean |x_p - x_q|
    student     KL_T

Before the teacher, the whole batch is rolled by up to an eighth of its size and, where the task allows, mirrored; the
draw is new at every step, one for the batch. Pixels are variables in the teacher's normalized space, where they start as
N(0, 1): Adam's steps are as long as its learning rate, and .1 is the published length there (in [0, 1] it would be four
to five times as long). After every step they are clipped to what [0, 1] becomes in that space.

Published settings (CIFAR): 200 rounds of 256 images, 1000 steps each (2000 in the tables), Adam lr .1 with betas (.5,
.99); bn 10, oh 1, tv .001, l2 0; 400 student steps a round, SGD lr .1, T 20.

Deviations: labels are drawn class-balanced, not independently. The images kept are a copy of the batch at its lowest
loss; the published script keeps an alias that goes on changing. TV is that script's mean of absolute differences, where
the paper's code for CIFAR takes norms of the whole batch, and is taken as there before the roll, which would make
neighbours of opposite edges. L2 is the paper's, of an image; the script takes the norm of the whole batch, which grows
with its size. The start is clipped like every step after it. Left out: the multi-resolution start and the separate weight
of the first BN layer, which the paper's code uses for ImageNet.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.base import ImageBatch, LowestLoss, Method, Synthesizer, Task, balanced_labels
from datafree.losses import BNStatistics, KLDistillation, Terms, bn_loss, collected, one_hot_loss, weighted_sum
from engine.runtime.compilation import Hot
from engine.runtime.flags import flag

DISTILL = ("distill",)


@dataclass(frozen=True)
class DeepInversionConfig:
    """Flags of DeepInversion."""

    g_steps: int = flag(1000, "inversion steps a round", affects=DISTILL, scales=True, least=1)
    synthesis_batch_size: int = flag(256, "images a round", affects=DISTILL, least=1, most=1_000_000)
    lr_g: float = flag(
        0.1, "Adam learning rate of the pixels, in units of the dataset's standard deviation", affects=DISTILL, above=0
    )
    bn: float = flag(10.0, "weight of the BN-statistics loss", affects=DISTILL, least=0)
    oh: float = flag(1.0, "weight of the one-hot loss, CE(T(x), y)", affects=DISTILL, least=0)
    tv: float = flag(1e-3, "weight of the total variation, mean |x_p - x_q| over four neighbours", affects=DISTILL, least=0)
    l2: float = flag(0.0, "weight of the mean ||x||_2 of an image", affects=DISTILL, least=0)
    T: float = flag(20.0, "temperature of the distillation loss", affects=DISTILL, above=0)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in (B, C, H, W): right, below, and both diagonals, the four means summed."""
    right = images[..., 1:] - images[..., :-1]
    below = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    return sum(difference.abs().mean() for difference in (right, below, falling, rising))


def l2_norm(images: Tensor) -> Tensor:
    """Mean over images of ||x||_2, (B, C, H, W) -> ()."""
    return torch.linalg.vector_norm(images.flatten(1), dim=1).mean()


def jitter(images: Tensor, flip: bool) -> Tensor:
    """Rolls a batch (B, C, H, W) by up to an eighth of its height and width, and mirrors half of the batches if ``flip``."""
    height, width = images.shape[2:]
    # Drawn on the CPU: three numbers that no GPU has to be waited for.
    down, right, mirrored = torch.rand(3).tolist()
    shifts = int(down * (2 * (height // 8) + 1)) - height // 8, int(right * (2 * (width // 8) + 1)) - width // 8
    rolled = torch.roll(images, shifts, (2, 3))
    rolled = rolled.flip(3) if flip and mirrored < 0.5 else rolled
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return rolled.contiguous(memory_format=layout)  # roll alone would lose it


class DeepInversionSynthesizer(Synthesizer):
    """Inverts the teacher into the pixels of one batch a round."""

    def __init__(self, config: DeepInversionConfig, teacher: nn.Module, task: Task):
        self.config, self.teacher, self.task = config, teacher, task
        self.statistics = BNStatistics(teacher) if config.bn else None
        self.measure = self.losses

    def hot(self) -> list[Hot]:
        return [Hot(self, "measure", self.config.g_steps, "synthesis losses")]

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """One inverted batch, the best of ``g_steps`` steps by total loss."""
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
        """Named losses of normalized pixels (B, 3, H, W), and of the same jittered, that are to be of classes ``labels`` (B,)."""
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
        """Those that depend on the student; here none."""
        return {}


class DeepInversion(Method):
    """Stage distill only: the bank starts empty, and each round adds its batch."""

    Config = DeepInversionConfig
    defaults = {"epochs": 200, "kd_steps": 400, "batch_size": 256, "lr": 0.1}

    def synthesizer(self) -> DeepInversionSynthesizer:
        return DeepInversionSynthesizer(self.config, self.teacher, self.task)

    def objective(self) -> KLDistillation:
        return KLDistillation(self.config.T)
