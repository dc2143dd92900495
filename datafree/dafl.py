"""DAFL: data-free learning of student networks (Chen et al., ICCV 2019, arXiv 1904.01186).

A generator is trained against the teacher alone: each image should be of one class without doubt, excite the teacher's
features, and all classes should come up equally often.

    generator   oh * CE(T(x), argmax T(x)) - act * mean |f_T(x)| + balance * sum p log p,   p the batch's mean probabilities
    student     KL_T

Published settings (CIFAR): 200 epochs of 400 student steps of 256 images, a generator step every 5; noise of 512, the large
generator; SGD lr .1, Adam lr 1e-3, T 1 (see ``datafree.stream``), oh 1, act .001, balance 20.

Deviations: paper and first script train generator and student on the same batch, step by step; as in the later scripts of
the field, whose settings these are, they take turns. The activation is the mean over features, not the sum's 1-norm.
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
    oh: float = flag(1.0, "weight of the one-hot loss, to the teacher's own argmax", affects=DISTILL, least=0)
    act: float = flag(0.001, "weight of the activation loss, - mean |f_T|", affects=DISTILL, least=0)
    balance: float = flag(20.0, "weight of the class-balance loss, sum p log p", affects=DISTILL, least=0)


class DAFLSynthesizer(GeneratorStream):
    """A generator that knows the teacher only."""

    def losses(self, images: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """See the module's first lines."""
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
    """Minus the mean absolute value of the teacher's features (B, D): real images excite them."""
    return -features.float().abs().mean()


class DAFL(StreamingMethod):
    """Stage distill only."""

    Config = DAFLConfig

    def synthesizer(self) -> DAFLSynthesizer:
        return DAFLSynthesizer(self.config, self.teacher, self.task)
