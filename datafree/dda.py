"""DDA: data-free knowledge distillation with diffusion augmentation (Li et al., ACM MM 2024, arXiv 2410.17606).

Three steps: (1) an image bank is inverted from the teacher; (2) every bank image goes V times through a diffusion model
with fresh noise, and a variant stays iff its cosine to its source in an embedding is at least omega; (3) the student
learns from the bank and the kept variants, which carry their sources' labels. Inversion and student loss are CSD's.

Which diffusion model, ``--prior``:
    pixel            a small class-conditional model trained here on the bank itself; nothing is downloaded and the run
                     stays strictly data-free (``datafree.diffusion.pixel``). Default.
    image_variation  the paper's: Stable Diffusion taking a CLIP image embedding (``datafree.diffusion.variation``).
    image_to_image   any Stable Diffusion, SDXL or Turbo checkpoint, from the noised image and a class-name prompt.

Deviations: the published code ships no diffusion step and no filter. Omega, the embedding and V are not known: the paper's
figure keeps .83 and .76 and drops .45. All three are flags; the README says how the defaults were found.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.base import Task
from datafree.csd import CSD, CSDConfig
from datafree.diffusion.prior import Augmenter, prior_name
from datafree.filter import DEFAULT_MODELS, DEFAULT_OMEGA, build_embedding
from engine.flags import flag

AUGMENT = ("augment",)
FILTER = ("distill",)
VARIATION_MODEL, VARIATION_REVISION = "lambdalabs/sd-image-variations-diffusers", "v2.0"
IMAGE_TO_IMAGE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DDAConfig(CSDConfig):
    """Flags of DDA: CSD's, and those of the diffusion stage."""

    synthesis_batch_size: int = flag(400, "images a round while distilling", stages=("distill",))
    prior: str = flag("pixel", "diffusion model that makes the variants", choices=("pixel", "image_variation", "image_to_image"), stages=AUGMENT)
    diffusion_model: str | None = flag(None, f"hub id or local directory; unset: {VARIATION_MODEL}@{VARIATION_REVISION}, or {IMAGE_TO_IMAGE_MODEL} for image_to_image", stages=AUGMENT)
    diffusion_revision: str | None = flag(None, "revision of the hub id", stages=AUGMENT)
    variants: int = flag(1, "V, variants of each bank image", stages=AUGMENT)
    strength: float = flag(0.5, "share of the way back to pure noise from which a variant is denoised, (0, 1] (not image_variation)", stages=AUGMENT)
    num_inference_steps: int | None = flag(None, "denoising steps from pure noise; unset: 25, pixel 12", stages=AUGMENT)
    guidance_scale: float | None = flag(None, "classifier-free guidance; unset: 3, pixel 1 (none)", stages=AUGMENT)
    prompt: str = flag("a photo of a {label}", "prompt of image_to_image", stages=AUGMENT)
    resolution: int | None = flag(None, "px at which a pretrained model works; unset: its own", stages=AUGMENT)
    diffusion_dtype: str | None = flag(None, "of a pretrained model; unset: fp16 on a GPU, else fp32", choices=tuple(DTYPES), stages=AUGMENT)
    diffusion_batch_size: int = flag(64, "variants made at a time; changes no image", ())
    fit_rounds: int = flag(50, "pixel: checkpoints while it is trained on the bank", stages=AUGMENT)
    fit_steps: int = flag(200, "pixel: training steps between two checkpoints", stages=AUGMENT)
    fit_batch_size: int = flag(64, "pixel: images a training step", stages=AUGMENT)
    fit_lr: float = flag(1e-3, "pixel: AdamW learning rate", stages=AUGMENT)
    embedding: str = flag("teacher", "where variant and source are compared", choices=tuple(DEFAULT_OMEGA), stages=FILTER)
    embedding_model: str | None = flag(None, "hub id or local directory of clip or dinov2", stages=FILTER)
    omega: float | None = flag(None, "least cosine of a kept variant, -1 keeps all; unset: the embedding's default", stages=FILTER)
