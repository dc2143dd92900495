"""Fast, or FM: a meta-learned generator that needs few steps per batch (Fang et al., AAAI 2022, arXiv 2112.06253).

The paper is called "Up to 100x faster data-free knowledge distillation". A round does not train a generator from scratch. It
starts from a meta generator, which holds what all images have in common. A copy of the meta generator and new noise z are
adapted to the batch within ``g_steps`` steps. A meta step then updates the meta generator so that the next adaptation is
easier.

    synthesis   bn * L_bn + oh * CE(T(x), y) - adv * KL(T(x) || S(x)), KL only where S and T predict the same class
    L_bn        sum over layers of ||m * avg + (1 - m) * batch - running||_2, for means and for variances, m = bn_mmt; the
                bank as a whole, not each batch, should have the statistics of the training data
    average     avg <- m * avg + (1 - m) * batch, once per round with the batch of the last step; at first avg <- batch
    FOMAML      meta gradient = sum of the loss's gradients over the steps of the adaptation (--is_maml 1)
    Reptile     meta gradient = meta parameters - adapted parameters (--is_maml 0)
    meta step   Adam step along the meta gradient, lr g_steps * lr_g, betas (.5, .999); the adaptation has the same betas

The first ``init_rounds`` rounds are a warm-up without the adversarial loss, stage synthesize. Stage distill continues with
the meta generator, its optimizer and the running average of the warm-up. The student is trained on all images made so far,
by KL at temperature T.

Published settings (CIFAR): 20 rounds of warm-up, then 200 rounds of 400 student steps on batches of 256; SGD lr .2, T 20;
256 images per round; bn 10, bn_mmt .9; adv 1.1, oh .4 (teacher resnet34: 1.33, .5; vgg11: 1.0, .5); the generator's first
layer is re-initialized once, 120 rounds after warm-up; FOMAML. Fast-2, -5 and -10 have g_steps 2, 5, 10, lr_g 5e-3, 3e-3,
2e-3, lr_z .015, .01, .01.

Deviations:
- Labels are drawn class-balanced, not independently.
- Generators are initialized from N(0, .02).
- Only the first layer, which is linear, is re-initialized. The script also redraws the scale of the BN layer after it, and
  does so one round earlier. The state of the meta optimizer is kept at that point, as in the script.
- In the script, the last round of warm-up already has the adversarial loss, against an untrained student. Here it does not.
- The script multiplies Reptile's gradient by 67. This has no effect, because Adam's step does not depend on the gradient's
  length.
- The student's learning rate falls to 0, not to 2e-4.

As in the script, the generators' BN layers always normalize by batch statistics. Running statistics, which only the adapted
copy collects, are never used.

Textbook FOMAML takes the gradient at the adapted parameters alone. The published script, from which the published numbers
come, sums the gradients of all steps. This is first-order MAML for the sum of the steps' losses, and this file does the
same. The last gradient alone fails. It was tried in the warm-up with a resnet20 of CIFAR-10 (64 images per round, one seed).
The synthesis loss of Fast-10 went from 28 to 136 in 14 rounds; with the sum it went to 26. The teacher then classified 30 %
of the last images as wanted, against 100 % with the sum. For Fast-2 the loss went from 88 to 84 in 20 rounds; with the sum
it went to 57.

Left out: the published variants for ImageNet and for segmentation, which have other networks and losses.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datafree.base import ImageBatch, LowestLoss, Method, Synthesizer, Task, balanced_labels, state_errors
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
from engine.runtime.flags import flag

BOTH = ("synthesize", "distill")
BETAS = (0.5, 0.999)


@dataclass(frozen=True)
class FastConfig:
    """Flags of Fast; the defaults are Fast-10."""

    init_rounds: int = flag(
        20,
        "warm-up rounds of stage synthesize, without the adversarial loss",
        affects=("synthesize",),
        scales=True,
        least=1,
        most=1_000_000,
    )
    g_steps: int = flag(10, "steps per round that adapt a copy of the meta generator", affects=BOTH, least=1)
    synthesis_batch_size: int = flag(256, "images synthesized per round", affects=BOTH, least=1, most=1_000_000)
    lr_g: float = flag(
        2e-3,
        "Adam learning rate of the adapted generator; the meta generator's is --g_steps times as large",
        affects=BOTH,
        above=0,
    )
    lr_z: float = flag(0.01, "Adam learning rate of the noise vectors", affects=BOTH, above=0)
    nz: int = flag(256, "length of the generator's noise vector", affects=BOTH, least=1)
    is_maml: int = flag(1, "gradient of the meta generator; 1: FOMAML, 0: Reptile", affects=BOTH, least=0, most=1)
    reset_l0: int = flag(
        1,
        "1: re-initialize the meta generator's first layer once, see --reset_l0_round; 0: never",
        affects=("distill",),
        least=0,
        most=1,
    )
    reset_l0_round: int = flag(
        120,
        "with --reset_l0 1: rounds of stage distill after which the first layer is re-initialized",
        affects=("distill",),
        scales=True,
        least=0,
    )
    bn: float = flag(10.0, "weight of the BN-statistics loss in synthesis", affects=BOTH, least=0)
    bn_mmt: float = flag(
        0.9,
        "momentum of the running average of batch statistics in the BN-statistics loss; 0: the batch alone",
        affects=BOTH,
        least=0,
        below=1,
    )
    oh: float = flag(0.4, "weight of the one-hot loss CE(T(x), y) in synthesis", affects=BOTH, least=0)
    adv: float = flag(
        1.1,
        "weight of the adversarial loss in stage distill: -KL where student and teacher predict the same class",
        affects=("distill",),
        least=0,
    )
    T: float = flag(20.0, "temperature of the distillation loss", affects=("distill",), above=0)


class Inversion:
    """Minimizes the synthesis loss of a batch and keeps its best images; holds the running average of BN statistics.

    Args:
        config: flags with ``g_steps``, ``bn``, ``bn_mmt`` and ``oh``.
        teacher: the teacher.
        task: see ``datafree.base.Task``.
        adv: weight of the adversarial loss.
    """

    def __init__(self, config: Any, teacher: nn.Module, task: Task, adv: float):
        self.config, self.teacher, self.task, self.adv = config, teacher, task, adv
        self.statistics = BNStatistics(teacher) if config.bn else None
        self.precision = task.precision.fresh()  # one for all batches, as g_steps are too few to find a loss scale
        self.average: list[Stats] = []
        self.blended: list[Stats] = []
        self.measure = self.losses

    def descend(
        self, generate: Callable[[], Tensor], optimizer: torch.optim.Optimizer, labels: Tensor, student: nn.Module
    ) -> ImageBatch:
        """Takes ``g_steps`` optimizer steps, then updates the running average once.

        Args:
            generate: function that returns images (B, 3, H, W) for the optimizer's current parameters.
            optimizer: optimizer of the parameters behind ``generate``.
            labels: wanted classes (B,).
            student: the student, for the adversarial loss.
        Returns:
            A copy of the images at the step of lowest total loss, with their losses.
        """
        best = LowestLoss()
        for _ in range(self.config.g_steps):
            with self.task.precision.autocast():
                images = generate().float()
            # The first round has no average, and compiling a version for this one round is not worthwhile.
            measure = self.measure if self.average or not self.statistics else self.losses
            losses = measure(self.task.random_view(images), labels, student)
            best.update(images, losses)
            self.precision.minimize(losses["loss"], optimizer)
        self.average = [(mean.detach(), var.detach()) for mean, var in self.blended]
        return ImageBatch(best.images, labels, best.scalars())

    def losses(self, images: Tensor, labels: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """Named synthesis losses of augmented images (B, 3, H, W); "loss" is their weighted sum."""
        with collected(self.statistics) as batch_stats, self.task.precision.autocast():
            logits = self.teacher(images)
        terms = {"loss_oh": (self.config.oh, one_hot_loss(logits, labels))}
        if self.statistics:
            self.blended = blend(batch_stats, self.average, self.config.bn_mmt)
            terms["loss_bn"] = self.config.bn, bn_loss(self.blended, self.statistics.running)
        if self.adv:
            with self.task.precision.autocast():
                student_logits = student(images)
            terms["loss_adv"] = self.adv, adversarial_loss(student_logits, logits, agreeing_only=True)
        return weighted_sum(terms)

    def state_dict(self) -> dict[str, Any]:
        """State of the running average and the loss scale."""
        return {"average": self.average, "precision": self.precision.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; other keys of ``state`` are ignored."""
        self.average = [(mean.to(self.task.device), var.to(self.task.device)) for mean, var in state["average"]]
        self.precision.load_state_dict(state.get("precision", {}))


