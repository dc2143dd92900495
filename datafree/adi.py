"""ADI: adaptive DeepInversion, images that the student gets wrong (Yin et al., CVPR 2020, arXiv 1912.08795).

ADI is DeepInversion (``datafree.deepinv``) with two more loss terms, which depend on the current student. Each round thereby
adds images that the bank lacks so far.

    synthesis   DeepInversion's + adv * (1 - JS(softmax(S / 3), softmax(T / 3))) - bn * student_bn * L_bn(student)
    JS(P, Q)    mean_b 1/2 [KL(m || p) + KL(m || q)],   m, p, q = (P + Q) / 2, P, Q, each clamped to [.01, .99]

The clamp bounds the first term: JS is at most 1.62. The second term comes from a published script and is not in the paper.
It drives the images away from the BN statistics of the images that the student was trained on. In the first rounds the
student is random, and its outputs hardly depend on the image. JS then measures little more than the teacher's confidence,
which the one-hot loss rewards too. Both terms therefore need no warm-up.

Published settings (CIFAR): DeepInversion's with adv 1. Fast's script adds student_bn .001 inside the bn term (.01 in all)
and sets tv 0; these are the defaults here. The scripts of CMI and CSD have ``--tv 1e-3 --student_bn 0``.

Deviations: those of DeepInversion, and the direction of the divergences in JS. The paper writes the Jensen-Shannon
divergence, with KL(p || m) and KL(q || m). Its authors' code and all later scripts exchange the arguments of both. This file
follows the code, because the weight adv 1 was chosen for it: the gradient of the paper's formula is only .3 to .6 times as
long. JS is not clamped to [0, 1], as in some copies of that code: the clamp would stop the gradient where JS exceeds 1.
Clamping the mean m changes the length of the gradient little (factor .93 to 1.02).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import Task
from datafree.deepinv import DISTILL, DeepInversion, DeepInversionConfig, DeepInversionSynthesizer
from datafree.losses import BNStatistics, Terms, bn_loss, collected
from engine.runtime.errors import UserError
from engine.runtime.flags import flag
from models.classifier import layers_with_statistics

TAU = 3.0


@dataclass(frozen=True)
class ADIConfig(DeepInversionConfig):
    """Flags of ADI, those of DeepInversion included."""

    tv: float = flag(
        0.0,
        "weight of the total variation in synthesis: mean |x_p - x_q|, summed over four neighbour directions",
        affects=DISTILL,
        least=0,
    )
    adv: float = flag(
        1.0,
        "weight of the adversarial loss in synthesis, 1 - JS(student, teacher) at temperature 3",
        affects=DISTILL,
        least=0,
    )
    student_bn: float = flag(
        1e-3,
        "weight of the distance from the student's own BN statistics, which synthesis increases; multiplied by --bn",
        affects=DISTILL,
        least=0,
    )


def competition_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``1 - JS`` of softened, clamped probabilities, batch mean; the module's docstring defines JS.

    Args:
        student_logits, teacher_logits: (B, C).
    Returns:
        Scalar: 1 if the distributions agree, and smaller the more they differ.
    """
    p, q = (F.softmax(logits.float() / TAU, dim=1) for logits in (student_logits, teacher_logits))
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
    divergence = (m * (m.log() - (p.log() + q.log()) / 2)).sum(1)
    return 1 - divergence.mean()


class ADISynthesizer(DeepInversionSynthesizer):
    """DeepInversion with an adversarial loss against the student."""

    def __init__(self, config: ADIConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, task)
        self.student_statistics = BNStatistics(student) if config.bn and config.student_bn else None

    def student_terms(self, images: Tensor, teacher_logits: Tensor, student: nn.Module) -> Terms:
        """Terms that reward disagreement with the teacher and distance from the student's own BN statistics."""
        config = self.config
        if not config.adv and not self.student_statistics:
            return {}
        with collected(self.student_statistics) as batch_stats, self.task.precision.autocast():
            logits = student(images)
        terms = {"loss_adv": (config.adv, competition_loss(logits, teacher_logits))}
        if self.student_statistics:
            terms["loss_student_bn"] = -config.bn * config.student_bn, bn_loss(batch_stats, self.student_statistics.running)
        return terms


class ADI(DeepInversion):
    """Method with stage distill only, as DeepInversion."""

    Config = ADIConfig

    def __init__(self, config: ADIConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if config.bn and config.student_bn and not layers_with_statistics(student):
            raise UserError(
                f"the student {student.name} has no BatchNorm layer, so it has no statistics to match; give --student_bn 0"
            )

    def synthesizer(self) -> ADISynthesizer:
        return ADISynthesizer(self.config, self.teacher, self.student, self.task)
