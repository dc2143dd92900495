"""Interface of a generative prior, and the choice of a class that all class-conditional priors share."""

from typing import Any

import torch
from torch import Tensor

from datafree.diffusion.hub import FLAG
from datafree.diffusion.sampling import Trajectory
from engine.runtime.errors import UserError

# Which class of a class-conditional prior a dataset class is drawn from; see ``ClassConditional``.
CLASSES = ("same", "own", "none")


class DiffusionPrior:
    """A pretrained model that turns noise into images of given classes.

    Attributes:
        external_prior: the model's name in the results table, ``"<model id>[@revision]"``.
        shape: shape (C, h, w) of a latent.
        own_rule: entry of ``sampling.RULES`` that fits the scheduler with which the model was published.
        guidance_scale: scale of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); at most 1: no guidance, at
            half the cost.
        device, dtype: device and dtype of the model; latents outside the model are float32.
        classes: one of ``CLASSES``. Only with "same" does the condition determine the dataset class of an image.
    """

    external_prior: str
    shape: tuple[int, int, int]
    own_rule: str
    guidance_scale: float
    device: torch.device
    dtype: torch.dtype
    classes: str = "same"

    def trajectory(self, steps: int) -> Trajectory:
        """The noise levels of a sampling with ``steps`` denoising steps."""
        raise NotImplementedError

    def condition(self, labels: Tensor, repeats: list[int]) -> Any:
        """The conditions that ``predict`` takes for labels (B,): a sequence of length B that can be sliced.

        Args:
            repeats: B numbers: how many images of its class came before each image. Prompt templates, or the prior's own
                classes, are used in turn by this number.
        """
        raise NotImplementedError

    def predict(self, latents: Tensor, time: Tensor, condition: Any) -> Tensor:
        """The model's output (B, C, h, w) for latents (B, C, h, w) at time (), with classifier-free guidance.

        The output has the dtype of the latents.
        """
        inputs = latents.to(self.dtype)
        if self.guidance_scale <= 1:
            return self._network(inputs, time, condition).to(latents.dtype)
        doubled = self._network(torch.cat([inputs, inputs]), time, self._with_null(condition)).to(latents.dtype)
        unconditional, conditional = doubled.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        """The images (B, 3, H, W) of clean latents (B, C, h, w), in the latents' dtype.

        Values are nominally in [0, 1] and not clamped.
        """
        raise NotImplementedError

    def checkpoint_gradients(self) -> None:
        """Turns on gradient checkpointing: activations are recomputed in the backward pass, which saves memory."""
        raise NotImplementedError

    def _network(self, latents: Tensor, time: Tensor, condition: Any) -> Tensor:
        raise NotImplementedError

    def _with_null(self, condition: Any) -> Any:
        """Conditions of twice the length: the null conditions, then the given ones."""
        raise NotImplementedError


class ClassConditional:
    """Mixin of class-conditional priors: the conditions are class ids of the prior.

    Args of ``take_classes``:
        known: number of class ids of the prior.
        null: class id of the null class, or None if the prior was not trained for classifier-free guidance.
        num_classes: number of classes of the dataset.
        class_map: the prior's class id for each label; None: the label itself.
        classes: "same": an image has the class that ``class_map`` gives for its label. "own": the images of every label have
            all classes of the prior in turn. "none": every image has the null class, without classifier-free guidance.
    Raises:
        UserError: a label has no class of the prior, or a choice needs a null class and there is none.
    """

    def take_classes(
        self, known: int, null: int | None, num_classes: int, class_map: tuple[int, ...] | None, classes: str = "same"
    ) -> None:
        assert classes in CLASSES, classes
        if class_map is not None and len(class_map) != num_classes:
            raise UserError(f"--class_map has {len(class_map)} ids, {num_classes} wanted: one for each class of the dataset")
        if class_map is not None and classes != "same":
            raise UserError(f"--class_map and --prior_classes {classes} contradict each other; leave one of them out")
        if classes == "none" and null is None:
            raise UserError(
                f"{FLAG} {self.external_prior} has no null class, which --prior_classes none needs; give --prior_classes "
                "own, or the id of the null class with --null_class"
            )
        self.classes, self.num_classes = classes, num_classes
        if classes == "same":
            ids = class_map or tuple(range(num_classes))
        else:
            ids = tuple(c for c in range(known) if c != null) if classes == "own" else (null,)
            self.guidance_scale = self.guidance_scale if classes == "own" else min(1.0, self.guidance_scale)
        if classes == "same" and (wrong := [c for c in ids if not 0 <= c < known]):
            raise UserError(
                f"{FLAG} {self.external_prior} has the class ids 0 to {known - 1}, but one of the dataset's "
                f"{num_classes} classes is mapped to id {wrong[0]}; give another prior, or its class id for each label "
                "with --class_map"
            )
        if self.guidance_scale > 1 and null is None:
            raise UserError(
                f"{FLAG} {self.external_prior} was trained without a null class, which --guidance_scale "
                f"{self.guidance_scale:g} needs; give --guidance_scale 1, or the id of a null class with --null_class"
            )
        self.ids, self.null = torch.tensor(ids, device=self.device), null

    def condition(self, labels: Tensor, repeats: list[int]) -> Tensor:
        """The prior's class ids (B,)."""
        labels = labels.to(self.device)
        if self.classes == "same":
            return self.ids[labels]
        turns = torch.tensor(repeats, device=self.device) + labels * len(self.ids) // self.num_classes
        return self.ids[turns % len(self.ids)]

    def _with_null(self, condition: Tensor) -> Tensor:
        return torch.cat([torch.full_like(condition, self.null), condition])
