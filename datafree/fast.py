"""Fast, or FM: a meta-learned generator that needs few steps a batch (Fang et al., AAAI 2022, arXiv 2112.06253).

"Up to 100x faster data-free knowledge distillation." Batches share what is common to all images, so a round does not start
from nothing: it starts from a meta generator, adapts a copy of it and new noise z to the batch within ``g_steps`` steps, and
then moves the meta generator to where adapting is easier.

    synthesis   bn * L_bn + oh * CE(T(x), y) - adv * KL(T(x) || S(x)), the last where S and T name the same class
    L_bn        sum over layers of ||m * avg + (1 - m) * batch - running||_2, means and variances each, m = bn_mmt: the bank
                as a whole, not one batch, should have the statistics of the training data
    average     avg <- m * avg + (1 - m) * batch once a round, batch the one of the last step; first batch: avg <- batch
    FOMAML      meta gradient = sum of the loss's gradients over the steps of the adaptation (--is_maml 1)
    Reptile     meta gradient = meta parameters - adapted parameters (--is_maml 0)
    meta step   Adam of lr g_steps * lr_g along it, betas (.5, .999), as of the Adam of the adaptation

The first ``init_rounds`` rounds are a warm-up without competition, stage synthesize; meta generator, its optimizer and the
average go on from there. The student learns from all images so far by KL at temperature T.

Published settings (CIFAR): 20 rounds of warm-up, 200 of 400 student steps on batches of 256; SGD lr .2, T 20; 256 images
a round; bn 10, bn_mmt .9; adv 1.1, oh .4 (teacher resnet34: 1.33, .5; vgg11: 1.0, .5); the generator's first layer drawn
anew once, 120 rounds after warm-up; FOMAML. Fast-2, -5 and -10 have g_steps 2, 5, 10, lr_g 5e-3, 3e-3, 2e-3, lr_z .015,
.01, .01.

Deviations: labels are drawn class-balanced, not independently, and generators start from N(0, .02). The images kept are a
copy of the batch with the lowest loss. The first layer is the linear one; the script also redraws the scale of the BN
after it, and counts one round less. The meta optimizer's state stays at that reset, as in the script. The last round of
warm-up does not compete with the untrained student, as it does in the script. The script takes Reptile's gradient 67 times;
Adam's step does not depend on its length. The learning rate falls to 0, not 2e-4. As in the script generators always
normalize by their batch, so the running statistics of their BN layers, which only the adapted copy gathers, are of no account.

FOMAML by the book takes the gradient at the adapted parameters alone. The published script, and so its numbers, sum those
of all steps, which is first-order MAML of the sum of the steps' losses; so does this file. The last gradient alone fails:
warm-up against a resnet20 of CIFAR-10 (64 images a round, one seed) took the synthesis loss of Fast-10 from 28 to 136 in
14 rounds, the sum to 26, with 100 against 30 % of the last images classified as wanted; Fast-2 from 88 to 84 and 57 in 20
rounds.

Left out: the published variants for ImageNet and for segmentation, which have other networks and losses.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datafree.base import ImageBatch, LowestLoss, Method, Synthesizer, Task, balanced_labels, own_state
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
from engine.runtime.compilation import Hot
from engine.runtime.flags import flag

BOTH = ("synthesize", "distill")
BETAS = (0.5, 0.999)


@dataclass(frozen=True)
class FastConfig:
    """Flags of Fast; the defaults are Fast-10."""

    init_rounds: int = flag(
        20, "rounds of warm-up, without competition", affects=("synthesize",), scales=True, least=1, most=1_000_000
    )
    g_steps: int = flag(10, "steps that adapt the generator to a round's images", affects=BOTH, least=1)
    synthesis_batch_size: int = flag(256, "images a round", affects=BOTH, least=1, most=1_000_000)
    lr_g: float = flag(
        2e-3, "Adam learning rate of the adapted generator; the meta generator's is g_steps times it", affects=BOTH, above=0
    )
    lr_z: float = flag(0.01, "Adam learning rate of the noise", affects=BOTH, above=0)
    nz: int = flag(256, "length of the generator's noise vector", affects=BOTH, least=1)
    is_maml: int = flag(1, "meta gradient: 1 FOMAML, 0 Reptile", affects=BOTH, least=0, most=1)
    reset_l0: int = flag(
        1, "1: draw the meta generator's first layer anew once, 0: never", affects=("distill",), least=0, most=1
    )
    reset_l0_round: int = flag(
        120, "rounds after warm-up before which that is done", affects=("distill",), scales=True, least=0
    )
    bn: float = flag(10.0, "weight of the BN-statistics loss", affects=BOTH, least=0)
    bn_mmt: float = flag(
        0.9, "share of earlier rounds' batch statistics in the BN-statistics loss", affects=BOTH, least=0, below=1
    )
    oh: float = flag(0.4, "weight of the one-hot loss", affects=BOTH, least=0)
    adv: float = flag(1.1, "weight of the competition with the student (warm-up has 0)", affects=("distill",), least=0)
    T: float = flag(20.0, "temperature of the distillation loss", affects=("distill",), above=0)


class Inversion:
    """Takes a batch down the synthesis loss and keeps the best of it; knows the BN statistics of the batches before.

    Args:
        config: with ``g_steps``, ``bn``, ``bn_mmt``, ``oh``.
        adv: weight of the competition with the student.
    """

    def __init__(self, config: Any, teacher: nn.Module, task: Task, adv: float):
        self.config, self.teacher, self.task, self.adv = config, teacher, task, adv
        self.statistics = BNStatistics(teacher) if config.bn else None
        self.precision = task.precision.fresh()  # of all batches: g_steps are too few to find a scale in
        self.average: list[Stats] = []
        self.blended: list[Stats] = []
        self.measure = self.losses

    def descend(
        self, generate: Callable[[], Tensor], optimizer: torch.optim.Optimizer, labels: Tensor, student: nn.Module
    ) -> ImageBatch:
        """``g_steps`` optimizer steps, then one of the running average.

        Args:
            generate: the images (B, 3, H, W) of the optimizer's parameters as they are now.
            labels: (B,).
        Returns:
            A copy of the images of lowest total loss, with their losses.
        """
        best = LowestLoss()
        for _ in range(self.config.g_steps):
            with self.task.precision.autocast():
                images = generate().float()
            # The first round, which has no average, is not worth a compilation of its own.
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
        """The running average and the loss scale."""
        return {"average": self.average, "precision": self.precision.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what another instance had; more in ``state`` than that is passed over."""
        self.average = [(mean.to(self.task.device), var.to(self.task.device)) for mean, var in state["average"]]
        self.precision.load_state_dict(state.get("precision", {}))


