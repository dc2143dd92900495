"""CMI: contrastive model inversion (Fang et al., IJCAI 2021, arXiv 2105.08584).

Inverted images tend to resemble each other. Here a generator, fresh every round, is to make images of which each can be
told from all others: a local view of an image must be closer to the global view of the same image than to those of the
other images of its batch and of earlier rounds, in an embedding that is learned meanwhile.

    synthesis   bn * L_bn + oh * CE(T(x), y) + cr * L_cr - adv * KL(S || T) where argmax S = argmax T
    L_cr        mean_i -log [ exp(l_i g_i / cr_T) / (sum_j exp(l_i g_j / cr_T) + sum_m exp(l_i n_m / cr_T)) ]
    l, g, n     head(r(local view)), head(r(global view)), head(remembered r) on the unit sphere
    r(x)        the teacher's penultimate features and the inputs of all its BN layers averaged over positions, joined
    student     KL_T

The global view is the field's crop and flip; BN statistics, one-hot and adversarial loss see it alone. The local one is a
crop of 25 to 100 % of the area, aspect 3/4 to 4/3, resized bilinearly (and flipped). Both go through the teacher in one
batch. The memory holds r of the latest ``memory_size`` images in half precision on the device; ``negatives`` of them,
drawn at every step, join the batch's. Memory, head and its optimizer go on from round to round, from the initial bank
into distillation, and with a checkpoint: 2 bytes x memory_size x length of r, e.g. 230 MB for wrn40_2, 740 for resnet34,
written once a round of the initial bank.

Published settings. The defaults are those of CSD's script for this method (CIFAR-10): initial bank of 400 rounds x 200 images
without student; then 100 rounds of 200 images and 2000 student steps on batches of 128; 500 steps a round, Adam lr 1e-3; bn 1,
oh 1, adv .5, cr .8, cr_T .2, memory 40,960, 4,096 negatives, head of 256; SGD lr .1, T 20. The scripts have those of the
method's own: on a bank of about 50,000 images 40 rounds of 256, 200 steps each, with oh .5 and cr_T .1. How that bank was
made is not published; theirs is 200 rounds of 256 by the same weights, 500 steps each.

Deviations: labels are drawn class-balanced, not independently. The published script takes r from the BN layers alone (of a
resnet34 from the inputs of its four stages alone, 512 entries for the 8,000 of all layers), remembers both views of an image
as they were at the best step, lets remembered pairs be anchors and positives too, and stops the gradient at the global views;
here L_cr is the formula above, its gradient whole, and remembered images are negatives only, in a global view drawn once the
round is over. The head's hidden layer is as wide as its output; the script's is as wide as r, which for a resnet34 costs as
much as the teacher. A crop that would stick out of the image is cut to it instead of drawn again. Without BN layers r is the
features alone.
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
    layers_with_statistics,
    one_hot_loss,
    weighted_sum,
)
from engine.loops.session import Stage
from engine.runtime.compilation import Hot
from engine.runtime.errors import UserError
from engine.runtime.flags import flag

BOTH = ("synthesize", "distill")


@dataclass(frozen=True)
class CMIConfig:
    """Flags of CMI."""

    init_rounds: int = flag(400, "rounds of the initial bank", affects=("synthesize",), scales=True, least=1, most=1_000_000)
    init_g_steps: int = flag(
        500, "inversion steps a round of the initial bank", affects=("synthesize",), scales=True, least=1
    )
    g_steps: int = flag(500, "inversion steps a round while distilling", affects=("distill",), scales=True, least=1)
    synthesis_batch_size: int = flag(200, "images a round", affects=BOTH, least=1, most=1_000_000)
    lr_g: float = flag(1e-3, "Adam learning rate of generator, noise and contrastive head", affects=BOTH, above=0)
    nz: int = flag(256, "length of the generator's noise vector", affects=BOTH, least=1)
    bn: float = flag(1.0, "weight of the BN-statistics loss", affects=BOTH, least=0)
    oh: float = flag(1.0, "weight of the one-hot loss, CE(T(x), y)", affects=BOTH, least=0)
    adv: float = flag(
        0.5,
        "weight of the adversarial loss while distilling, -KL where student and teacher agree (the initial bank has 0)",
        affects=("distill",),
        least=0,
    )
    cr: float = flag(0.8, "weight of the contrastive loss, InfoNCE of local against global views", affects=BOTH, least=0)
    cr_T: float = flag(0.2, "temperature of the contrastive loss", affects=BOTH, above=0)
    memory_size: int = flag(40960, "images that are remembered for the contrastive loss", affects=BOTH, least=1)
    negatives: int = flag(4096, "remembered images in the contrastive loss of a step", affects=BOTH, least=1)
    head_dim: int = flag(256, "length of the contrastive embedding", affects=BOTH, least=1)
    T: float = flag(20.0, "temperature of the distillation loss", affects=("distill",), above=0)


def info_nce(anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of picking each anchor's positive among all positives and negatives by their dot products.

    Args:
        anchors, positives: (B, D), of one image in one row, on the unit sphere.
        negatives: (N, D), likewise; N may be 0.
    Returns:
        Scalar >= 0, batch mean.
    """
    logits = anchors @ torch.cat([positives, negatives]).T / temperature
    return F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device))


