"""CMI: contrastive model inversion (Fang et al., IJCAI 2021, arXiv 2105.08584).

Inverted images tend to resemble each other. CMI adds a contrastive loss that makes each image distinguishable from all
others. In a learned embedding, a local view of an image must be closer to the global view of the same image than to the
global views of other images. These are the other images of its batch and images of earlier rounds. The generator is
re-initialized every round.

    synthesis   bn * L_bn + oh * CE(T(x), y) + cr * L_cr - adv * KL(S || T), KL only where argmax S = argmax T
    L_cr        mean_i -log [ exp(l_i g_i / cr_T) / (sum_j exp(l_i g_j / cr_T) + sum_m exp(l_i n_m / cr_T)) ]
    l, g, n     head(r(local view)), head(r(global view)), head(r from memory), each normalized to length 1
    r(x)        the teacher's penultimate features and the inputs of all its BN layers averaged over positions, concatenated
    student     KL_T

The global view is the usual random crop and flip. BN-statistics, one-hot and adversarial loss are computed on the global
view only. The local view is a crop of 25 to 100 % of the area, with aspect ratio 3/4 to 4/3, resized bilinearly and, if the
task allows, flipped. Both views go through the teacher in one batch.

The memory holds r of the latest ``memory_size`` images, in half precision on the device. At every step ``negatives`` of them
are drawn as additional negatives. Memory, head and the head's optimizer are kept from round to round and from the initial
bank to stage distill, and are part of the checkpoint. The memory takes 2 bytes x memory_size x length of r, for example 230
MB for wrn40_2 and 740 MB for resnet34. It is written after each round of the initial bank.

Published settings. The defaults are those of CSD's script for CMI (CIFAR-10): an initial bank of 400 rounds of 200 images
without the student; then 100 rounds of 200 images and 2000 student steps on batches of 128; 500 steps per round, Adam lr
1e-3; bn 1, oh 1, adv .5, cr .8, cr_T .2, memory 40,960, 4,096 negatives, head of 256; SGD lr .1, T 20. The scripts of this
project have the settings of CMI's own script: starting from a bank of about 50,000 images, 40 rounds of 256 images, 200
steps each, with oh .5 and cr_T .1. How CMI's authors made that bank is not published. The scripts here make it in 200 rounds
of 256 images with the same weights, 500 steps each.

Deviations:
- Labels are drawn class-balanced, not independently.
- The published script takes r from the BN layers alone. For a resnet34 it takes the inputs of the four stages alone, 512
  entries instead of the 8,000 of all layers. Without BN layers, r here is the features alone.
- The script remembers both views of an image, as they were at the best step, and uses remembered pairs as anchors and
  positives too. It stops the gradient at the global views. Here L_cr is the formula above with its full gradient. Remembered
  images are negatives only, in one global view that is drawn at the end of the round.
- The head's hidden layer is as wide as its output. The script's is as wide as r, which for a resnet34 costs as much as the
  teacher.
- A local crop is clipped to the image if it would exceed it. The script draws such a crop again.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import ImageBatch, LowestLoss, Method, Synthesizer, Task, balanced_labels
from datafree.generators import Generator, reset
from datafree.losses import (
    BNStatistics,
    KLDistillation,
    Stats,
    adversarial_loss,
    bn_loss,
    collected,
    one_hot_loss,
    weighted_sum,
)
from engine.loops.session import Stage
from engine.runtime.compilation import CompileTarget
from engine.runtime.errors import UserError
from engine.runtime.flags import flag
from models.classifier import layers_with_statistics

BOTH = ("synthesize", "distill")


@dataclass(frozen=True)
class CMIConfig:
    """Flags of CMI."""

    init_rounds: int = flag(
        400,
        "rounds of stage synthesize, which makes the initial bank",
        affects=("synthesize",),
        scales=True,
        least=1,
        most=1_000_000,
    )
    init_g_steps: int = flag(
        500, "inversion steps per round of the initial bank", affects=("synthesize",), scales=True, least=1
    )
    g_steps: int = flag(500, "inversion steps per round of stage distill", affects=("distill",), scales=True, least=1)
    synthesis_batch_size: int = flag(200, "images synthesized per round", affects=BOTH, least=1, most=1_000_000)
    lr_g: float = flag(1e-3, "Adam learning rate of generator, noise and contrastive head", affects=BOTH, above=0)
    nz: int = flag(256, "length of the generator's noise vector", affects=BOTH, least=1)
    bn: float = flag(1.0, "weight of the BN-statistics loss in synthesis", affects=BOTH, least=0)
    oh: float = flag(1.0, "weight of the one-hot loss CE(T(x), y) in synthesis", affects=BOTH, least=0)
    adv: float = flag(
        0.5,
        "weight of the adversarial loss in stage distill: -KL where student and teacher predict the same class",
        affects=("distill",),
        least=0,
    )
    cr: float = flag(
        0.8, "weight of the contrastive loss in synthesis, InfoNCE between local and global views", affects=BOTH, least=0
    )
    cr_T: float = flag(0.2, "temperature of the contrastive loss", affects=BOTH, above=0)
    memory_size: int = flag(
        40960, "size of the contrastive loss's memory bank: number of latest images kept", affects=BOTH, least=1
    )
    negatives: int = flag(
        4096, "negatives drawn from the memory bank for the contrastive loss of a step", affects=BOTH, least=1
    )
    head_dim: int = flag(256, "length of the contrastive embedding", affects=BOTH, least=1)
    T: float = flag(20.0, "temperature of the distillation loss", affects=("distill",), above=0)


def info_nce(anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE: cross-entropy of finding each anchor's positive among all positives and negatives by dot products.

    Args:
        anchors, positives: (B, D), rows of length 1; row i of both belongs to image i.
        negatives: (N, D), rows of length 1; N may be 0.
        temperature: divisor of the dot products.
    Returns:
        Scalar >= 0, batch mean.
    """
    logits = anchors @ torch.cat([positives, negatives]).T / temperature
    return F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device))