def blend(batch: list[Stats], average: list[Stats], momentum: float) -> list[Stats]:
    """``momentum * average + (1 - momentum) * batch``, of every mean and variance.

    Detached, it is the next average. Before the first one (``average`` empty) it is the batch alone.
    """
    if not average:
        return batch
    assert len(batch) == len(average)
    return [
        (torch.lerp(mean.float(), old_mean.float(), momentum), torch.lerp(var.float(), old_var.float(), momentum))
        for (mean, var), (old_mean, old_var) in zip(batch, average)
    ]


def fomaml_gradient(optimizer: torch.optim.Optimizer, adapted: list[nn.Parameter]) -> list[Tensor]:
    """First-order MAML (Finn et al. 2017, arXiv 1703.03400): gradients at adapted parameters, taken for those at meta ones.

    Args:
        optimizer: of the adaptation, before its first step.
        adapted: parameters of it.
    Returns:
        The sums of the gradients of all steps: zero now, and grown by each step that the optimizer takes.
    """
    sums = [torch.zeros_like(parameter) for parameter in adapted]
    optimizer.register_step_post_hook(lambda *_: torch._foreach_add_(sums, [parameter.grad for parameter in adapted]))
    return sums


def reptile_gradient(meta: list[nn.Parameter], adapted: list[nn.Parameter]) -> list[Tensor]:
    """Reptile (Nichol et al. 2018, arXiv 1803.02999): down this gradient the meta parameters go towards the adapted ones."""
    return [old.detach() - new.detach() for old, new in zip(meta, adapted, strict=True)]


def with_gradient(parameters: list[nn.Parameter], gradients: list[Tensor]) -> Tensor:
    """A scalar whose gradient with respect to ``parameters`` is ``gradients``; its value means nothing."""
    return torch.stack([(p * g).sum() for p, g in zip(parameters, gradients, strict=True)]).sum()


class FastSynthesizer(Synthesizer):
    """One adaptation of the meta generator and one meta step a round.

    Args:
        warm_up: no competition; rounds are counted from the end of warm-up.
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

    def hot(self) -> list[Hot]:
        return [
            Hot(self, "generate", self.config.g_steps, "generator"),
            Hot(self.inversion, "measure", self.config.g_steps, "synthesis losses"),
        ]

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """The best of ``g_steps`` batches of an adapted copy; the meta generator moves once."""
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
        """Meta generator, its optimizer, the running average, loss scales and the count of rounds."""
        return {
            "warm_up": self.warm_up,
            "rounds": self.rounds,
            "generator": self.generator.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "meta_precision": self.meta_precision.state_dict(),
            **self.inversion.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes ``state_dict``; after warm-up the count begins again."""
        with own_state():
            self.rounds = state["rounds"] if state["warm_up"] == self.warm_up else 0
            self.generator.load_state_dict(state["generator"])
            self.meta_optimizer.load_state_dict(state["meta_optimizer"])
            self.meta_precision.load_state_dict(state.get("meta_precision", {}))
            self.inversion.load_state_dict(state)
        for group in self.meta_optimizer.param_groups:  # --init_bank of a run with another learning rate
            group["lr"] = self.lr


class Fast(Method):
    """Stages synthesize (warm-up, without competition) and distill (rounds with it)."""

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
