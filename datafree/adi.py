"""ADI: adaptive DeepInversion, images that the student gets wrong (Yin et al., CVPR 2020, arXiv 1912.08795).

DeepInversion (``datafree.deepinv``) and two terms that look at the student of the moment, so that each round adds to the
bank what the earlier ones lack.

    synthesis   DeepInversion's + adv * (1 - JS(softmax(S / 3), softmax(T / 3))) - bn * student_bn * L_bn(student)
    JS(P, Q)    mean_b 1/2 [KL(m || p) + KL(m || q)],   m, p, q = (P + Q) / 2, P, Q, each clamped to [.01, .99]

The clamp bounds the game: JS is at most 1.62. The second term, of a published script and not of the paper, asks for images
that do not have the statistics of what the student has seen. In the first rounds the student is random and answers almost
alike to all images: JS is then as good as the teacher's confidence, which the one-hot loss asks for too, so nothing is
warmed up.

Published settings (CIFAR): DeepInversion's with adv 1. Fast's script adds student_bn .001 within the bn term (.01 in all) and
has tv 0: the defaults here. CMI's and CSD's have ``--tv 1e-3 --student_bn 0``.

Deviations: DeepInversion's. The paper writes Jensen and Shannon's divergence, with KL(p || m) and KL(q || m). Its authors'
code, and every script since, turns both around, and so does this file, for the weight 1 belongs to it: the paper's gradient
is .3 to .6 times as long. Clamping the mean makes no such difference (.93 to 1.02).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import Task
from datafree.deepinv import DISTILL, DeepInversion, DeepInversionConfig, DeepInversionSynthesizer
from datafree.losses import BNStatistics, Terms, bn_loss, collected, layers_with_statistics
from engine.runtime.errors import UserError
from engine.runtime.flags import flag

TAU = 3.0


@dataclass(frozen=True)
class ADIConfig(DeepInversionConfig):
    """Flags of ADI: DeepInversion's, and those of the competition."""

    tv: float = flag(0.0, "weight of the total variation, mean |x_p - x_q| over four neighbours", affects=DISTILL, least=0)
    adv: float = flag(1.0, "weight of the competition, 1 - JS(student, teacher) at temperature 3", affects=DISTILL, least=0)
    student_bn: float = flag(
        1e-3, "share of bn with which the distance from the student's own BN statistics is to grow", affects=DISTILL, least=0
    )


def competition_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``1 - JS`` of softened, clamped probabilities, batch mean; JS as in the module's docstring.

    Args:
        student_logits, teacher_logits: (B, C).
    Returns:
        Scalar; 1 where the distributions agree, less the more they differ.
    """
    p, q = (F.softmax(logits.float() / TAU, dim=1) for logits in (student_logits, teacher_logits))
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
    divergence = (m * (m.log() - (p.log() + q.log()) / 2)).sum(1)
    return 1 - divergence.mean()


class ADISynthesizer(DeepInversionSynthesizer):
    """DeepInversion in competition with the student."""

    def __init__(self, config: ADIConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, task)
        self.student_statistics = BNStatistics(student) if config.bn and config.student_bn else None

    def student_terms(self, images: Tensor, teacher_logits: Tensor, student: nn.Module) -> Terms:
        """Low where the student disagrees with the teacher, and where images are unlike those that it was trained on."""
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
    """Stage distill only, as DeepInversion."""

    Config = ADIConfig

    def __init__(self, config: ADIConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if config.bn and config.student_bn and not layers_with_statistics(student):
            raise UserError(f"the student {student.name} has no BatchNorm layer, hence no statistics; give --student_bn 0")

    def synthesizer(self) -> ADISynthesizer:
        return ADISynthesizer(self.config, self.teacher, self.student, self.task)
