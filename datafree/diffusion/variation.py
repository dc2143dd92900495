"""Variants from pretrained latent diffusion models: DDA's image variation, and image-to-image with a class prompt.

Paper: Li et al., ACM MM 2024, arXiv 2410.17606. Every image of the bank goes through an image-variation model with fresh
noise. ``ImageVariation`` is the paper's model: a Stable Diffusion v1-4 fine-tuned to take a CLIP image embedding in place
of text, with the defaults of its public demo (guidance 3, 25 steps). ``ImageToImage`` noises the image itself and denoises
it with the name of its class (SDEdit, Meng et al. 2021, arXiv 2108.01073), by any Stable Diffusion, SDXL or Turbo
checkpoint.

Both run the library's own pipelines. All randomness of an image - encoding, noise and the steps of an ancestral sampler -
comes from one generator, so its variant does not depend on the batch it is in.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.hub import load_pipeline, prior_name
from engine.runtime.errors import UserError

# An augmenter turns an image of the bank into a new one.
#
# Its random numbers come from one seed an image, drawn on the CPU whatever the device, so that neither the batch size nor the
# order of the images changes a variant; but where the BN statistics of those drawn together guide them, they do.


class Augmenter:
    """A source of variants. Subclasses implement ``augment``, and the rest where they learn from the bank.

    Attributes:
        external_prior: the pretrained model behind the variants as the results table names it, ``"<model id>[@revision]"``,
            or ``"none"``.
        fit_rounds: calls of ``fit`` wanted before the first ``augment``.
        network, steps: the denoising network and its calls for a batch of variants, for torch.compile; None: leave it alone.
    """

    external_prior: str = "none"
    fit_rounds: int = 0
    network: nn.Module | None = None
    steps: int = 0

    def fit(self, images_u8: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        """One round of training on the bank, its randomness from the global stream.

        Args:
            images_u8: (N, 3, H, W) uint8.
            labels: (N,) int64.
        Returns:
            Named scalars for the log.
        """
        raise NotImplementedError(f"{type(self).__name__} does not learn from the bank")

    def augment(self, images: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        """One variant of each image.

        Args:
            images: (B, 3, H, W) float32 in [0, 1].
            labels: (B,) int64.
            seeds: B seeds; an image's variant depends on its own seed alone.
        Returns:
            (B, 3, H, W) float32 in [0, 1], on the augmenter's device.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What ``fit`` has changed: tensors and plain values; empty for a pretrained model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where ``state_dict`` was called."""


def seeded_generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator a seed; diffusers moves what they draw to its own device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seeded_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (len(seeds), *shape) float32 on the CPU, row k from ``seeds[k]`` alone."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in seeded_generators(seeds)])


def denoising_steps(strength: float, num_inference_steps: int) -> int:
    """Network evaluations that ``strength`` leaves of ``num_inference_steps``, rounded down as diffusers does.

    Raises:
        UserError: ``strength`` is outside (0, 1], or no step is left.
    """
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g} is outside (0, 1]: the share of the way back to pure noise")
    steps = int(strength * num_inference_steps)
    if steps < 1:
        raise UserError(
            f"--strength {strength:g} of --num_inference_steps {num_inference_steps} leaves no denoising step; "
            f"give --num_inference_steps {-int(-1 // strength)} or more, or a larger --strength"
        )
    return steps


IMAGE_TO_IMAGE = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLImg2ImgPipeline",
}
# What each of --prior takes.
PIPELINES = {"image_variation": ("StableDiffusionImageVariationPipeline",), "image_to_image": tuple(IMAGE_TO_IMAGE)}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, size: tuple[int, int], antialias: bool = True) -> Tensor:
    """Bicubic resize of (B, 3, H, W) in [0, 1], clamped: overshoot would make diffusers read a whole batch as [-1, 1]."""
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=antialias).clamp(0, 1)


class _LatentAugmenter(Augmenter):
    """What both share: a pipeline, the size at which it works, and the way back to the source's size."""

    def __init__(self, pipeline, model_id: str, revision: str | None, resolution: int | None, steps: int):
        self.pipeline, self.network, self.steps = pipeline, pipeline.unet, steps
        self.external_prior = prior_name(model_id, revision)
        own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        self.resolution = resolution or own
        if self.resolution % 8 or self.resolution % pipeline.vae_scale_factor:
            raise UserError(f"--resolution {self.resolution} is no multiple of 8; {model_id} was made for {own}")

    def augment(self, images: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        """See ``Augmenter.augment``."""
        images = images.to(self.pipeline.device)
        variants = self._variants(images, labels.tolist(), seeded_generators(seeds))
        return resize(variants.float(), tuple(images.shape[2:]))

    def _variants(self, images: Tensor, labels: list[int], generators: list[torch.Generator]) -> Tensor:
        """(B, 3, resolution, resolution) in [0, 1]."""
        raise NotImplementedError


class ImageVariation(_LatentAugmenter):
    """Variations of an image by its CLIP embedding; the label plays no part.

    The image goes to CLIP as the model card asks: a bicubic resize *without* antialiasing, then CLIP's mean and std. The
    pipeline's own processor would antialias.

    Args:
        model_id: hub id or local directory of a ``StableDiffusionImageVariationPipeline``.
        revision: of the hub id.
        guidance_scale: at most 1 is none.
        num_inference_steps: denoising steps.
        resolution: px at which the model draws; None: its own.
        dtype: of weights and computation.
    Raises:
        UserError: the model cannot be had, is of another kind, or cannot draw at ``resolution``.
    """

    def __init__(
        self,
        model_id: str = "lambdalabs/sd-image-variations-diffusers",
        revision: str | None = "v2.0",
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
        # Not clamped, as on the model card: this tensor goes to CLIP and to no image processor.
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
        revision: of the hub id.
        prompt: template; ``{label}`` stands for the class name. Without it every image has the same prompt.
        class_names: by label, or None if unknown.
        strength: in (0, 1], the share of the way back to pure noise.
        guidance_scale: at most 1 is none; Turbo checkpoints want 0.
        num_inference_steps: steps from pure noise; ``int(strength * num_inference_steps)`` of them are taken.
        resolution: px at which the model draws; None: its own.
        dtype: of weights and computation.
    Raises:
        UserError: the prompt wants names that are not known, no step is left, the model cannot be had, is of another kind,
            or cannot draw at ``resolution``.
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
                f"--prompt '{prompt}' wants class names, and this dataset has none; give a --prompt without {{label}}"
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