def interpolation(start: Tensor, extent: Tensor, size: int) -> Tensor:
    """Matrices that resample a line of ``size`` pixels bilinearly, one per image; the pixels at the ends are repeated.

    Args:
        start, extent: (B,), start and length of the segment that is stretched to the whole line, as shares of the line; a
            negative length mirrors it.
        size: number of pixels of the line.
    Returns:
        (B, size, size): row i holds the weights of the old pixels in new pixel i; a row sums to 1.
    """
    pixels = torch.arange(size, device=start.device)
    centres = start[:, None] * size + extent[:, None] * (pixels + 0.5) - 0.5
    distances = centres.clamp(0, size - 1)[:, :, None] - pixels
    return (1 - distances.abs()).clamp(min=0)


def crop_resize(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, mirror: Tensor) -> Tensor:
    """Crops a box out of each image and resizes it to the image's size, by a product with two matrices.

    Args:
        images: float images (B, C, H, W); gradients reach them.
        top, left, height, width: (B,), the box in shares of the image's sides, in [0, 1].
        mirror: (B,) bool, whether to flip left and right.
    """
    rows = interpolation(top, height, images.shape[2])
    columns = interpolation(torch.where(mirror, left + width, left), torch.where(mirror, -width, width), images.shape[3])
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def local_views(images: Tensor, flip: bool) -> Tensor:
    """Local views: one random crop of each image (B, C, H, W), as described in the module's docstring."""
    area, aspect, down, right, side = torch.rand(5, len(images), device=images.device)
    area, aspect = 0.25 + 0.75 * area, ((2 * aspect - 1) * math.log(4 / 3)).exp()
    height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    return crop_resize(images, down * (1 - height), right * (1 - width), height, width, (side < 0.5) & flip)


