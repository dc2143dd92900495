"""ADI: adaptive DeepInversion, images that the student gets wrong (Yin et al., CVPR 2020, arXiv 1912.08795).

DeepInversion (``datafree.deepinv``) and two terms that look at the student of the moment, so that each round adds to the
bank what the earlier ones lack.

    synthesis   DeepInversion's + adv * (1 - JS(softmax(S / 3), softmax(T / 3))) - student_bn * L_bn(student)
    JS(p, q)    mean_b 1/2 sum_c p log(p / m) + q log(q / m),   p and q clamped to [.01, .99], m = (p + q) / 2

The clamp bounds the game: a probability below 1 % or above 99 % has no gradient, so nothing is gained by making the
student surer of its mistake than that. The second term, of the published settings and not of the paper, asks for images
that do not have the statistics of what the student has seen. In the first rounds the student is random and answers almost
alike to all images: JS is then as good as the teacher's confidence, which the one-hot loss asks for too, so nothing is
warmed up.

Published settings (CIFAR): DeepInversion's with adv 1, student_bn .001.

Deviations: DeepInversion's. m is the mean of the clamped probabilities, so that JS >= 0 with 0 iff they agree; the
published code clamps the mean as well. That code's two divergences are KL(m || p), KL(m || q), the reverse of Jensen and
Shannon's; here they are the paper's.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.base import Task
from datafree.bn_statistics import BNStatistics, bn_loss, collected, layers_with_statistics
from datafree.deepinv import DISTILL, DeepInversion, DeepInversionConfig, DeepInversionSynthesizer
from datafree.losses import Terms
from engine.runtime.errors import UserError
from engine.runtime.flags import flag

TAU = 3.0


@dataclass(frozen=True)
class ADIConfig(DeepInversionConfig):
    """Flags of ADI: DeepInversion's, and those of the competition."""

    adv: float = flag(1.0, "weight of the competition, 1 - JS(student, teacher) at temperature 3", stages=DISTILL)
    student_bn: float = flag(
        1e-3, "weight of the images' distance from the student's own BN statistics, which is to grow", stages=DISTILL
    )


def competition_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``1 - JS`` of softened, clamped probabilities, batch mean.

    Args:
        student_logits, teacher_logits: (B, C).
    Returns:
        Scalar <= 1; 1 iff the clamped probabilities agree.
    """
    p, q = (F.softmax(logits.float() / TAU, dim=1).clamp(0.01, 0.99) for logits in (student_logits, teacher_logits))
    log_m = ((p + q) / 2).log()
    divergence = (p * (p.log() - log_m) + q * (q.log() - log_m)).sum(1) / 2
    return 1 - divergence.mean()


class ADISynthesizer(DeepInversionSynthesizer):
    """DeepInversion in competition with the student."""

    def __init__(self, config: ADIConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, task)
        self.student_statistics = BNStatistics(student) if config.student_bn else None

    def student_terms(self, images: Tensor, teacher_logits: Tensor, student: nn.Module) -> Terms:
        """Low where the student disagrees with the teacher, and where images are unlike those that it was trained on."""
        config = self.config
        if not config.adv and not config.student_bn:
            return {}
        with collected(self.student_statistics) as batch_stats, self.task.precision.autocast():
            logits = student(images)
        terms = {"loss_adv": (config.adv, competition_loss(logits, teacher_logits))}
        if self.student_statistics:
            terms["loss_student_bn"] = -config.student_bn, bn_loss(batch_stats, self.student_statistics.running)
        return terms


class ADI(DeepInversion):
    """Stage distill only, as DeepInversion."""

    Config = ADIConfig

    def __init__(self, config: ADIConfig, teacher: nn.Module, student: nn.Module, task: Task):
        super().__init__(config, teacher, student, task)
        if config.student_bn and not layers_with_statistics(student):
            raise UserError(f"the student {student.name} has no BatchNorm layer, hence no statistics; give --student_bn 0")

    def synthesizer(self) -> ADISynthesizer:
        return ADISynthesizer(self.config, self.teacher, self.student, self.task)
