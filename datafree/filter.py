"""The image filter of DDA: how alike a variant and its source are in an embedding, and which variants stay.

Li et al., ACM MM 2024, arXiv 2410.17606: variant G_k of image f is kept iff cos(embed(G_k), embed(f)) >= omega. Neither
the embedding nor omega is known from the paper, whose figure keeps .83 and .76 and drops .45. Three embeddings here:

    teacher  penultimate features of the teacher: strictly data-free (default)
    clip     image embedding of CLIP (Radford et al. 2021, arXiv 2103.00020)
    dinov2   class token of DINOv2 (Oquab et al. 2023, arXiv 2304.07193)

Besides, ``agree`` asks that the teacher still names the source's label: this project's addition.

Cosines of one embedding mean nothing in another: between bank images of different classes, 99 % lie below .50 for a resnet20
of CIFAR-10 and below .84 for one of digits. So the default omega is measured, not fixed: ``calibrated_omega``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.diffusion.guidance import Judgement
from datafree.diffusion.hub import hub_errors, quiet_libraries
from engine.runtime.errors import UserError

Embedding = Callable[[Tensor], Tensor]

DEFAULT_MODELS = {"clip": "openai/clip-vit-base-patch32", "dinov2": "facebook/dinov2-small"}
EMBEDDINGS = ("teacher", "clip", "dinov2")
OMEGA_QUANTILE = 0.99
MODEL_TYPES = {"clip": ("clip", "clip_vision_model"), "dinov2": ("dinov2", "dinov2_with_registers")}
# (mean, std) where the model's directory has no preprocessor_config.json.
NORMALIZATION = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def build_embedding(
    kind: str,
    model_id: str | None = None,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Embedding:
    """An embedding by name: images (B, 3, H, W) float32 in [0, 1] -> (B, D) float32 on ``device``.

    Args:
        kind: "teacher", "clip" or "dinov2".
        model_id: hub id or local directory of a pretrained one; None: ``DEFAULT_MODELS``.
        teacher: for "teacher"; eval mode, ``teacher(images, return_features=True).features`` is (B, D).
        dtype: of a pretrained model's weights.
    Raises:
        UserError: the pretrained model cannot be had, or is of another kind.
    """
    if kind == "teacher":
        return _TeacherEmbedding(teacher, device)
    return _PretrainedEmbedding(kind, model_id or DEFAULT_MODELS[kind], device, dtype)


def check_embedding(kind: str, model_id: str | None) -> None:
    """That the pretrained model of an embedding is there and of its kind, by its configuration alone.

    Raises:
        UserError: it is not.
    """
    if kind == "teacher":
        return
    from transformers import AutoConfig

    quiet_libraries()
    with hub_errors(model_id, None, "--embedding_model"):
        config = AutoConfig.from_pretrained(model_id)
    if config.model_type not in MODEL_TYPES[kind]:
        raise UserError(f"--embedding_model {model_id} holds a model of type {config.model_type}, but {kind} is wanted")


class _TeacherEmbedding:
    def __init__(self, teacher: nn.Module, device: torch.device | str):
        self.teacher, self.device = teacher, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.teacher(images.to(self.device), return_features=True).features.flatten(1).float()


class _PretrainedEmbedding:
    """CLIP or DINOv2 at its own input size: the whole image, antialiased bicubic, its own mean and std.

    DINOv2's published preprocessing crops the centre out of a larger resize; inverted images have no margin to lose.
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
        """Side of the input in px, mean and std: the preprocessor's where there is one."""
        from transformers import ImageProcessingMixin

        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(model_id)
        except OSError:
            settings = {}
        mean, std = NORMALIZATION[self.kind]
        size = self.model.config.image_size
        if self.kind == "dinov2":  # its configuration names the 518 px of its last training phase
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
    """The filter of a run: ``engine.loops.makers`` calls it.

    Args:
        name: of the embedding, for the file of the cosines.
        omega: the least cosine that stays; None: ``calibrated_omega``.
        build: makes the embedding, when it is first needed.
        judge: what the teacher says of images, ``datafree.diffusion.guidance.Judgement``.
        agree: whether only variants stay to which the teacher gives their source's label.
        check: raises a UserError where it could not be built.
    """

    name: str
    omega: float | None
    build: Callable[[], Embedding]
    judge: Judgement
    agree: bool = False
    check: Callable[[], None] = lambda: None

    def score(self, sources: dict[str, Any], variants: dict[str, Any], show: Callable[[int], None]) -> tuple[Tensor, float]:
        """The cosine of each variant to its source (M,), and the calibrated omega.

        Args:
            sources: images (N, 3, H, W) uint8, labels (N,).
            variants: images (M, 3, H, W) uint8, source_index (M,).
            show: called with the number of images embedded since.
        """
        embedding = self.build()
        cosine = cosines(embedding, sources["images"], variants["images"], variants["source_index"], progress=show)
        return cosine, calibrated_omega(embedding, sources["images"], sources["labels"])

    def keep(self, cosine: Tensor, omega: float, agrees: Tensor) -> Tensor:
        """``keep_mask`` and, with ``agree``, those to which the teacher gives their source's label, (M,) bool.

        Raises:
            UserError: none would stay.
        """
        near = keep_mask(cosine, omega)
        if not self.agree:
            return near
        if not (near & agrees).any():
            raise UserError(
                f"--agree keeps none of the {int(near.sum())} variants that are near enough to their sources: the teacher names "
                "none of them as its source; lower --strength, or give --guidance_oh 1"
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
        embedding: images (B, 3, H, W) in [0, 1] -> (B, D).
        sources_u8: (N, 3, H, W) uint8, a tensor or ``MappedImages``.
        variants_u8: (M, 3, H, W) uint8, M = N * V, likewise.
        source_index: (M,) int64, the row of each variant's source.
        batch_size: images embedded at a time.
        progress: called with the number of images after each batch, N + M in all.
    Returns:
        (M,) float32 on the CPU in [-1, 1]; 0 where an embedding is all zero.
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
    # Variants in the order of their sources, so that the embeddings of one batch of sources are all that is held.
    for start, mine in zip(starts, source_index.argsort(stable=True).split(counts)):
        sources = embed(sources_u8[start : start + batch_size])
        for part in mine.split(batch_size) if len(mine) else ():
            found[part] = (embed(variants_u8[part]) * sources[source_index[part] - start]).sum(1)
    return found.clamp(-1, 1)


@torch.no_grad()
def calibrated_omega(embedding: Embedding, images_u8: Tensor, labels: Tensor, most: int = 2000) -> float:
    """The default omega: a variant must be closer to its source than 99 % of bank images of other classes are.

    Args:
        embedding: images (B, 3, H, W) in [0, 1] -> (B, D).
        images_u8: (N, 3, H, W) uint8; labels: (N,). Of more than ``most``, evenly spaced ones are compared.
    Returns:
        The ``OMEGA_QUANTILE`` of the cosines between images of different classes; -1, which keeps all, if there is one class.
    """
    chosen = torch.arange(0, len(labels), -(-len(labels) // most))
    parts = (images_u8[part].float() / 255 for part in chosen.split(256))
    unit = torch.cat([F.normalize(embedding(part), dim=1).cpu() for part in parts])
    apart = labels[chosen][:, None] != labels[chosen][None, :]
    between = (unit @ unit.T)[apart]
    return torch.quantile(between, OMEGA_QUANTILE).item() if len(between) else -1.0


def keep_mask(cosine: Tensor, omega: float) -> Tensor:
    """Which variants stay, (M,) bool: those of cosine (M,) at least ``omega``; a NaN does not stay.

    Raises:
        UserError: none would stay.
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
    """Rounded down to two places, so that at least as many are kept."""
    return torch.floor(cosine * 100).item() / 100
