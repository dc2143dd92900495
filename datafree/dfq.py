"""DFQ: data-free network quantization with adversarial knowledge distillation (Choi et al., CVPRW 2020, arXiv 2005.04136).

Here its distillation, not its quantization: a generator's images should be hard for the student, have the teacher's BN
statistics, be of one class without doubt, and of all classes equally often.

    generator   - adv * KL + bn * L_bn + oh * CE(T(x), argmax T(x)) + balance * sum p log p,   p the batch's mean probabilities
    student     KL_T

Published settings (CIFAR): 200 epochs of 400 student steps of 256 images, a generator step every 10; SGD lr .1, Adam lr 1e-3,
T 1 (see ``datafree.stream``), all weights 1 but balance 20.

Deviations: the paper plays against several generators and warms one up first; as in the later scripts of the field, whose
settings these are, there is one and no warm-up. Its size is that of the other streaming methods here (noise of 256).
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

    adv: float = flag(1.0, "weight of the adversarial loss, -KL at temperature 1", affects=DISTILL, least=0)
    bn: float = flag(1.0, "weight of the BN-statistics loss", affects=DISTILL, least=0)
    oh: float = flag(1.0, "weight of the one-hot loss, to the teacher's own argmax", affects=DISTILL, least=0)
    balance: float = flag(20.0, "weight of the class-balance loss, sum p log p", affects=DISTILL, least=0)


class DFQSynthesizer(GeneratorStream):
    """A generator that is held to the teacher's statistics while it competes."""

    def __init__(self, config: DFQConfig, teacher: nn.Module, task: Task):
        super().__init__(config, teacher, task)
        self.statistics = BNStatistics(teacher) if config.bn else None

    def losses(self, images: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """See the module's first lines."""
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
    """Stage distill only."""

    Config = DFQConfig
    defaults = StreamingMethod.defaults | {"kd_steps": 10}

    def synthesizer(self) -> DFQSynthesizer:
        return DFQSynthesizer(self.config, self.teacher, self.task)