def blend(batch: list[Stats], average: list[Stats], momentum: float) -> list[Stats]:
    """``momentum * average + (1 - momentum) * batch``, for every mean and variance; the batch alone if ``average`` is empty.

    The detached result is the next average.
    """
    if not average:
        return batch
    assert len(batch) == len(average)
    return [
        (torch.lerp(mean.float(), old_mean.float(), momentum), torch.lerp(var.float(), old_var.float(), momentum))
        for (mean, var), (old_mean, old_var) in zip(batch, average)
    ]


def fomaml_gradient(optimizer: torch.optim.Optimizer, adapted: list[nn.Parameter]) -> list[Tensor]:
    """Meta gradient of first-order MAML (Finn et al. 2017, arXiv 1703.03400).

    First-order MAML uses gradients at the adapted parameters as if they were gradients at the meta parameters.

    Args:
        optimizer: optimizer of the adaptation, before its first step.
        adapted: parameters of the optimizer.
    Returns:
        Tensors for the sums of the gradients of all steps. They are zero now, and every optimizer step adds its gradients.
    """
    sums = [torch.zeros_like(parameter) for parameter in adapted]
    optimizer.register_step_post_hook(lambda *_: torch._foreach_add_(sums, [parameter.grad for parameter in adapted]))
    return sums