class CMISynthesizer(Synthesizer):
    """Inverts the teacher with a new generator each round; a contrastive loss makes images unlike each other."""

    def __init__(self, config: CMIConfig, teacher: nn.Module, task: Task, *, g_steps: int, adv: float):
        self.config, self.teacher, self.task, self.g_steps, self.adv = config, teacher, task, g_steps, adv
        wanted = config.bn or config.cr and layers_with_statistics(teacher)
        self.statistics = BNStatistics(teacher) if wanted else None
        self.generator = Generator(config.nz, task.info.image_size).to(task.device, memory_format=torch.channels_last)
        self.z = torch.zeros(config.synthesis_batch_size, config.nz, device=task.device, requires_grad=True)
        self.fresh = [*self.generator.parameters(), self.z]
        groups = [{"params": self.fresh, "betas": (0.5, 0.999)}]
        self.independent = not config.cr
        if config.cr:
            with torch.no_grad():
                length = self.represent(self.z.new_zeros(2, 3, task.info.image_size, task.info.image_size))[1].shape[1]
            layers = nn.Linear(length, config.head_dim), nn.ReLU(inplace=True), nn.Linear(config.head_dim, config.head_dim)
            self.head = nn.Sequential(*layers).to(task.device)
            self.memory = torch.zeros(0, length, dtype=torch.half, device=task.device)  # oldest first
            groups.append({"params": [*self.head.parameters()]})
        self.generate, self.observe = self.generator, self.represent
        # One optimizer for both: its state for generator and noise is deleted after each round, that for the head is kept.
        self.optimizer = torch.optim.Adam(groups, lr=config.lr_g, fused=True)

    def compile_targets(self) -> list[CompileTarget]:
        return [
            CompileTarget(self, "generate", self.g_steps, "generator"),
            CompileTarget(self, "observe", self.g_steps, "teacher and its statistics"),
        ]

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Inverts one batch; returns its images at the step of lowest total loss."""
        reset(self.generator).train()
        with torch.no_grad():
            self.z.normal_()
        labels = balanced_labels(len(self.z), self.task.info.num_classes, self.task.device)
        best, precision = LowestLoss(), self.task.precision.fresh()
        for _ in range(self.g_steps):
            with self.task.precision.autocast():
                images = self.generate(self.z).float()
            losses = self.losses(images, labels, student)
            best.update(images, losses)
            precision.minimize(losses["loss"], self.optimizer)
        for parameter in self.fresh:
            self.optimizer.state.pop(parameter, None)
        self.remember(best.images)
        return ImageBatch(best.images, labels, best.scalars())

    def losses(self, images: Tensor, labels: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """Named synthesis losses of images (B, 3, H, W); "loss" is their weighted sum."""
        config, count = self.config, len(images)
        views = global_view = self.task.random_view(images)
        if config.cr:
            views = torch.cat([global_view, local_views(images, self.task.info.flip)])
            views = views.contiguous(memory_format=torch.channels_last)
        logits, features, batch_stats = self.observe(views, rows=count)
        logits = logits[:count]
        terms = {"loss_oh": (config.oh, one_hot_loss(logits, labels))}
        if config.bn:
            terms["loss_bn"] = config.bn, bn_loss(batch_stats, self.statistics.running)
        if config.cr:
            terms["loss_cr"] = config.cr, self.contrastive_loss(*features.split(count))
        if self.adv:
            with self.task.precision.autocast():
                student_logits = student(global_view)
            terms["loss_adv"] = self.adv, adversarial_loss(student_logits, logits, agreeing_only=True)
        return weighted_sum(terms)

    def represent(self, images: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, list[Stats] | None]:
        """Teacher logits (B, C) and r (B, D) of images, and the BN statistics of the first ``rows`` images."""
        pooled: list[Tensor] = []
        collecting = collected(self.statistics, rows=rows, pooled=pooled if self.config.cr else None)
        with collecting as batch_stats, self.task.precision.autocast():
            output = self.teacher(images, return_features=True)
        return output.logits, torch.cat([part.float() for part in (output.features, *pooled)], 1), batch_stats

    def contrastive_loss(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        """L_cr, the contrastive loss, given r of the global and of the local views, (B, D) each."""
        drawn = torch.randperm(len(self.memory), device=self.memory.device)[: self.config.negatives]
        features = torch.cat([local_features, global_features, self.memory[drawn].float()])
        embedded = F.normalize(self.head(features), dim=1)
        count = len(local_features)
        anchors, positives, negatives = embedded.split([count, count, len(drawn)])
        return info_nce(anchors, positives, negatives, self.config.cr_T)

    def remember(self, images: Tensor) -> None:
        """Adds r of a global view of the kept images to the memory and drops the oldest entries."""
        if self.config.cr:
            with torch.no_grad():
                features = self.represent(self.task.random_view(images))[1]
            memory = torch.cat([self.memory, features.half()])
            self.memory = memory[max(0, len(memory) - self.config.memory_size) :].clone()

    def state_dict(self) -> dict:
        """State of the contrastive head, the optimizer and the memory."""
        if not self.config.cr:
            return {}
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(), "memory": self.memory}

    def load_state_dict(self, state: dict) -> None:
        if not self.config.cr or "memory" not in state:
            return
        found, wanted = len(state["head"]["0.bias"]), self.config.head_dim
        if found != wanted:
            raise UserError(
                f"--head_dim {wanted} found, but the contrastive head in the image bank has {found}; give --head_dim {found}"
            )
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_g  # --init_bank may come from a run with another learning rate
        self.memory = state["memory"].to(self.task.device)


class CMI(Method):
    """Method with stages synthesize (initial bank, without the student) and distill (rounds with the student)."""

    Config = CMIConfig
    defaults = {"epochs": 100, "kd_steps": 2000, "batch_size": 128, "lr": 0.1}

    def stages(self) -> tuple[Stage, ...]:
        return self.from_initial_bank(self.config.init_rounds)

    def initial_synthesizer(self) -> CMISynthesizer:
        return CMISynthesizer(self.config, self.teacher, self.task, g_steps=self.config.init_g_steps, adv=0.0)

    def synthesizer(self) -> CMISynthesizer:
        config = self.config
        return CMISynthesizer(config, self.teacher, self.task, g_steps=config.g_steps, adv=config.adv)

    def objective(self) -> KLDistillation:
        return KLDistillation(self.config.T)
