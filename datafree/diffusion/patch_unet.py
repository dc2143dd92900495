"""The network of this project's own diffusion priors, the noise that it takes away, and the file that holds its weights.

A small class-conditional U-Net learns to predict v (Salimans & Ho 2022, arXiv 2202.00512) under the cosine schedule
(Nichol & Dhariwal 2021, arXiv 2102.09672). Time t runs from 0 (clean) to 1 (pure noise); images are in [-1, 1] here. With
the angle phi = t * pi / 2,

    x_t = cos(phi) x + sin(phi) noise        v = cos(phi) noise - sin(phi) x        x = cos(phi) x_t - sin(phi) v

A prior's file is named on the command line by its path, or, where this project ships it in ``checkpoints/priors``, by its
name alone: ``natural_32``, ``glyphs_digits_16``.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from engine.runtime.errors import UserError
from engine.runtime.files import load_tensors, save_tensors

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "priors"
GROUPS = 8


def angle(t: Tensor) -> Tensor:
    """phi of t in [0, 1], shaped (B, 1, 1, 1) to go with images."""
    return (t * (math.pi / 2)).view(-1, 1, 1, 1)


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of clean images in [-1, 1] and standard normal noise, both (B, 3, H, W); t is (B,) or (1,)."""
    phi = angle(t)
    return phi.cos() * clean + phi.sin() * noise


def velocity(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """v, the target of training; arguments as in ``add_noise``."""
    phi = angle(t)
    return phi.cos() * noise - phi.sin() * clean


def clean_estimate(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The clean image that x_t and v imply, (B, 3, H, W), not clamped."""
    phi = angle(t)
    return phi.cos() * x_t - phi.sin() * v


def ddim_step(x_t: Tensor, clean: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """From time t > 0 to t_next < t along the noise that x_t holds if ``clean`` is its clean image."""
    phi = angle(t)
    return add_noise(clean, (x_t - phi.cos() * clean) / phi.sin(), t_next)


class PatchUNet(nn.Module):
    """A U-Net over ``patch`` x ``patch`` blocks of pixels, (B, 3, H, W), t (B,), labels (B,) -> v (B, 3, H, W).

    Args:
        num_classes: C; label C is the null label.
        image_size: H = W in px, divisible by patch * 2 ** (levels - 1).
        channels: width of each level, from fine to coarse; multiples of 8.
        attention: self-attention at the coarsest level.
    """

    def __init__(self, num_classes: int, image_size: int, patch: int, channels: tuple[int, ...], attention: bool):
        from diffusers import UNet2DModel

        super().__init__()
        levels = len(channels)
        if image_size % (patch * 2 ** (levels - 1)) or any(width % GROUPS for width in channels):
            raise UserError(
                f"images of {image_size} px do not fit a diffusion model of patch {patch} and channels {channels}: each of "
                f"the {levels} levels halves the image, and channels are multiples of {GROUPS}"
            )
        self.patch = patch
        self.unet = UNet2DModel(
            sample_size=image_size // patch,
            in_channels=3 * patch**2,
            out_channels=3 * patch**2,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            block_out_channels=channels,
            layers_per_block=1,
            norm_num_groups=GROUPS,
            add_attention=attention,
            attention_head_dim=channels[-1] // 4,
            num_class_embeds=num_classes + 1,
        )

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        blocks = F.pixel_unshuffle(x_t, self.patch).contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(self.unet(blocks, t * 1000, class_labels=labels).sample, self.patch)


@torch.no_grad()
def denoise(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_t: Tensor,
    times: Tensor,
    labels: Tensor,
    null_label: int,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Images from noise by deterministic DDIM (Song et al. 2020, arXiv 2010.02502), one network call a step.

    Args:
        network: (x_t, t, labels) -> v.
        x_t: (B, 3, H, W) at time ``times[0]``.
        times: (K + 1,) falling; the last is 0.
        labels: (B,) int64.
        guidance_scale: of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); 1 is none, any other doubles
            the calls.
    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    for t, t_next in zip(times[:-1], times[1:]):
        now = t.expand(len(x_t))
        v = network(x_t, now, labels).float()
        if guidance_scale != 1:
            unconditional = network(x_t, now, torch.full_like(labels, null_label)).float()
            v = unconditional + guidance_scale * (v - unconditional)
        x_t = ddim_step(x_t, clean_estimate(x_t, v, t).clamp(-1, 1), t, t_next)
    return x_t.clamp(-1, 1)


def load_patch_prior(path: Path) -> tuple[PatchUNet, dict[str, Any]]:
    """A class-conditional pixel prior from one safetensors file.

    The file's tensors are those of ``PatchUNet.state_dict()``; its metadata hold, as JSON, ``num_classes``, ``image_size``,
    ``patch``, ``channels``, ``attention``, ``class_names`` and ``name``.

    Returns:
        The network in float32, eval mode and without gradients to its weights, on the CPU: (x_t, t, labels) -> v with
        images in [-1, 1] and ``num_classes`` as the null label; and the metadata as Python values.
    Raises:
        UserError: the file is missing, truncated or something else.
    """
    path = Path(path)
    tensors = load_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        about = {name: json.loads(value) for name, value in metadata.items()}
        sizes = [about["num_classes"], about["image_size"], about["patch"], *about["channels"]]
        if not all(type(size) is int and 0 < size <= 4096 for size in sizes) or not 0 < len(about["channels"]) <= 8:
            raise ValueError(f"sizes {sizes} are out of range")
        if len(about["class_names"]) != about["num_classes"]:
            raise ValueError(f"{len(about['class_names'])} names for {about['num_classes']} classes")
        about["channels"], about["class_names"] = tuple(about["channels"]), tuple(map(str, about["class_names"]))
        with torch.device("meta"):  # no memory before the shapes are known to fit
            network = PatchUNet(*(about[key] for key in ("num_classes", "image_size", "patch", "channels", "attention")))
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"NaN or infinite weights in {bad[0]}")
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except (KeyError, ValueError, TypeError, RuntimeError, UserError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is no pixel prior as python -m datafree.diffusion.train_prior writes it ({reason})"
        ) from None
    return network.requires_grad_(False).eval(), about


def save_patch_prior(path: Path, network: "PatchUNet", about: dict[str, Any]) -> None:
    """Writes the weights in half precision, and ``about`` as JSON, as ``load_patch_prior`` wants them; atomic."""
    weights = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_tensors(Path(path), weights, {name: json.dumps(value) for name, value in about.items()})


def shipped_prior(name: str) -> Path | None:
    """The file of a prior that this project ships, by its name without folder or suffix; None: there is no such one."""
    path = SHIPPED / f"{name}.safetensors"
    return path if Path(name).name == name and path.is_file() else None
