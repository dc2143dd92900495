"""Variants from pretrained latent diffusion models: DDA's image variation, and image-to-image with a class prompt.

Paper: Li et al., ACM MM 2024, arXiv 2410.17606. An image-variation model makes variants of every bank image, each with fresh
noise. ``ImageVariation`` is the paper's model: a Stable Diffusion v1-4, fine-tuned to take a CLIP image embedding instead of
text, with the defaults of its public demo (guidance scale 3, 25 steps). ``ImageToImage`` adds noise to the image itself and
denoises it with the name of its class as a prompt (SDEdit, Meng et al. 2021, arXiv 2108.01073). It takes any Stable
Diffusion, SDXL or Turbo checkpoint.

Both run the pipelines of diffusers. One generator per image gives all its random numbers: those of the encoding, the noise
and the steps of an ancestral sampler. A variant therefore does not depend on the other images of its batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.hub import load_pipeline, prior_name
from engine.runtime.errors import UserError

# An augmenter turns an image of the bank into a new one.
#
# Each image has its own seed, and its random numbers are drawn on the CPU on every device. A variant therefore depends
# neither on the batch size nor on the order of the images. The exception is BN guidance: its statistics depend on the images
# of the batch.


class Augmenter:
    """Makes variants of images.

    Subclasses implement ``augment``. Those that are trained on the bank also implement ``fit`` and the state methods.

    Attributes:
        external_prior: name of the pretrained model in the results table, ``"<model id>[@revision]"``, or ``"none"``.
        fit_rounds: number of calls of ``fit`` before the first ``augment``.
        network, steps: denoising network to compile, and the number of its calls for a batch of variants; None: no network
            is compiled.
    """

    external_prior: str = "none"
    fit_rounds: int = 0
    network: nn.Module | None = None
    steps: int = 0

    def fit(self, images_u8: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        """Trains on the bank for one round; random numbers come from the global generator.

        Args:
            images_u8: (N, 3, H, W) uint8.
            labels: (N,) int64.
        Returns:
            Named scalars for the log.
        """
        raise NotImplementedError(f"{type(self).__name__} does not learn from the bank")

    def augment(self, images: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        """Makes one variant of each image.

        Args:
            images: (B, 3, H, W) float32 in [0, 1].
            labels: (B,) int64.
            seeds: B seeds, one per image. Without BN guidance a variant does not depend on the other images' seeds.
        Returns:
            Variants (B, 3, H, W) float32 in [0, 1], on the augmenter's device.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """State that ``fit`` changes, as tensors and plain values; empty for a pretrained model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""


def seeded_generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator per seed; diffusers moves the drawn numbers to its own device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seeded_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (len(seeds), *shape) float32 on the CPU; row k depends only on ``seeds[k]``."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in seeded_generators(seeds)])


def denoising_steps(strength: float, num_inference_steps: int) -> int:
    """Number of denoising steps for ``strength``: ``strength * num_inference_steps``, rounded down as in diffusers.

    Raises:
        UserError: ``strength`` is outside (0, 1], or the result is 0.
    """
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g} found, a number above 0, at most 1 wanted; 1 starts from pure noise")
    steps = int(strength * num_inference_steps)
    if steps < 1:
        raise UserError(
            f"--strength {strength:g} with --num_inference_steps {num_inference_steps} leaves no denoising step; "
            f"give --num_inference_steps {-int(-1 // strength)} or more, or a larger --strength"
        )
    return steps


