"""DFQ: data-free network quantization with adversarial knowledge distillation (Choi et al., CVPRW 2020, arXiv 2005.04136).

This file implements the paper's distillation, not its quantization. A generator's images should be hard for the student and
match the teacher's BN statistics. The teacher should classify each of them with confidence, and all classes should occur
equally often.

    generator   - adv * KL + bn * L_bn + oh * CE(T(x), argmax T(x)) + balance * sum p log p
    p           mean class probabilities of the batch
    student     KL_T

Published settings (CIFAR): 200 epochs of 400 student steps on 256 images, one generator step per 10 student steps; SGD lr
.1, Adam lr 1e-3, T 1 (see ``datafree.stream``); adv 1, bn 1, oh 1, balance 20.

Deviations:
- The paper trains several generators and warms one up first. Here there is one generator without warm-up, as in the later
  scripts of the field, from which the published settings come.
- The generator is that of the other streaming methods here, with noise vectors of length 256.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from datafree.base import Task
from datafree.losses import BNStatistics, adversarial_loss, balance_loss, bn_loss, collected, one_hot_loss, weighted_sum
from datafree.stream import DISTILL, GeneratorStream, StreamConfig, StreamingMethod
from engine.runtime.flags import flag


@dataclass(frozen=True)
class DFQConfig(StreamConfig):
    """Flags of DFQ."""

    adv: float = flag(1.0, "generator: weight of the adversarial loss, -KL at temperature 1", affects=DISTILL, least=0)
    bn: float = flag(1.0, "generator: weight of the BN-statistics loss", affects=DISTILL, least=0)
    oh: float = flag(1.0, "generator: weight of the one-hot loss CE(T(x), argmax T(x))", affects=DISTILL, least=0)
    balance: float = flag(
        20.0,
        "generator: weight of the class-balance loss sum p log p, p the batch's mean class probabilities",
        affects=DISTILL,
        least=0,
    )


class DFQSynthesizer(GeneratorStream):
    """Generator trained against the student, with the teacher's BN statistics as a constraint."""

    def __init__(self, config: DFQConfig, teacher: nn.Module, task: Task):
        super().__init__(config, teacher, task)
        self.statistics = BNStatistics(teacher) if config.bn else None

    def losses(self, images: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """The generator's losses, as defined in the module's docstring; "loss" is their weighted sum."""
        config = self.config
        with collected(self.statistics) as batch_stats, self.task.precision.autocast():
            logits = self.teacher(images)
            student_logits = student(images)
        terms = {
            "loss_adv": (config.adv, adversarial_loss(student_logits, logits)),
            "loss_oh": (config.oh, one_hot_loss(logits, logits.argmax(1))),
            "loss_balance": (config.balance, balance_loss(logits)),
        }
        if self.statistics:
            terms["loss_bn"] = config.bn, bn_loss(batch_stats, self.statistics.running)
        return weighted_sum(terms)


class DFQ(StreamingMethod):
    """Method with stage distill only."""

    Config = DFQConfig
    defaults = StreamingMethod.defaults | {"kd_steps": 10}

    def synthesizer(self) -> DFQSynthesizer:
        return DFQSynthesizer(self.config, self.teacher, self.task)
