"""DFAD: data-free adversarial distillation (Fang et al. 2019, arXiv 1912.11006).

The generator is trained to maximize the mean absolute difference between the logits of student and teacher. The student is
trained to minimize it.

    generator   - adv * mean |S(x) - T(x)|
    student     mean |S(x) - T(x)|

Published settings (CIFAR): 200 epochs of 400 student steps on 256 images, one generator step per 5 student steps; SGD lr .1,
Adam lr 1e-3.

Both learning rates fall. Later scripts of the field keep the generator's learning rate constant (``--lr_g_schedule
constant``). The generator can then change faster than the student, whose learning rate has fallen, can follow.

Deviations:
- The generator is the large one, as in the other streaming methods here. The authors' generator has 128 and 64 channels and
  ends in a BN layer.
- The authors' code lowers both learning rates by steps. Here they follow a cosine.
- In the authors' code the student's BN layers use batch statistics while the generator is trained, and the student's weight
  decay is 5e-4.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.losses import weighted_sum
from datafree.stream import DISTILL, GeneratorStream, StreamConfig, StreamingMethod, lr_schedule_flag
from engine.runtime.flags import flag


@dataclass(frozen=True)
class DFADConfig(StreamConfig):
    """Flags of DFAD."""

    T: float = flag(
        1.0, "temperature: student and teacher logits are divided by T before the L1 loss", affects=DISTILL, above=0
    )
    lr_g_schedule: str = lr_schedule_flag("student")
    adv: float = flag(
        1.0, "generator: weight of the adversarial loss, -mean |S(x) - T(x)| over the logits", affects=DISTILL, least=0
    )


def logit_distance(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Mean absolute difference of two batches of logits (B, C), divided by the temperature; scalar."""
    return F.l1_loss(student_logits.float(), teacher_logits.float()) / temperature


class DFADSynthesizer(GeneratorStream):
    """Generator trained to increase the difference between student and teacher logits."""

    def losses(self, images: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """The generator's loss, as defined in the module's docstring."""
        with self.task.precision.autocast():
            adv = -logit_distance(student(images), self.teacher(images), self.config.T)
        return weighted_sum({"loss_adv": (self.config.adv, adv)})


class LogitMatching(nn.Module):
    """Student loss: L1 distance between the logits of student and teacher."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """The dictionary {"loss", "l1"}, both the same scalar, of two outputs with logits (B, C)."""
        loss = logit_distance(student_out.logits, teacher_out.logits, self.temperature)
        return {"loss": loss, "l1": loss}


class DFAD(StreamingMethod):
    """Method with stage distill only."""

    Config = DFADConfig

    def synthesizer(self) -> DFADSynthesizer:
        return DFADSynthesizer(self.config, self.teacher, self.task)

    def objective(self) -> LogitMatching:
        return LogitMatching(self.config.T)
