"""CSD: customizing synthetic data for data-free student learning (Luo et al., ICME 2023, arXiv 2307.04542).

Each round trains a generator to invert the teacher. Its images should match the teacher's BN statistics and be classified by
the teacher as wanted. They should also be hard for the student. A self-supervised head on the student's features is trained
to predict class and rotation of bank images, and new images should have uncertain predictions. The student is trained on all
images made so far. Its loss has three terms: distillation, cross-entropy to the labels that the images were made for, and
distance to the teacher's last feature map through a learned alignment.

    synthesis   bn * L_bn + oh * CE(T(x), y) - csd * mean_k CE(h(f_S(rot_k x)), 4y + k)
    h(f)        MLP(f) / ||MLP(f)||_2, with 4C entries
    student     KL_T + ce * CE(S(x), y) + feat * MSE(align(map_S(x)), map_T(x))

The head's output is normalized to length 1, which bounds the cross-entropy. For n = 4C classes it lies between
log(1 + (n - 1) exp(-s)) and log(1 + (n - 1) exp(s)), s = sqrt(n / (n - 1)): 2.72 and 4.69 for ten classes. The head is
trained by SGD with momentum and weight decay on the student's batches. Before the student steps of each round, its weights
are drawn anew from N(0, .02) and its biases are set to 0. Its momentum is kept. The feature maps are the outputs of the last
blocks; in WRNs these are taken before the last BN and ReLU.

Published settings (CIFAR-10, WRN-40-2): an initial bank of 400 rounds of 200 images, 500 steps each, csd 0; then 100 rounds
of 200 images, 200 steps each, with 2000 student steps per round on batches of 128; SGD lr .1, T 20, csd 10, feat 30; SGD of
the head with lr .1, momentum .9, weight decay 1e-4. With fewer than a few hundred head steps per round (``kd_steps /
head_interval``) the head learns nothing, and csd has almost no effect.

``--warm_generator`` is not in the paper. With it a round starts from the generator of the previous round. The synthesis loss
then needs only a quarter of the steps, and the student becomes more accurate (docs/speed.md).

Deviations:
- Labels are drawn class-balanced, not independently.
- If the feature maps differ in size, the larger one is pooled. The script resizes the student's map to the teacher's size.

Tried and dropped: raw logits in place of h. The term -csd * CE then has no lower bound. As soon as the head has learnt
something, synthesis destroys the images, and the teacher classifies none of them as wanted.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import ImageBatch, LowestLoss, Method, Synthesizer, Task, balanced_labels, state_errors
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
from engine.runtime.compilation import CompileTarget
from engine.runtime.errors import UserError
from engine.runtime.flags import flag
from engine.runtime.precision import begin_momentum
from models.classifier import eval_mode

BOTH = ("synthesize", "distill")


@dataclass(frozen=True)
class CSDConfig:
    """Flags of CSD."""

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
    init_batch_size: int = flag(
        200, "images synthesized per round of the initial bank", affects=("synthesize",), least=1, most=1_000_000
    )
    g_steps: int = flag(200, "inversion steps per round of stage distill", affects=("distill",), scales=True, least=1)
    synthesis_batch_size: int = flag(
        200, "images synthesized per round of stage distill", affects=("distill",), least=1, most=1_000_000
    )
    lr_g: float = flag(1e-3, "Adam learning rate of generator and noise", affects=BOTH, above=0)
    nz: int = flag(256, "length of the generator's noise vector", affects=BOTH, least=1)
    warm_generator: bool = flag(
        False, "start each round from the previous round's generator instead of a re-initialized one", affects=BOTH
    )
    bn: float = flag(1.0, "weight of the BN-statistics loss in synthesis", affects=BOTH, least=0)
    oh: float = flag(1.0, "weight of the one-hot loss CE(T(x), y) in synthesis", affects=BOTH, least=0)
    csd: float = flag(
        10.0,
        "weight of the adversarial loss in stage distill: minus the cross-entropy of the student's rotation head",
        affects=("distill",),
        least=0,
    )
    lr_head: float = flag(0.1, "SGD learning rate of the rotation head", affects=("distill",), above=0)
    head_interval: int = flag(1, "student steps per training step of the rotation head", affects=("distill",), least=1)
    T: float = flag(20.0, "temperature of the distillation loss", affects=("distill",), above=0)
    ce: float = flag(
        1.0, "weight of the student's cross-entropy to the labels of the synthetic images", affects=("distill",), least=0
    )
    feat: float = flag(
        30.0,
        "weight of the distance between the last feature maps of student and teacher in the student's loss",
        affects=("distill",),
        least=0,
    )


class RotationHead(nn.Module):
    """Rotation head: features (B, D) -> logits of class and rotation (B, 4C), each row normalized to length 1."""

    def __init__(self, feature_dim: int, num_classes: int):
        super().__init__()
        self.hidden, self.output = nn.Linear(feature_dim, feature_dim), nn.Linear(feature_dim, 4 * num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.output(F.relu(self.hidden(features))), dim=1)


class CSDSynthesizer(Synthesizer):
    """Inverts the teacher with one generator per round; with ``csd > 0`` adversarially to the student's rotation head."""

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

    def compile_targets(self) -> list[CompileTarget]:
        steps = [
            CompileTarget(self, "generate", self.g_steps, "generator"),
            CompileTarget(self, "measure", self.g_steps, "synthesis losses"),
        ]
        return steps + (
            [CompileTarget(self, "measure_head", self.task.kd_steps, "rotation head's step")] if self.csd else []
        )

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Inverts one batch; returns its images at the step of lowest total loss."""
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
            reset(self.head)  # the student has changed; the optimizer's momentum is kept
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
        """Takes one step of the rotation head on the images of this student step, at every ``head_interval``-th of them."""
        self.steps += 1
        if not self.csd or self.steps % self.config.head_interval:
            return
        self.head_optimizer.zero_grad(set_to_none=True)
        with eval_mode(student):
            self.measure_head(images, labels, student).backward()
        self.task.average_gradients(self.head.parameters())
        self.head_optimizer.step()

    def head_loss(self, images: Tensor, labels: Tensor, student: nn.Module) -> Tensor:
        """Cross-entropy of the rotation head; no gradient reaches the student's features."""
        with torch.no_grad(), self.task.precision.autocast():
            features = student(rotations(images), return_features=True).features
        return F.cross_entropy(self.head(features.float()), rotation_labels(labels))

    def state_dict(self) -> dict:
        """State of the generator (if it is kept between rounds), the rotation head and the head's optimizer."""
        state = {"generator": self.generator.state_dict()} if self.config.warm_generator and self.trained else {}
        if self.csd:
            state |= {"steps": self.steps, "head": self.head.state_dict()}
            state |= {"head_optimizer": self.head_optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restores what ``state_dict`` returned; a state from the initial bank has a generator at most."""
        with state_errors():
            if self.config.warm_generator and "generator" in state:
                self.generator.load_state_dict(state["generator"])
                self.trained = True
            if self.csd and state.keys() != {"generator"}:
                self.steps = state["steps"]
                self.head.load_state_dict(state["head"])
                self.head_optimizer.load_state_dict(state["head_optimizer"])


class AlignedDistillation(nn.Module):
    """Student loss KL_T + ce * CE + feat * MSE between the last feature maps, the student's map after a learned alignment.

    The alignment is three convolutions (1x1, 3x3, 1x1), 2 * C_T wide, with BN and ReLU between them. Its parameters are
    trained with the student's and discarded at the end. If the maps differ in size, the larger one is average-pooled.
    """

    def __init__(self, config: CSDConfig, student_shape: tuple[int, int, int], teacher_shape: tuple[int, int, int]):
        super().__init__()
        self.T, self.ce, self.feat = config.T, config.ce, config.feat
        self.caches_logits = not config.feat
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
        """Named scalar losses of two outputs with logits (B, C) and block_map (B, C_b, h, w)."""
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
    """Method with stages synthesize (initial bank, csd 0) and distill (rounds with csd)."""

    Config = CSDConfig
    defaults = {"epochs": 100, "kd_steps": 2000, "batch_size": 128, "lr": 0.1}

    def stages(self) -> tuple[Stage, ...]:
        return self.from_initial_bank(self.config.init_rounds)

    def initial_synthesizer(self) -> CSDSynthesizer:
        config = self.config
        return self._synthesizer(g_steps=config.init_g_steps, images=config.init_batch_size, csd=0.0)

    def synthesizer(self) -> CSDSynthesizer:
        config = self.config
        return self._synthesizer(g_steps=config.g_steps, images=config.synthesis_batch_size, csd=config.csd)

    def _synthesizer(self, **lengths) -> CSDSynthesizer:
        return CSDSynthesizer(self.config, self.teacher, self.task, feature_dim=self.student.feature_dim, **lengths)

    def objective(self) -> AlignedDistillation:
        shapes = self.student.block_map_shape, self.teacher.block_map_shape
        if self.config.feat and None in shapes:
            raise UserError(
                "the feature-map loss needs feature maps, which the teacher or the student does not have; give --feat 0"
            )
        return AlignedDistillation(self.config, *(s or (1, 1, 1) for s in shapes))
