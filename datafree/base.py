"""What a method is made of. A new method is one file with these pieces, one line in ``registry.py``, its scripts and a test.

Config        frozen dataclass of the method's flags (``engine.flags.flag``)
Synthesizer   makes images from the teacher (and the student), one round a call
Objective     nn.Module: (teacher_out, student_out, labels) -> {"loss": ..., every named term}
Augmenter     optional: varies bank images (``datafree.diffusion.prior``)
Method        says which stages there are and builds the pieces
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass
class ImageBatch:
    """images (B, 3, H, W) float32 in [0, 1]; labels (B,) int64; scalars are named figures to log, () tensors."""

    images: Tensor
    labels: Tensor
    scalars: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What a method may know of its surroundings; it never sees the command line and never picks a device.

    ``augment`` maps images (B, 3, H, W) to randomly cropped and flipped ones, one draw an image, differentiably.
    ``precision`` has ``autocast()``, the context in which networks run, and ``minimize(loss, optimizer)``.
    """

    num_classes: int
    image_size: int
    device: torch.device
    augment: Callable[[Tensor], Tensor]
    precision: Any
    class_names: tuple[str, ...] | None = None
    flip: bool = False


class Synthesizer:
    """Makes the images of one round. It computes: no files, no loaders, no device choice."""

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """One round of synthesis against the teacher and, where the method competes, the student in eval mode."""
        raise NotImplementedError

    def after_step(self, student: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Called after every student step with the images it saw. Default: nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Whatever the next round depends on; tensors and plain values only. Default: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes ``state_dict``."""


class Method:
    """One row of ``registry.METHODS``: the stages of a run and the pieces that they use.

    Class attributes:
        Config: the frozen dataclass of flags.
        stages: in order; of "synthesize", "augment", "distill".
        defaults: common flags whose default this method changes, as {"epochs": 200}.
        external_priors: {stage: id of a pretrained model besides the teacher that it uses}; an instance may set its own.

    Fields of Config that the stages read: ``init_rounds`` (synthesize), ``synthesis_batch_size`` (distill, with a bank),
    ``variants``, ``diffusion_batch_size`` (augment).
    """

    Config: ClassVar[type]
    stages: ClassVar[tuple[str, ...]] = ("synthesize", "distill")
    defaults: ClassVar[dict[str, Any]] = {}
    external_priors: dict[str, str] = {}

    def __init__(self, config: Any, teacher: nn.Module, student: nn.Module, task: Task):
        self.config, self.teacher, self.student, self.task = config, teacher, student, task

    def initial_synthesizer(self) -> Synthesizer:
        """For stage synthesize: makes the image bank that distillation starts from, without a student."""
        raise NotImplementedError

    def synthesizer(self) -> Synthesizer:
        """For the rounds of stage distill."""
        raise NotImplementedError

    def objective(self) -> nn.Module:
        """The student's loss. Its own parameters are trained with the student's."""
        raise NotImplementedError

    def augmenter(self):
        """For stage augment: a ``datafree.diffusion.prior.Augmenter``."""
        raise NotImplementedError

    def embedding(self) -> Callable[[Tensor], Tensor]:
        """For the filter of stage augment: images (B, 3, H, W) in [0, 1] to embeddings (B, D).

        Beside it stands ``embedding_name``, for the file of the cosines; ``config.omega`` is the least cosine that stays.
        """
        raise NotImplementedError


def balanced_labels(count: int, num_classes: int, device: torch.device) -> Tensor:
    """(count,) class ids in random order, each class as often as the others up to one."""
    order = torch.randperm(num_classes, device=device)
    labels = order.repeat(-(-count // num_classes))[:count]
    return labels[torch.randperm(count, device=device)]
