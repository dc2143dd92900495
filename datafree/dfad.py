"""DFAD: data-free adversarial distillation (Fang et al. 2019, arXiv 1912.11006).

Generator and student play for the mean absolute difference of their logits: the one makes it large, the other small.

    generator   - adv * mean |S(x) - T(x)|
    student     mean |S(x) - T(x)|

Published settings (CIFAR): 200 epochs of 400 student steps of 256 images, a generator step every 5; SGD lr .1, Adam lr 1e-3.

Both learning rates fall: a generator that keeps its own (``--lr_g_schedule constant``, as in later scripts of the field) can
run away from a student that can no longer follow.

Deviations: the large generator, as the other streaming methods here; the authors' has 128 and 64 channels and ends in a BN
layer. Their code lowers both rates by steps, here they fall as a cosine. There, the student normalizes by the batch while
the generator learns, and its weight decay is 5e-4.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.losses import weighted_sum
from datafree.stream import DISTILL, GeneratorStream, StreamConfig, StreamingMethod, rate_flag
from engine.runtime.flags import flag


@dataclass(frozen=True)
class DFADConfig(StreamConfig):
    """Flags of DFAD."""

    T: float = flag(1.0, "logits of both are divided by T before they are compared", affects=DISTILL, above=0)
    lr_g_schedule: str = rate_flag("student")
    adv: float = flag(1.0, "weight of the adversarial loss, - mean |S - T|", affects=DISTILL, least=0)


def logit_distance(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Mean absolute difference of logits (B, C) over samples and classes, divided by the temperature."""
    return F.l1_loss(student_logits.float(), teacher_logits.float()) / temperature


class DFADSynthesizer(GeneratorStream):
    """A generator that drives the logits apart."""

    def losses(self, images: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """See the module's first lines."""
        with self.task.precision.autocast():
            adv = -logit_distance(student(images), self.teacher(images), self.config.T)
        return weighted_sum({"loss_adv": (self.config.adv, adv)})


class LogitMatching(nn.Module):
    """The student's side of the game."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """Outputs with logits (B, C) -> {"loss", "l1"}."""
        loss = logit_distance(student_out.logits, teacher_out.logits, self.temperature)
        return {"loss": loss, "l1": loss}


class DFAD(StreamingMethod):
    """Stage distill only."""

    Config = DFADConfig

    def synthesizer(self) -> DFADSynthesizer:
        return DFADSynthesizer(self.config, self.teacher, self.task)

    def objective(self) -> LogitMatching:
        return LogitMatching(self.config.T)
