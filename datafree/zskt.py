"""ZSKT: zero-shot knowledge transfer via adversarial belief matching (Micaelli & Storkey, NeurIPS 2019, arXiv 1905.09768).

A generator is trained to make images on which student and teacher disagree. The student learns to match the teacher's
outputs and the spatial attention of its feature maps.

    generator   - adv * KL_T
    student     KL_T + attention * sum over sizes of mean (a_S - a_T)^2,   a = sum_c map_c^2 over its 2-norm (B, h * w)

Published settings (CIFAR): 200 epochs of 400 student steps on 256 images, one generator step per 5 student steps; noise
vectors of length 256, the large generator; SGD lr .1, Adam lr 1e-3, T 1 (see ``datafree.stream``), adv 1.

The training needs many rounds. The generator's learning rate falls in proportion to the student's, as in the paper. The
script keeps the generator's learning rate constant (``--lr_g_schedule constant``). The generator can then change faster than
the student, whose learning rate has fallen, can follow.

Deviations:
- The published script with these settings has no attention term. The paper has one with weight 250, which is the default
  here (``--attention 0`` is the script).
- Attention is matched at every map size that both networks have, between their last maps of that size. The paper matches
  layers chosen by hand. The rule used here works for any pair of networks.

The authors' own code differs further:
- Its KL is divided by the number of classes, which raises the relative weight of the attention term by that factor.
- Both networks are trained by Adam, with gradients clipped to norm 5.
- The student takes ten steps on each batch, and its BN layers use batch statistics while the generator is trained. Its
  80,000 batches make 800,000 student steps.
- The generator is smaller (noise vectors of length 100) and ends in a BN layer.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.losses import adversarial_loss, kd_loss, weighted_sum
from datafree.stream import DISTILL, GeneratorStream, StreamConfig, StreamingMethod, lr_schedule_flag
from engine.runtime.errors import UserError
from engine.runtime.flags import flag


@dataclass(frozen=True)
class ZSKTConfig(StreamConfig):
    """Flags of ZSKT."""

    lr_g_schedule: str = lr_schedule_flag("student")
    adv: float = flag(1.0, "generator: weight of the adversarial loss, -KL at temperature T", affects=DISTILL, least=0)
    attention: float = flag(
        250.0, "weight of the attention loss between student and teacher feature maps", affects=DISTILL, least=0
    )


class ZSKTSynthesizer(GeneratorStream):
    """Generator trained against the student."""

    def losses(self, images: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """The generator's loss, as defined in the module's docstring."""
        with self.task.precision.autocast():
            adv = adversarial_loss(student(images), self.teacher(images), self.config.T)
        return weighted_sum({"loss_adv": (self.config.adv, adv)})


def attention(feature_map: Tensor) -> Tensor:
    """Spatial attention (B, h * w) of a map (B, C, h, w), rows of 2-norm 1 (Zagoruyko & Komodakis, arXiv 1612.03928)."""
    return F.normalize(feature_map.float().pow(2).mean(1).flatten(1), dim=1)


def attention_loss(student_maps: dict[tuple[int, int], Tensor], teacher_maps: dict[tuple[int, int], Tensor]) -> Tensor:
    """Mean squared difference of attention, summed over the map sizes that both networks have; channel counts may differ."""
    sizes = [size for size in teacher_maps if size in student_maps]
    return sum((attention(student_maps[size]) - attention(teacher_maps[size])).pow(2).mean() for size in sizes)


class BeliefMatching(nn.Module):
    """Student loss: KL at temperature T and attention matching."""

    def __init__(self, temperature: float, weight: float):
        super().__init__()
        self.temperature, self.weight = temperature, weight

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """Named scalar losses of two outputs with logits (B, C) and feature maps."""
        losses = {"kd": kd_loss(student_out.logits, teacher_out.logits, self.temperature)}
        losses["loss"] = losses["kd"]
        if self.weight:
            losses["attention"] = attention_loss(student_out.feature_maps, teacher_out.feature_maps)
            losses["loss"] = losses["loss"] + self.weight * losses["attention"]
        return losses


class ZSKT(StreamingMethod):
    """Method with stage distill only."""

    Config = ZSKTConfig

    def synthesizer(self) -> ZSKTSynthesizer:
        return ZSKTSynthesizer(self.config, self.teacher, self.task)

    def objective(self) -> BeliefMatching:
        sizes = [{shape[1:] for shape in network.feature_map_shapes} for network in (self.teacher, self.student)]
        if self.config.attention and not set.intersection(*sizes):
            raise UserError(
                "the attention loss needs feature maps of the same size in teacher and student, and there are none; give "
                "--attention 0"
            )
        return BeliefMatching(self.config.T, self.config.attention)
