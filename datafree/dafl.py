"""DAFL: data-free learning of student networks (Chen et al., ICCV 2019, arXiv 1904.01186).

A generator is trained with the teacher's outputs alone. The teacher should classify each image with confidence, its features
should have large values, and all classes should occur equally often.

    generator   oh * CE(T(x), argmax T(x)) - act * mean |f_T(x)| + balance * sum p log p,   p the batch's mean probabilities
    student     KL_T

Published settings (CIFAR): 200 epochs of 400 student steps on 256 images, one generator step per 5 student steps; noise
vectors of length 512, the large generator; SGD lr .1, Adam lr 1e-3, T 1 (see ``datafree.stream``); oh 1, act .001,
balance 20.

Deviations:
- The paper and its script train generator and student on the same batch in every step. Here they take turns, as in the later
  scripts of the field, from which the published settings come.
- The activation loss takes the mean of the absolute features, not their sum (the 1-norm).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from datafree.losses import balance_loss, one_hot_loss, weighted_sum
from datafree.stream import DISTILL, GeneratorStream, StreamConfig, StreamingMethod
from engine.runtime.flags import flag


@dataclass(frozen=True)
class DAFLConfig(StreamConfig):
    """Flags of DAFL."""

    nz: int = flag(512, "length of the generator's noise vector", affects=DISTILL, least=1)
    oh: float = flag(1.0, "generator: weight of the one-hot loss CE(T(x), argmax T(x))", affects=DISTILL, least=0)
    act: float = flag(
        0.001, "generator: weight of the activation loss -mean |f_T|, f_T the teacher's features", affects=DISTILL, least=0
    )
    balance: float = flag(
        20.0,
        "generator: weight of the class-balance loss sum p log p, p the batch's mean class probabilities",
        affects=DISTILL,
        least=0,
    )


class DAFLSynthesizer(GeneratorStream):
    """Generator trained with the teacher alone."""

    def losses(self, images: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """The generator's losses, as defined in the module's docstring; "loss" is their weighted sum."""
        with self.task.precision.autocast():
            logits, features, *_ = self.teacher(images, return_features=True)
        config = self.config
        return weighted_sum(
            {
                "loss_oh": (config.oh, one_hot_loss(logits, logits.argmax(1))),
                "loss_act": (config.act, activation_loss(features)),
                "loss_balance": (config.balance, balance_loss(logits)),
            }
        )


def activation_loss(features: Tensor) -> Tensor:
    """Minus the mean absolute value of the teacher's features (B, D), which real images make large."""
    return -features.float().abs().mean()


class DAFL(StreamingMethod):
    """Method with stage distill only."""

    Config = DAFLConfig

    def synthesizer(self) -> DAFLSynthesizer:
        return DAFLSynthesizer(self.config, self.teacher, self.task)