IMAGE_TO_IMAGE = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLImg2ImgPipeline",
}
# Kinds of pipeline that each choice of --prior can load.
PIPELINES = {"image_variation": ("StableDiffusionImageVariationPipeline",), "image_to_image": tuple(IMAGE_TO_IMAGE)}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resize of images (B, 3, H, W) in [0, 1], clamped to [0, 1]; images of that size are returned as they are.

    Without the clamp, bicubic overshoot below 0 would make diffusers take the whole batch for images in [-1, 1].
    """
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


class _LatentAugmenter(Augmenter):
    """Base class of the two augmenters: a pipeline with its resolution; variants are resized to the size of the source."""

    def __init__(self, pipeline, model_id: str, revision: str | None, resolution: int | None, steps: int):
        self.pipeline, self.network, self.steps = pipeline, pipeline.unet, steps
        self.external_prior = prior_name(model_id, revision)
        own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        self.resolution = resolution or own
        if self.resolution % 8 or self.resolution % pipeline.vae_scale_factor:
            raise UserError(
                f"--resolution {self.resolution} found, a multiple of {max(8, pipeline.vae_scale_factor)} wanted; "
                f"{model_id} was trained at {own} px"
            )

    def augment(self, images: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        """See ``Augmenter.augment``."""
        images = images.to(self.pipeline.device)
        variants = self._variants(images, labels.tolist(), seeded_generators(seeds))
        return resize(variants.float(), tuple(images.shape[2:]))

    def _variants(self, images: Tensor, labels: list[int], generators: list[torch.Generator]) -> Tensor:
        """Variants (B, 3, resolution, resolution) in [0, 1]."""
        raise NotImplementedError


class ImageVariation(_LatentAugmenter):
    """Variations of an image by its CLIP embedding; the label is not used.

    The preprocessing for CLIP follows the model card: bicubic resize *without* antialiasing, then CLIP's mean and std. The
    pipeline's own processor would use antialiasing.

    Args:
        model_id: hub id or local directory of a ``StableDiffusionImageVariationPipeline``.
        revision: branch, tag or commit of the hub id.
        guidance_scale: scale of classifier-free guidance; at most 1: no guidance.
        num_inference_steps: number of denoising steps.
        resolution: side in px of the images that the model makes; None: the model's own.
        dtype: dtype of weights and computation.
    Raises:
        UserError: the model cannot be loaded, is of another kind, or does not support ``resolution``.
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        *,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 25,
        resolution: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        denoising_steps(1.0, num_inference_steps)
        pipeline = load_pipeline(model_id, revision, PIPELINES["image_variation"][0], dtype, device)
        super().__init__(pipeline, model_id, revision, resolution, num_inference_steps)
        self.guidance_scale, self.num_inference_steps = guidance_scale, num_inference_steps
        processor = pipeline.feature_extractor
        self.mean = torch.tensor(getattr(processor, "image_mean", CLIP_MEAN), device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(getattr(processor, "image_std", CLIP_STD), device=device).view(1, 3, 1, 1)

    def _variants(self, images: Tensor, labels: list[int], generators: list[torch.Generator]) -> Tensor:
        size = self.pipeline.image_encoder.config.image_size
        # Not clamped, as on the model card: this tensor goes to CLIP directly and not through an image processor.
        seen = F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=False)
        return self.pipeline(
            image=(seen - self.mean) / self.std,
            height=self.resolution,
            width=self.resolution,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            generator=generators,
            output_type="pt",
        ).images


class ImageToImage(_LatentAugmenter):
    """Partial noising and denoising of an image under a prompt with the name of its class.

    Args:
        model_id: hub id or local directory of a Stable Diffusion, SDXL or Turbo checkpoint.
        revision: branch, tag or commit of the hub id.
        prompt: template in which ``{label}`` stands for the class name. Without ``{label}`` all images have the same prompt.
        class_names: class names by label, or None if unknown.
        strength: share in (0, 1] of the noise schedule: 1 starts from pure noise.
        guidance_scale: scale of classifier-free guidance; at most 1: no guidance. Turbo checkpoints need 0.
        num_inference_steps: denoising steps from pure noise; ``int(strength * num_inference_steps)`` of them are taken.
        resolution: side in px of the images that the model makes; None: the model's own.
        dtype: dtype of weights and computation.
    Raises:
        UserError: the prompt has ``{label}`` and the class names are unknown, no denoising step is left, or the model cannot
            be loaded, is of another kind or does not support ``resolution``.
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        *,
        prompt: str = "a photo of a {label}",
        class_names: tuple[str, ...] | None = None,
        strength: float = 0.5,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 25,
        resolution: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if "{label}" in prompt and class_names is None:
            raise UserError(
                f"--prompt '{prompt}' needs class names, and this dataset has none; give a --prompt without {{label}}"
            )
        denoising_steps(strength, num_inference_steps)
        pipeline = load_pipeline(model_id, revision, IMAGE_TO_IMAGE, dtype, device)
        super().__init__(pipeline, model_id, revision, resolution, num_inference_steps)
        self.prompt, self.class_names = prompt, class_names
        self.strength, self.guidance_scale, self.num_inference_steps = strength, guidance_scale, num_inference_steps

    def _prompt(self, label: int) -> str:
        return self.prompt.replace("{label}", self.class_names[label]) if self.class_names else self.prompt

    def _variants(self, images: Tensor, labels: list[int], generators: list[torch.Generator]) -> Tensor:
        return self.pipeline(
            prompt=[self._prompt(label) for label in labels],
            image=resize(images, (self.resolution, self.resolution)),
            strength=self.strength,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            generator=generators,
            output_type="pt",
        ).images