def interpolation(start: Tensor, extent: Tensor, size: int) -> Tensor:
    """Bilinear resampling of a line of ``size`` pixels as a matrix, one an image; beyond the ends it repeats the last pixel.

    Args:
        start, extent: (B,), of the stretch that is to fill the line, in shares of it.
    Returns:
        (B, size, size): row i holds the weights of the old pixels in new pixel i, which sum to 1.
    """
    pixels = torch.arange(size, device=start.device)
    centres = start[:, None] * size + extent[:, None] * (pixels + 0.5) - 0.5
    distances = centres.clamp(0, size - 1)[:, :, None] - pixels
    return (1 - distances.abs()).clamp(min=0)


def crop_resize(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, mirror: Tensor) -> Tensor:
    """A box of each image, in shares of its sides, at the size of the image; a product with two matrices.

    Args:
        images: (B, C, H, W), float; gradients reach them.
        top, left, height, width: (B,) in [0, 1].
        mirror: (B,) bool, whether to flip left and right.
    """
    rows = interpolation(top, height, images.shape[2])
    columns = interpolation(torch.where(mirror, left + width, left), torch.where(mirror, -width, width), images.shape[3])
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def local_views(images: Tensor, flip: bool) -> Tensor:
    """One random crop each of images (B, C, H, W), see the module's docstring."""
    area, aspect, down, right, side = torch.rand(5, len(images), device=images.device)
    area, aspect = 0.25 + 0.75 * area, ((2 * aspect - 1) * math.log(4 / 3)).exp()
    height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    return crop_resize(images, down * (1 - height), right * (1 - width), height, width, (side < 0.5) & flip)


class CMISynthesizer(Synthesizer):
    """Inverts the teacher by a fresh generator each round, each image unlike the others and those remembered."""

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
        # One optimizer: the fresh part's state goes at the end of a round, the head's stays.
        self.optimizer = torch.optim.Adam(groups, lr=config.lr_g, fused=True)

    def hot(self) -> list[Hot]:
        return [
            Hot(self, "generate", self.g_steps, "generator"),
            Hot(self, "observe", self.g_steps, "teacher and its statistics"),
        ]

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """One inverted batch, the best of ``g_steps`` steps by total loss."""
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
        """Teacher's logits (B, C) and r (B, D) of images, and the BN statistics of the first ``rows`` of them."""
        pooled: list[Tensor] = []
        collecting = collected(self.statistics, rows=rows, pooled=pooled if self.config.cr else None)
        with collecting as batch_stats, self.task.precision.autocast():
            output = self.teacher(images, return_features=True)
        return output.logits, torch.cat([part.float() for part in (output.features, *pooled)], 1), batch_stats

    def contrastive_loss(self, global_features: Tensor, local_features: Tensor) -> Tensor:
        """L_cr of r of the two views, (B, D) each."""
        drawn = torch.randperm(len(self.memory), device=self.memory.device)[: self.config.negatives]
        features = torch.cat([local_features, global_features, self.memory[drawn].float()])
        embedded = F.normalize(self.head(features), dim=1)
        count = len(local_features)
        anchors, positives, negatives = embedded.split([count, count, len(drawn)])
        return info_nce(anchors, positives, negatives, self.config.cr_T)

    def remember(self, images: Tensor) -> None:
        """Puts r of a global view of the images kept into the memory; the oldest make room."""
        if self.config.cr:
            with torch.no_grad():
                features = self.represent(self.task.random_view(images))[1]
            memory = torch.cat([self.memory, features.half()])
            self.memory = memory[max(0, len(memory) - self.config.memory_size) :].clone()

    def state_dict(self) -> dict:
        """The embedding and what it remembers."""
        if not self.config.cr:
            return {}
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(), "memory": self.memory}

    def load_state_dict(self, state: dict) -> None:
        if not self.config.cr or "memory" not in state:
            return
        found, wanted = len(state["head"]["0.bias"]), self.config.head_dim
        if found != wanted:
            raise UserError(f"--head_dim {wanted}: the image bank's contrastive head has {found}; give --head_dim {found}")
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_g  # another run's bank may have had another
        self.memory = state["memory"].to(self.task.device)


class CMI(Method):
    """Stages synthesize (initial bank, without the student) and distill (rounds with it)."""

    Config = CMIConfig
    defaults = {"epochs": 100, "kd_steps": 2000, "batch_size": 128, "lr": 0.1}

    def stages(self) -> tuple[Stage, ...]:
        return self.from_initial_bank(self.config.init_rounds)

    def initial_synthesizer(self) -> CMISynthesizer:
        lengths = {"g_steps": self.config.init_g_steps}
        return CMISynthesizer(self.config, self.teacher, self.task, **lengths, adv=0.0)

    def synthesizer(self) -> CMISynthesizer:
        lengths = {"g_steps": self.config.g_steps}
        return CMISynthesizer(self.config, self.teacher, self.task, **lengths, adv=self.config.adv)

    def objective(self) -> KLDistillation:
        return KLDistillation(self.config.T)
