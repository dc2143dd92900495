"""ZSKT: zero-shot knowledge transfer via adversarial belief matching (Micaelli & Storkey, NeurIPS 2019, arXiv 1905.09768).

A generator looks for images on which student and teacher disagree; the student learns to agree, in its last layer and in
where its feature maps are active.

    generator   - adv * KL_T
    student     KL_T + attention * sum over sizes of mean (a_S - a_T)^2,   a = sum_c map_c^2 over its 2-norm (B, h * w)

Published settings (CIFAR): 200 epochs of 400 student steps of 256 images, a generator step every 5; noise of 256, the large
generator; SGD lr .1, Adam lr 1e-3, T 1 (see ``datafree.stream``), adv 1.

The game needs many rounds, and must end in a draw: the generator's learning rate falls as the student's does, as in the paper.
A generator that keeps its rate, as in the script (``--lr_g_schedule constant``), can run away from a student that can no
longer follow.

Deviations: the published script of these settings has no attention term; the paper has, with weight 250, and so has this
(``--attention 0`` is the script). Maps are matched at every size that both networks have, the last map of that size, not at
layers named by hand, so that any pair of networks will do. The authors' own code differs further:
- Its KL is divided by the number of classes, which makes 250 that many times as much.
- Both networks learn by Adam, with gradients of norm at most 5.
- The student takes ten steps on one batch, and normalizes by that batch while the generator learns. 80,000 batches make
  800,000 student steps.
- The generator is smaller (noise of 100) and ends in a BN layer.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.losses import adversarial_loss, kd_loss, weighted_sum
from datafree.stream import DISTILL, GeneratorStream, StreamConfig, StreamingMethod, rate_flag
from engine.runtime.errors import UserError
from engine.runtime.flags import flag


@dataclass(frozen=True)
class ZSKTConfig(StreamConfig):
    """Flags of ZSKT."""

    lr_g_schedule: str = rate_flag("student")
    adv: float = flag(1.0, "weight of the adversarial loss, -KL at temperature T", affects=DISTILL, least=0)
    attention: float = flag(250.0, "weight of the student's attention matching", affects=DISTILL, least=0)


class ZSKTSynthesizer(GeneratorStream):
    """A generator against the student."""

    def losses(self, images: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """See the module's first lines."""
        with self.task.precision.autocast():
            adv = adversarial_loss(student(images), self.teacher(images), self.config.T)
        return weighted_sum({"loss_adv": (self.config.adv, adv)})


def attention(feature_map: Tensor) -> Tensor:
    """Where a map (B, C, h, w) is active: (B, h * w), each row of 2-norm 1 (Zagoruyko & Komodakis, arXiv 1612.03928)."""
    return F.normalize(feature_map.float().pow(2).mean(1).flatten(1), dim=1)


def attention_loss(student_maps: dict[tuple[int, int], Tensor], teacher_maps: dict[tuple[int, int], Tensor]) -> Tensor:
    """Sum over the sizes that both have of the mean squared difference of their attention; channels may differ."""
    sizes = [size for size in teacher_maps if size in student_maps]
    return sum((attention(student_maps[size]) - attention(teacher_maps[size])).pow(2).mean() for size in sizes)


class BeliefMatching(nn.Module):
    """KL and attention matching."""

    def __init__(self, temperature: float, weight: float):
        super().__init__()
        self.temperature, self.weight = temperature, weight

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """Outputs with logits and feature maps -> named scalar losses."""
        losses = {"kd": kd_loss(student_out.logits, teacher_out.logits, self.temperature)}
        losses["loss"] = losses["kd"]
        if self.weight:
            losses["attention"] = attention_loss(student_out.feature_maps, teacher_out.feature_maps)
            losses["loss"] = losses["loss"] + self.weight * losses["attention"]
        return losses


class ZSKT(StreamingMethod):
    """Stage distill only."""

    Config = ZSKTConfig

    def synthesizer(self) -> ZSKTSynthesizer:
        return ZSKTSynthesizer(self.config, self.teacher, self.task)

    def objective(self) -> BeliefMatching:
        sizes = [{shape[1:] for shape in network.feature_map_shapes} for network in (self.teacher, self.student)]
        if self.config.attention and not set.intersection(*sizes):
            raise UserError("teacher and student have no feature maps of one size to match; give --attention 0")
        return BeliefMatching(self.config.T, self.config.attention)
