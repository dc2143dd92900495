"""The image filter of DDA: keeps the variants that are similar to their source in an embedding.

Li et al., ACM MM 2024, arXiv 2410.17606: variant G_k of image f is kept if and only if cos(embed(G_k), embed(f)) >= omega.
The embedding and omega are not known; a figure of the paper keeps cosines of .83 and .76 and drops .45. Three embeddings can
be chosen:

    teacher  penultimate features of the teacher: strictly data-free (default)
    clip     image embedding of CLIP (Radford et al. 2021, arXiv 2103.00020)
    dinov2   class token of DINOv2 (Oquab et al. 2023, arXiv 2304.07193)

With ``agree`` a variant must also be classified by the teacher as its source's label. This is an addition of this project.

Cosines of different embeddings cannot be compared. For example, 99 % of the cosines between bank images of different classes
are below .50 for a resnet20 of CIFAR-10, and below .84 for a resnet20 of digits. The default omega is therefore measured on
the bank (``calibrated_omega``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.hub import check_model_type, hub_errors
from datafree.diffusion.variation import CLIP_MEAN, CLIP_STD
from datafree.teacher_metrics import TeacherMetrics
from engine.runtime.errors import UserError

Embedding = Callable[[Tensor], Tensor]

DEFAULT_MODELS = {"clip": "openai/clip-vit-base-patch32", "dinov2": "facebook/dinov2-small"}
EMBEDDINGS = ("teacher", "clip", "dinov2")
OMEGA_QUANTILE = 0.99
MODEL_TYPES = {"clip": ("clip", "clip_vision_model"), "dinov2": ("dinov2", "dinov2_with_registers")}
# (mean, std) for a model without preprocessor_config.json.
NORMALIZATION = {"clip": (CLIP_MEAN, CLIP_STD), "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


def build_embedding(
    kind: str,
    model_id: str | None = None,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Embedding:
    """Builds an embedding by name: images (B, 3, H, W) float32 in [0, 1] -> (B, D) float32 on ``device``.

    Args:
        kind: "teacher", "clip" or "dinov2".
        model_id: hub id or local directory of the pretrained model; None: that of ``DEFAULT_MODELS``.
        teacher: teacher for kind "teacher", in eval mode; ``teacher(images, return_features=True).features`` is (B, D).
        device: device of the embedding.
        dtype: dtype of the pretrained model's weights.
    Raises:
        UserError: the pretrained model cannot be loaded, or is of another kind.
    """
    if kind == "teacher":
        return _TeacherEmbedding(teacher, device)
    return _PretrainedEmbedding(kind, model_id or DEFAULT_MODELS[kind], device, dtype)


def check_embedding(kind: str, model_id: str | None) -> None:
    """Checks from its configuration alone that the pretrained model of an embedding exists and is of the right kind.

    Raises:
        UserError: the model is missing or of another kind.
    """
    if kind != "teacher":
        check_model_type(model_id, MODEL_TYPES[kind], kind, "--embedding_model")


class _TeacherEmbedding:
    def __init__(self, teacher: nn.Module, device: torch.device | str):
        self.teacher, self.device = teacher, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.teacher(images.to(self.device), return_features=True).features.flatten(1).float()


class _PretrainedEmbedding:
    """CLIP or DINOv2 at the model's input size, with the model's mean and std.

    The whole image is resized, bicubically with antialiasing. DINOv2's published preprocessing instead crops the centre of a
    larger resized image, which would cut off parts of inverted images.
    """

    def __init__(self, kind: str, model_id: str, device: torch.device | str, dtype: torch.dtype):
        from transformers import AutoModel, CLIPVisionModelWithProjection

        check_embedding(kind, model_id)
        loader = CLIPVisionModelWithProjection if kind == "clip" else AutoModel
        with hub_errors(model_id, None, "--embedding_model"):
            self.model = loader.from_pretrained(model_id, dtype=dtype).to(device).eval().requires_grad_(False)
        self.kind, self.device, self.dtype = kind, device, dtype
        self.size, mean, std = self._preprocessing(model_id)
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def _preprocessing(self, model_id: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """Side of the input in px, mean and std; those of the model's preprocessor if there is one."""
        from transformers import ImageProcessingMixin

        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(model_id)
        except OSError:
            settings = {}
        mean, std = NORMALIZATION[self.kind]
        size = self.model.config.image_size
        if self.kind == "dinov2":  # its configuration has the 518 px of the last training phase
            crop = settings.get("crop_size", min(size, 224))
            size = crop["height"] if isinstance(crop, dict) else crop
        return size, settings.get("image_mean", mean), settings.get("image_std", std)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        size = (self.size, self.size)
        images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        output = self.model(pixel_values=((images - self.mean) / self.std).to(self.dtype))
        return (output.image_embeds if self.kind == "clip" else output.last_hidden_state[:, 0]).float()


