"""CSD: customizing synthetic data for data-free student learning (Luo et al., ICME 2023, arXiv 2307.04542).

A generator inverts the teacher once a round. Its images must look like training data to the teacher (BN statistics,
one-hot) and be hard for the student: a self-supervised head on the student's features, trained to name class and
rotation of bank images, must be unsure of them. The student learns from all images so far by distillation, by the
labels they were made for, and by matching the teacher's last feature map through a learned alignment.

    synthesis   bn * L_bn + oh * CE(T(x), y) - csd * mean_k CE(h(f_S(rot_k x)), 4y + k)
    h(f)        MLP(f) / ||MLP(f)||_2, of 4C entries
    student     KL_T + ce * CE(S(x), y) + feat * MSE(align(map_S(x)), map_T(x))

With logits on the unit sphere no image can make the cross-entropy endless: for n = 4C classes it lies between
log(1 + (n - 1) exp(-s)) and log(1 + (n - 1) exp(s)), s = sqrt(n / (n - 1)): 2.72 and 4.69 for ten classes. The head learns
by SGD with momentum and weight decay on every student batch; before each round's student steps its weights are drawn anew
from N(0, .02) and its biases set to 0, while its momentum stays. The feature maps are what the last blocks make: in WRNs
before the last BN and ReLU.

Published settings (CIFAR-10, WRN-40-2): initial bank of 400 rounds x 200 images, 500 steps each, csd 0; then 100 rounds of
200 images, 200 steps each, and 2000 student steps on batches of 128; SGD lr .1, T 20, csd 10, feat 30; head's SGD lr .1,
momentum .9, weight decay 1e-4. With few head steps a round (``kd_steps / head_interval`` below some hundreds) the head knows
nothing and csd does next to nothing.

``--warm_generator``, which the paper does not have, begins a round with the generator that the round before has left. It gets as
far in a quarter of the steps, and the student further (docs/speed.md).

Deviations: labels are drawn class-balanced, not independently. Where maps differ in size the larger is pooled; the script
brings the student's to the teacher's size. Raw logits in the place of h, tried first, leave -csd * CE without a lower bound:
once the head has learnt anything the images are taken to pieces, and none is to the teacher what it was made for.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import ImageBatch, LowestLoss, Method, Synthesizer, Task, balanced_labels, own_state
from datafree.generators import Generator, reset
from datafree.losses import (
    BNStatistics,
    bn_loss,
    collected,
    feature_loss,
    kd_loss,
    one_hot_loss,
    rotation_labels,
    rotations,
    weighted_sum,
)
from engine.loops.session import Stage
from engine.runtime.compilation import Hot
from engine.runtime.errors import UserError
from engine.runtime.flags import flag
from engine.runtime.precision import begin_momentum
from models.classifier import eval_mode

BOTH = ("synthesize", "distill")


@dataclass(frozen=True)
class CSDConfig:
    """Flags of CSD."""

    init_rounds: int = flag(400, "rounds of the initial bank", affects=("synthesize",), scales=True, least=1, most=1_000_000)
    init_g_steps: int = flag(
        500, "inversion steps a round of the initial bank", affects=("synthesize",), scales=True, least=1
    )
    init_batch_size: int = flag(200, "images a round of the initial bank", affects=("synthesize",), least=1, most=1_000_000)
    g_steps: int = flag(200, "inversion steps a round while distilling", affects=("distill",), scales=True, least=1)
    synthesis_batch_size: int = flag(200, "images a round while distilling", affects=("distill",), least=1, most=1_000_000)
    lr_g: float = flag(1e-3, "Adam learning rate of generator and noise", affects=BOTH, above=0)
    nz: int = flag(256, "length of the generator's noise vector", affects=BOTH, least=1)
    warm_generator: bool = flag(False, "begin a round with the last round's generator, not with a fresh one", affects=BOTH)
    bn: float = flag(1.0, "weight of the BN-statistics loss", affects=BOTH, least=0)
    oh: float = flag(1.0, "weight of the one-hot loss", affects=BOTH, least=0)
    csd: float = flag(
        10.0,
        "weight of the rotation-uncertainty loss while distilling (the initial bank has 0)",
        affects=("distill",),
        least=0,
    )
    lr_head: float = flag(0.1, "SGD learning rate of the rotation head", affects=("distill",), above=0)
    head_interval: int = flag(1, "train the rotation head at every n-th student step", affects=("distill",), least=1)
    T: float = flag(20.0, "temperature of the distillation loss", affects=("distill",), above=0)
    ce: float = flag(
        1.0, "weight of the student's cross-entropy to the labels the images were made for", affects=("distill",), least=0
    )
    feat: float = flag(30.0, "weight of the feature-map loss", affects=("distill",), least=0)


class RotationHead(nn.Module):
    """Features (B, D) -> logits of class and turn (B, 4C), each row of length 1."""

    def __init__(self, feature_dim: int, num_classes: int):
        super().__init__()
        self.hidden, self.output = nn.Linear(feature_dim, feature_dim), nn.Linear(feature_dim, 4 * num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.output(F.relu(self.hidden(features))), dim=1)


class CSDSynthesizer(Synthesizer):
    """Inverts the teacher by one generator a round; with ``csd > 0`` against the student's rotation head."""

    def __init__(
        self, config: CSDConfig, teacher: nn.Module, task: Task, *, feature_dim: int, g_steps: int, images: int, csd: float
    ):
        self.config, self.teacher, self.task = config, teacher, task
        self.g_steps, self.images, self.csd = g_steps, images, csd
        self.generator = Generator(config.nz, task.info.image_size).to(task.device, memory_format=torch.channels_last)
        self.statistics = BNStatistics(teacher) if config.bn else None
        self.steps = 0
        self.independent, self.trained = not (csd or config.warm_generator), False
        if csd:
            self.head = RotationHead(feature_dim, task.info.num_classes).to(task.device)
            self.shared = self.head
            self.head_optimizer = torch.optim.SGD(
                self.head.parameters(), lr=config.lr_head, momentum=0.9, weight_decay=1e-4, fused=True
            )
            begin_momentum(self.head_optimizer)
            self.measure_head = self.head_loss
        self.generate, self.measure = self.generator, self.losses

    def hot(self) -> list[Hot]:
        steps = [Hot(self, "generate", self.g_steps, "generator"), Hot(self, "measure", self.g_steps, "synthesis losses")]
        return steps + ([Hot(self, "measure_head", self.task.kd_steps, "rotation head's step")] if self.csd else [])

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """One inverted batch, the best of ``g_steps`` steps by total loss."""
        config, device = self.config, self.task.device
        if not (config.warm_generator and self.trained):
            reset(self.generator)
        self.generator.train()
        self.trained = True
        z = torch.randn(self.images, config.nz, device=device, requires_grad=True)
        labels = balanced_labels(self.images, self.task.info.num_classes, device)
        optimizer = torch.optim.Adam([*self.generator.parameters(), z], lr=config.lr_g, betas=(0.5, 0.999), fused=True)
        best, precision = LowestLoss(), self.task.precision.fresh()
        for _ in range(self.g_steps):
            with self.task.precision.autocast():
                images = self.generate(z).float()
            losses = self.measure(self.task.random_view(images), labels, student)
            best.update(images, losses)
            precision.minimize(losses["loss"], optimizer)
        if self.csd:
            reset(self.head)  # the student has moved on; the optimizer's momentum stays
        return ImageBatch(best.images, labels, best.scalars())

    def losses(self, images: Tensor, labels: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """Named synthesis losses of augmented images (B, 3, H, W); "loss" is their weighted sum."""
        with collected(self.statistics) as batch_stats, self.task.precision.autocast():
            logits = self.teacher(images)
        terms = {"loss_oh": (self.config.oh, one_hot_loss(logits, labels))}
        if self.statistics:
            terms["loss_bn"] = self.config.bn, bn_loss(batch_stats, self.statistics.running)
        if self.csd:
            with self.task.precision.autocast():
                features = student(rotations(images), return_features=True).features
            terms["loss_csd"] = self.csd, -F.cross_entropy(self.head(features.float()), rotation_labels(labels))
        return weighted_sum(terms)

    def after_step(self, student: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Trains the rotation head on the bank images of this student step."""
        self.steps += 1
        if not self.csd or self.steps % self.config.head_interval:
            return
        self.head_optimizer.zero_grad(set_to_none=True)
        with eval_mode(student):
            self.measure_head(images, labels, student).backward()
        self.task.average_gradients(self.head.parameters())
        self.head_optimizer.step()

    def head_loss(self, images: Tensor, labels: Tensor, student: nn.Module) -> Tensor:
        """Cross-entropy of the rotation head; the student's features are taken as they are."""
        with torch.no_grad(), self.task.precision.autocast():
            features = student(rotations(images), return_features=True).features
        return F.cross_entropy(self.head(features.float()), rotation_labels(labels))

    def state_dict(self) -> dict:
        """What the next round's images are made by and against: the generator, where it stays; the head and its momentum."""
        state = {"generator": self.generator.state_dict()} if self.config.warm_generator and self.trained else {}
        if self.csd:
            state |= {"steps": self.steps, "head": self.head.state_dict()}
            state |= {"head_optimizer": self.head_optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Undoes ``state_dict``; the initial bank leaves a generator alone."""
        with own_state():
            if self.config.warm_generator and "generator" in state:
                self.generator.load_state_dict(state["generator"])
                self.trained = True
            if self.csd and state.keys() != {"generator"}:
                self.steps = state["steps"]
                self.head.load_state_dict(state["head"])
                self.head_optimizer.load_state_dict(state["head_optimizer"])


class AlignedDistillation(nn.Module):
    """KL + ce * CE + feat * MSE of the last blocks' maps, the student's passed through a learned alignment.

    The alignment is three convolutions (1x1, 3x3, 1x1), 2 * C_T wide, with BN and ReLU between them; its parameters are
    trained with the student's and thrown away at the end. Where the maps differ in size, the larger is average-pooled.
    """

    def __init__(self, config: CSDConfig, student_shape: tuple[int, int, int], teacher_shape: tuple[int, int, int]):
        super().__init__()
        self.T, self.ce, self.feat = config.T, config.ce, config.feat
        self.logits_only = not config.feat
        width, out = 2 * teacher_shape[0], teacher_shape[0]
        self.size = (min(student_shape[1], teacher_shape[1]), min(student_shape[2], teacher_shape[2]))
        if self.feat:
            self.align = nn.Sequential(
                *self._layer(student_shape[0], width, 1), *self._layer(width, width, 3), nn.Conv2d(width, out, 1, bias=False)
            )

    @staticmethod
    def _layer(before: int, after: int, kernel: int) -> list[nn.Module]:
        convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
        return [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """Outputs with logits (B, C) and block_map (B, C_b, h, w) -> named scalar losses."""
        losses = {
            "kd": kd_loss(student_out.logits, teacher_out.logits, self.T),
            "ce": F.cross_entropy(student_out.logits.float(), labels),
        }
        losses["loss"] = losses["kd"] + self.ce * losses["ce"]
        if self.feat:
            aligned = self.align(F.adaptive_avg_pool2d(student_out.block_map, self.size))
            losses["feat"] = feature_loss(aligned, F.adaptive_avg_pool2d(teacher_out.block_map, self.size))
            losses["loss"] = losses["loss"] + self.feat * losses["feat"]
        return losses


class CSD(Method):
    """Stages synthesize (initial bank, csd 0) and distill (rounds with csd)."""

    Config = CSDConfig
    defaults = {"epochs": 100, "kd_steps": 2000, "batch_size": 128, "lr": 0.1}

    def stages(self) -> tuple[Stage, ...]:
        return self.from_initial_bank(self.config.init_rounds)

    def initial_synthesizer(self) -> CSDSynthesizer:
        config = self.config
        return self._synthesizer(g_steps=config.init_g_steps, images=config.init_batch_size, csd=0.0)

    def synthesizer(self) -> CSDSynthesizer:
        config = self.config
        lengths = {"g_steps": config.g_steps, "images": config.synthesis_batch_size}
        return self._synthesizer(**lengths, csd=config.csd)

    def _synthesizer(self, **lengths) -> CSDSynthesizer:
        return CSDSynthesizer(self.config, self.teacher, self.task, feature_dim=self.student.feature_dim, **lengths)

    def objective(self) -> AlignedDistillation:
        shapes = self.student.block_map_shape, self.teacher.block_map_shape
        if self.config.feat and None in shapes:
            raise UserError("a network without feature maps cannot use the feature-map loss; give --feat 0")
        return AlignedDistillation(self.config, *(s or (1, 1, 1) for s in shapes))