def reptile_gradient(meta: list[nn.Parameter], adapted: list[nn.Parameter]) -> list[Tensor]:
    """Meta gradient of Reptile, meta minus adapted parameters (Nichol et al. 2018, arXiv 1803.02999)."""
    return [old.detach() - new.detach() for old, new in zip(meta, adapted, strict=True)]


def with_gradient(parameters: list[nn.Parameter], gradients: list[Tensor]) -> Tensor:
    """Scalar whose gradient with respect to ``parameters`` is ``gradients``; its value has no meaning."""
    return torch.stack([(p * g).sum() for p, g in zip(parameters, gradients, strict=True)]).sum()


class FastSynthesizer(Synthesizer):
    """Synthesizer with one adaptation of the meta generator and one meta step per round.

    Args:
        config: flags of Fast.
        teacher: the teacher.
        task: see ``datafree.base.Task``.
        warm_up: whether this is the warm-up, without adversarial loss and without re-initialization of the first layer.
    """

    independent = False

    def __init__(self, config: FastConfig, teacher: nn.Module, task: Task, *, warm_up: bool):
        self.config, self.task, self.warm_up = config, task, warm_up
        self.inversion = Inversion(config, teacher, task, 0.0 if warm_up else config.adv)
        self.generator = reset(Generator(config.nz, task.info.image_size)).to(task.device, memory_format=torch.channels_last)
        self.adapted = copy.deepcopy(self.generator)  # overwritten every round
        self.generate = self.adapted
        self.lr = config.lr_g * config.g_steps
        self.meta_optimizer = torch.optim.Adam(self.generator.parameters(), lr=self.lr, betas=BETAS, fused=True)
        self.meta_precision = task.precision.fresh()
        self.rounds = 0

    def compile_targets(self) -> list[CompileTarget]:
        return [
            CompileTarget(self, "generate", self.config.g_steps, "generator"),
            CompileTarget(self.inversion, "measure", self.config.g_steps, "synthesis losses"),
        ]

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Adapts a copy of the meta generator and takes one meta step; returns the best of the ``g_steps`` batches."""
        config, device = self.config, self.task.device
        if config.reset_l0 and not self.warm_up and self.rounds == config.reset_l0_round:
            reset(self.generator.project)
        meta, adapted = list(self.generator.parameters()), list(self.adapted.parameters())
        with torch.no_grad():
            torch._foreach_copy_(adapted, meta)
        z = torch.randn(config.synthesis_batch_size, config.nz, device=device, requires_grad=True)
        labels = balanced_labels(len(z), self.task.info.num_classes, device)
        groups = [{"params": adapted, "lr": config.lr_g}, {"params": [z], "lr": config.lr_z}]
        optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
        gradients = fomaml_gradient(optimizer, adapted) if config.is_maml else None
        batch = self.inversion.descend(lambda: self.generate(z), optimizer, labels, student)
        gradients = gradients or reptile_gradient(meta, adapted)
        self.meta_precision.minimize(with_gradient(meta, gradients), self.meta_optimizer)
        self.rounds += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """State of the meta generator, its optimizer, the running average, the loss scales and the number of rounds."""
        return {
            "warm_up": self.warm_up,
            "rounds": self.rounds,
            "generator": self.generator.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "meta_precision": self.meta_precision.state_dict(),
            **self.inversion.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; the number of rounds starts from 0 again after the warm-up."""
        with state_errors():
            self.rounds = state["rounds"] if state["warm_up"] == self.warm_up else 0
            self.generator.load_state_dict(state["generator"])
            self.meta_optimizer.load_state_dict(state["meta_optimizer"])
            self.meta_precision.load_state_dict(state.get("meta_precision", {}))
            self.inversion.load_state_dict(state)
        for group in self.meta_optimizer.param_groups:  # --init_bank may come from a run with another learning rate
            group["lr"] = self.lr


class Fast(Method):
    """Method with stages synthesize (warm-up, without the adversarial loss) and distill (rounds with it)."""

    Config = FastConfig
    defaults = {"epochs": 200, "kd_steps": 400, "batch_size": 256, "lr": 0.2}

    def stages(self) -> tuple[Stage, ...]:
        return self.from_initial_bank(self.config.init_rounds)

    def initial_synthesizer(self) -> FastSynthesizer:
        return FastSynthesizer(self.config, self.teacher, self.task, warm_up=True)

    def synthesizer(self) -> FastSynthesizer:
        return FastSynthesizer(self.config, self.teacher, self.task, warm_up=False)

    def objective(self) -> KLDistillation:
        return KLDistillation(self.config.T)