@dataclass(frozen=True)
class CosineFilter:
    """The filter of a run. It is called by ``engine.loops.makers``.

    Args:
        name: name of the embedding, used in the name of the file that holds the cosines.
        omega: least cosine of a kept variant; None: ``calibrated_omega``.
        build: function that builds the embedding; called when the embedding is first needed.
        metrics: the teacher's predictions for images, ``datafree.teacher_metrics.TeacherMetrics``.
        agree: whether a kept variant must also be classified by the teacher as its source's label.
        check: function that raises a UserError if the embedding cannot be built.
    """

    name: str
    omega: float | None
    build: Callable[[], Embedding]
    metrics: TeacherMetrics
    agree: bool = False
    check: Callable[[], None] = lambda: None

    def score(self, sources: dict[str, Any], variants: dict[str, Any], show: Callable[[int], None]) -> tuple[Tensor, float]:
        """Computes the cosine between each variant and its source (M,), and the calibrated omega.

        Args:
            sources: bank images: "images" (N, 3, H, W) uint8, "labels" (N,).
            variants: "images" (M, 3, H, W) uint8, "source_index" (M,).
            show: progress function, called with the number of images embedded since its last call.
        """
        embedding = self.build()
        cosine = cosines(embedding, sources["images"], variants["images"], variants["source_index"], progress=show)
        return cosine, calibrated_omega(embedding, sources["images"], sources["labels"])

    def keep(self, cosine: Tensor, omega: float, agrees: Tensor) -> Tensor:
        """Mask (M,) bool of the kept variants: ``keep_mask``, and ``agrees`` if the filter has ``agree``.

        Args:
            cosine: cosine of each variant to its source (M,).
            omega: least cosine of a kept variant.
            agrees: whether the teacher classifies a variant as its source's label (M,) bool.
        Raises:
            UserError: no variant would be kept.
        """
        near = keep_mask(cosine, omega)
        if not self.agree:
            return near
        if not (near & agrees).any():
            raise UserError(
                f"--agree keeps none of the {int(near.sum())} variants that are near enough to their sources: the teacher "
                "classifies none of them as their source's label; lower --strength, or give --guidance_oh 1"
            )
        return near & agrees


def cosines(
    embedding: Embedding,
    sources_u8: Tensor,
    variants_u8: Tensor,
    source_index: Tensor,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Cosine between each variant and its source; every source is embedded once.

    Args:
        embedding: function from images (B, 3, H, W) in [0, 1] to embeddings (B, D).
        sources_u8: sources (N, 3, H, W) uint8, a tensor or ``MappedImages``.
        variants_u8: variants (M, 3, H, W) uint8 with M = N * V, a tensor or ``MappedImages``.
        source_index: (M,) int64, the row of each variant's source.
        batch_size: images embedded at a time.
        progress: progress function, called after each batch with its number of images, N + M in all.
    Returns:
        (M,) float32 on the CPU in [-1, 1]; 0 if an embedding is all zero.
    """
    assert len(variants_u8) == len(source_index)

    def embed(images_u8: Tensor) -> Tensor:
        unit = F.normalize(embedding(images_u8.float() / 255), dim=1).cpu()
        if progress:
            progress(len(images_u8))
        return unit

    if not len(variants_u8):
        return torch.empty(0)
    source_index, found = source_index.cpu(), torch.empty(len(variants_u8))
    starts = range(0, len(sources_u8), batch_size)
    counts = torch.bincount(source_index // batch_size, minlength=len(starts)).tolist()
    # Variants are embedded in the order of their sources, so that only one batch of source embeddings is held at a time.
    for start, mine in zip(starts, source_index.argsort(stable=True).split(counts)):
        sources = embed(sources_u8[start : start + batch_size])
        for part in mine.split(batch_size) if len(mine) else ():
            found[part] = (embed(variants_u8[part]) * sources[source_index[part] - start]).sum(1)
    return found.clamp(-1, 1)


@torch.no_grad()
def calibrated_omega(embedding: Embedding, images_u8: Tensor, labels: Tensor, most: int = 2000) -> float:
    """The default omega: the 99 % quantile of the cosines between bank images of different classes.

    Args:
        embedding: function from images (B, 3, H, W) in [0, 1] to embeddings (B, D).
        images_u8: bank images (N, 3, H, W) uint8.
        labels: labels (N,) of the bank images.
        most: largest number of images to compare; of more images, evenly spaced ones are taken.
    Returns:
        The ``OMEGA_QUANTILE`` quantile; -1, which keeps all variants, if there is only one class.
    """
    chosen = torch.arange(0, len(labels), -(-len(labels) // most))
    parts = (images_u8[part].float() / 255 for part in chosen.split(256))
    unit = torch.cat([F.normalize(embedding(part), dim=1).cpu() for part in parts])
    apart = labels[chosen][:, None] != labels[chosen][None, :]
    between = (unit @ unit.T)[apart]
    return torch.quantile(between, OMEGA_QUANTILE).item() if len(between) else -1.0


def keep_mask(cosine: Tensor, omega: float) -> Tensor:
    """Mask (M,) bool of the variants whose cosine (M,) is at least ``omega``; a NaN cosine is not kept.

    Raises:
        UserError: no variant would be kept.
    """
    keep = cosine >= omega
    if not keep.any():
        finite = cosine[cosine.isfinite()]
        if not len(finite):
            raise UserError(f"none of {len(cosine)} variants has a finite cosine to its source; try another --embedding")
        raise UserError(
            f"--omega {omega:g} keeps none of {len(cosine)} variants: the largest cosine is {finite.max():.3f}; "
            f"a lower --omega {_floor(finite.median()):.2f} would keep half"
        )
    return keep


def _floor(cosine: Tensor) -> float:
    """Rounds a cosine down to two decimal places, so that at least as many variants are kept."""
    return torch.floor(cosine * 100).item() / 100
