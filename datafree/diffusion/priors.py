"""Generative priors behind one small interface: pretrained diffusion models that sample an image of a class from noise.

    text to image        Stable Diffusion 1 and 2, SDXL, Turbo: latents of an autoencoder, prompts
    class-conditional    DiT (Peebles & Xie 2022, arXiv 2212.09748): latents of an autoencoder, class ids
    pixels               a class-conditional ``UNet2DModel`` with its scheduler; pixels are the latents
    embedded             a ``PatchUNet`` file of this project (``datafree.diffusion.train_prior``); pixels are the latents

``load_prior`` recognizes the kind of a model. A ``.safetensors`` file, or the name of a shipped one, is an embedded prior.
For a hub id or a directory, the configuration names the pipeline. Loading, error messages and names are shared with the
augmenters (``datafree.diffusion.hub``), so DDA can use the same models. ``predict`` and ``decode`` are differentiable.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datafree.diffusion.hub import FLAG, load_pipeline, pipeline_config, prior_name
from datafree.diffusion.patch_unet import PatchUNet, load_patch_prior, shipped_prior
from datafree.diffusion.prior_base import ClassConditional, DiffusionPrior
from datafree.diffusion.sampling import Trajectory, cosine_trajectory, own_rule, scheduler_trajectory
from engine.runtime.errors import UserError

TEXT = {
    "StableDiffusionPipeline": "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
}
PIPELINES = TEXT | {name: name for name in ("DiTPipeline", "DDPMPipeline", "DDIMPipeline")}


class _Pipeline(DiffusionPrior):
    """Base class of the priors from a diffusers pipeline: uses its scheduler and, if it has one, its autoencoder."""

    def __init__(self, pipeline, network: torch.nn.Module, name: str, guidance_scale: float, resolution: int | None):
        self.pipeline, self.network, self.external_prior, self.guidance_scale = pipeline, network, name, guidance_scale
        self.device, self.dtype = network.device, network.dtype
        self.own_rule = own_rule(pipeline.scheduler)
        self.vae = getattr(pipeline, "vae", None)
        for module in filter(None, (network, self.vae)):
            module.eval().requires_grad_(False)
        # SDXL's autoencoder overflows in half precision and sets ``force_upcast``. In other models it is only the default.
        if self.dtype == torch.float16 and hasattr(pipeline, "text_encoder_2") and self.vae.config.get("force_upcast"):
            self.vae.float()
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1
        own = network.config.sample_size * factor
        resolution = resolution or own
        if resolution % max(8, factor):
            raise UserError(
                f"--resolution {resolution} found, a multiple of {max(8, factor)} wanted; {name} was trained at {own} px"
            )
        self.resolution = resolution
        self.shape = (network.config.in_channels, resolution // factor, resolution // factor)

    def trajectory(self, steps: int) -> Trajectory:
        try:
            return scheduler_trajectory(self.pipeline.scheduler, steps, self.device)
        except ValueError as error:
            raise UserError(f"{FLAG} {self.external_prior} with --num_inference_steps {steps}: {error}") from None

    def decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents.expand(-1, 3, -1, -1) / 2 + 0.5
        images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return images.to(latents.dtype) / 2 + 0.5

    def checkpoint_gradients(self) -> None:
        for module in filter(None, (self.network, self.vae)):
            module.enable_gradient_checkpointing()


class TextToImage(_Pipeline):
    """Prior from a Stable Diffusion, SDXL or Turbo checkpoint.

    Args:
        prompts: prompt templates, used in turn for the images of a class; ``{label}`` stands for the class name. Each
            distinct prompt is encoded once.
        class_names: class names by label, or None if unknown.
    Raises:
        UserError: a template has ``{label}``, and the class names are unknown.
    """

    def __init__(
        self, pipeline, name: str, *, prompts: tuple[str, ...], class_names, guidance_scale: float, resolution: int | None
    ):
        super().__init__(pipeline, pipeline.unet, name, guidance_scale, resolution)
        check_prompts(prompts, class_names)
        self.prompts, self.class_names = prompts, class_names
        self.encoded: dict[str, tuple[tuple[Tensor, Tensor | None], ...]] = {}

    def condition(self, labels: Tensor, repeats: list[int]) -> list[str | None]:
        """The prompts (B strings)."""
        templates = [self.prompts[k % len(self.prompts)] for k in repeats]
        names = [self.class_names[label] if self.class_names else "" for label in labels.tolist()]
        return [template.replace("{label}", name) for template, name in zip(templates, names, strict=True)]

    def _with_null(self, condition: list[str | None]) -> list[str | None]:
        return [None] * len(condition) + condition

    @torch.no_grad()
    def _encode(self, prompt: str) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """The pair (embeddings (L, D), pooled embedding (P,) or None), for the empty prompt and for ``prompt``."""
        if prompt not in self.encoded:
            encoded = self.pipeline.encode_prompt(
                prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
            )
            embeddings, null, *pooled = encoded
            pooled, null_pooled = pooled or (None, None)
            self.encoded[prompt] = tuple(
                (sequence[0], vector if vector is None else vector[0])
                for sequence, vector in ((null, null_pooled), (embeddings, pooled))
            )
        return self.encoded[prompt]

    def _network(self, latents: Tensor, time: Tensor, condition: list[str | None]) -> Tensor:
        some = next((prompt for prompt in condition if prompt is not None), "")
        rows = [self._encode(some)[0] if prompt is None else self._encode(prompt)[1] for prompt in condition]
        added = None
        if rows[0][1] is not None:  # SDXL takes the image size as a further condition
            sizes = [self.resolution, self.resolution, 0, 0, self.resolution, self.resolution]
            ids = torch.tensor([sizes] * len(rows), dtype=self.dtype, device=self.device)
            added = {"text_embeds": torch.stack([pooled for _, pooled in rows]), "time_ids": ids}
        embeddings = torch.stack([sequence for sequence, _ in rows])
        return self.network(latents, time, encoder_hidden_states=embeddings, added_cond_kwargs=added).sample


class DiT(ClassConditional, _Pipeline):
    """Prior from a DiT, a class-conditional diffusion transformer; the id of its null class follows the last class."""

    def __init__(
        self,
        pipeline,
        name: str,
        *,
        num_classes: int,
        class_map,
        classes: str | None,
        guidance_scale: float,
        resolution: int | None,
    ):
        super().__init__(pipeline, pipeline.transformer, name, guidance_scale, resolution)
        own = self.network.config.sample_size
        if self.shape[1] != own:
            only = own * resolution // self.shape[1]
            raise UserError(f"--resolution {resolution} found, but {name} draws only images of {only} px; leave it out")
        known = self.network.config.num_embeds_ada_norm
        self.take_classes(known, known, num_classes, class_map, classes or "same")

    def _network(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        output = self.network(latents, timestep=time.expand(len(latents)), class_labels=condition).sample
        return output[:, : latents.shape[1]]  # the other channels are a variance


class PixelUNet(ClassConditional, _Pipeline):
    """Prior from a class-conditional ``UNet2DModel`` of RGB or grey images.

    Args:
        null_class: class id of the null class; None: the last id if the model has one more than the dataset has classes.
    """

    def __init__(
        self,
        pipeline,
        name: str,
        *,
        num_classes: int,
        class_map,
        classes: str | None,
        null_class: int | None,
        guidance_scale: float,
        resolution: int | None,
    ):
        super().__init__(pipeline, pipeline.unet, name, guidance_scale, resolution)
        known = self.network.config.get("num_class_embeds")
        if not known:
            raise UserError(
                f"{FLAG} {name} is not class-conditional (its UNet2DModel has no num_class_embeds); give a "
                "class-conditional model"
            )
        if null_class is None and known == num_classes + 1:
            null_class = num_classes
        if null_class is not None and not 0 <= null_class < known:
            raise UserError(f"--null_class {null_class} found, but {FLAG} {name} has the class ids 0 to {known - 1}")
        self.take_classes(known, null_class, num_classes, class_map, classes or "same")

    def _network(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.network(latents, time, class_labels=condition).sample[:, : latents.shape[1]]


class PatchPrior(ClassConditional, DiffusionPrior):
    """Prior from a ``PatchUNet``: pixels in [-1, 1], cosine schedule, v-prediction (``datafree.diffusion.patch_unet``).

    Args:
        network: frozen network on its device; the id of its null class follows its ``known`` classes.
        name: name in the results table.
        image_size: side of its images in px.
        known: number of its classes without the null class.
        classes: one of ``CLASSES``; None: "same" if the prior has as many classes as the dataset or ``class_map`` is given,
            else "none".
    """

    own_rule = "ddim"

    def __init__(
        self,
        network: PatchUNet,
        name: str,
        image_size: int,
        known: int,
        *,
        num_classes: int,
        class_map=None,
        classes: str | None = None,
        guidance_scale: float = 1.0,
    ):
        weight = next(network.parameters())
        self.network, self.device, self.dtype = network, weight.device, weight.dtype
        self.external_prior, self.guidance_scale = name, guidance_scale
        self.shape = (3, image_size, image_size)
        fits = class_map is not None or known == num_classes
        self.take_classes(known, known, num_classes, class_map, classes or ("same" if fits else "none"))

    @classmethod
    def load(cls, path: Path, device: torch.device | str, dtype: torch.dtype, **settings) -> "PatchPrior":
        """The prior of a ``.safetensors`` file; ``settings`` are the keyword arguments of the class."""
        network, about = load_patch_prior(path)
        network = network.to(device, dtype, memory_format=torch.channels_last)
        return cls(network, prior_name(str(path)), about["image_size"], about["num_classes"], **settings)

    def trajectory(self, steps: int, start: float = 1.0) -> Trajectory:
        """The noise levels of ``steps`` denoising steps from time ``start`` to 0."""
        return cosine_trajectory(steps, self.device, start)

    def decode(self, latents: Tensor) -> Tensor:
        return latents / 2 + 0.5

    def checkpoint_gradients(self) -> None:
        self.network.unet.enable_gradient_checkpointing()

    def _network(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.network(latents, time.to(latents.dtype).expand(len(latents)), condition)


def check_prompts(prompts: tuple[str, ...], class_names: tuple[str, ...] | None) -> None:
    """Raises a UserError if there is no prompt, or if a prompt has ``{label}`` and the class names are unknown."""
    if not prompts:
        raise UserError("--prompt is empty; give one such as 'a photo of a {label}'")
    if class_names is None and (wanting := [p for p in prompts if "{label}" in p]):
        raise UserError(
            f"--prompt '{wanting[0]}' needs class names, and this dataset has none; give a --prompt without {{label}}"
        )


def check_prior(model_id: str, revision: str | None, prompts: tuple[str, ...], class_names: tuple[str, ...] | None) -> bool:
    """Checks that a prior exists and is of a kind that ``load_prior`` can load.

    Of a pipeline only the configuration is read. A ``.safetensors`` file is loaded.

    Returns:
        Whether the prior takes prompts.
    Raises:
        UserError: the prior is missing or of another kind, or its prompts do not pass ``check_prompts``.
    """
    model_id = str(shipped_prior(model_id) or model_id)
    if model_id.endswith(".safetensors"):
        load_patch_prior(Path(model_id))
        return False
    by_prompt = pipeline_config(model_id, revision, PIPELINES)["_class_name"] in TEXT
    if by_prompt:
        check_prompts(prompts, class_names)
    return by_prompt


def load_prior(
    model_id: str,
    revision: str | None = None,
    *,
    num_classes: int,
    class_names: tuple[str, ...] | None = None,
    prompts: tuple[str, ...] = ("a photo of a {label}",),
    class_map: tuple[int, ...] | None = None,
    classes: str | None = None,
    null_class: int | None = None,
    guidance_scale: float = 3.0,
    resolution: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DiffusionPrior:
    """Loads the prior ``model_id`` of any kind.

    Args:
        model_id: hub id, directory written by ``save_pretrained``, ``.safetensors`` file of this project, or the name of a
            shipped prior (``natural_32``).
        revision: branch, tag or commit of a hub id.
        num_classes: number of classes of the dataset.
        class_names: class names by label, or None.
        prompts: prompt templates of a text-to-image model.
        class_map, classes, null_class: settings of a class-conditional model; see ``ClassConditional`` and ``PixelUNet``.
        guidance_scale: scale of classifier-free guidance; at most 1: no guidance.
        resolution: side in px of the images that the model samples; None: the model's own.
        dtype: dtype of the weights.
    Raises:
        UserError: the model cannot be loaded, is of another kind, has too few classes, or cannot sample at ``resolution``.
    """
    about_classes = {"num_classes": num_classes, "class_map": class_map, "classes": classes}
    common: dict[str, Any] = {**about_classes, "guidance_scale": guidance_scale}
    model_id = str(shipped_prior(model_id) or model_id)
    if model_id.endswith(".safetensors"):
        if resolution:
            raise UserError(f"--resolution {resolution} found, but {model_id} draws only at its own size; leave it out")
        return PatchPrior.load(Path(model_id), device, dtype, **common)
    pipeline = load_pipeline(model_id, revision, PIPELINES, dtype, device)
    name, kind = prior_name(model_id, revision), type(pipeline).__name__
    common["resolution"] = resolution
    if kind == "DiTPipeline":
        return DiT(pipeline, name, **common)
    if kind in TEXT:
        drawing = {"guidance_scale": guidance_scale, "resolution": resolution}
        return TextToImage(pipeline, name, prompts=prompts, class_names=class_names, **drawing)
    return PixelUNet(pipeline, name, null_class=null_class, **common)
