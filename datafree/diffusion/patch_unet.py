"""Network, noise schedule and file format of this project's own diffusion priors.

The network is a small class-conditional U-Net. It predicts v (Salimans & Ho 2022, arXiv 2202.00512) under the cosine
schedule (Nichol & Dhariwal 2021, arXiv 2102.09672). Time t runs from 0 (clean) to 1 (pure noise). Images are in [-1, 1] in
this module. With the angle phi = t * pi / 2,

    x_t = cos(phi) x + sin(phi) noise        v = cos(phi) noise - sin(phi) x        x = cos(phi) x_t - sin(phi) v

The command line takes the path of a prior's file. A prior that this project ships in ``checkpoints/priors`` can also be
given by its name: ``natural_32``, ``glyphs_digits_16``.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from engine.runtime.errors import UserError
from engine.runtime.tensors import load_tensors, save_tensors

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "priors"
GROUPS = 8


def angle(t: Tensor) -> Tensor:
    """The angle phi for times t (B,) in [0, 1], with shape (B, 1, 1, 1)."""
    return (t * (math.pi / 2)).view(-1, 1, 1, 1)


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The noisy images x_t (B, 3, H, W) at times t, (B,) or (1,).

    Args:
        clean: images (B, 3, H, W) in [-1, 1].
        noise: standard normal noise (B, 3, H, W).
    """
    phi = angle(t)
    return phi.cos() * clean + phi.sin() * noise


def velocity(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """v, the training target; arguments as in ``add_noise``."""
    phi = angle(t)
    return phi.cos() * noise - phi.sin() * clean


class PatchUNet(nn.Module):
    """A U-Net over blocks of ``patch`` x ``patch`` pixels: x_t (B, 3, H, W), t (B,), labels (B,) -> v (B, 3, H, W).

    Args:
        num_classes: number of classes C; label C is the null label.
        image_size: H = W in px, divisible by patch * 2 ** (levels - 1).
        patch: side of a block in px.
        channels: width of each level, from fine to coarse; multiples of 8.
        attention: whether the coarsest level has self-attention.
    """

    def __init__(self, num_classes: int, image_size: int, patch: int, channels: tuple[int, ...], attention: bool):
        from diffusers import UNet2DModel

        super().__init__()
        levels = len(channels)
        if image_size % (patch * 2 ** (levels - 1)) or any(width % GROUPS for width in channels):
            raise UserError(
                f"images of {image_size} px do not fit a diffusion model of patch {patch} and channels {channels}: image "
                f"sizes divisible by {patch * 2 ** (levels - 1)} and channels divisible by {GROUPS} wanted"
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


def load_patch_prior(path: Path) -> tuple[PatchUNet, dict[str, Any]]:
    """Loads a class-conditional pixel prior from a safetensors file.

    The file holds the tensors of ``PatchUNet.state_dict()``. Its metadata hold ``num_classes``, ``image_size``, ``patch``,
    ``channels``, ``attention``, ``class_names`` and ``name``, each as JSON.

    Returns:
        The network on the CPU, in float32 and eval mode, without gradients for its weights; and the metadata as Python
        values.
    Raises:
        UserError: the file is missing or truncated, or does not hold a pixel prior.
    """
    path = Path(path)
    tensors = load_tensors(path)
    try:
        about = metadata_of(path)
        sizes = [about["num_classes"], about["image_size"], about["patch"], *about["channels"]]
        if not all(type(size) is int and 0 < size <= 4096 for size in sizes) or not 0 < len(about["channels"]) <= 8:
            raise ValueError(f"sizes {sizes} are out of range")
        if len(about["class_names"]) != about["num_classes"]:
            raise ValueError(f"{len(about['class_names'])} names for {about['num_classes']} classes")
        about["channels"], about["class_names"] = tuple(about["channels"]), tuple(map(str, about["class_names"]))
        with torch.device("meta"):  # no memory before the shapes are known to fit
            network = PatchUNet(*(about[key] for key in ("num_classes", "image_size", "patch", "channels", "attention")))
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except (KeyError, ValueError, TypeError, RuntimeError, UserError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not a pixel prior written by python -m datafree.diffusion.train_prior ({reason}); give another file"
        ) from None
    return network.requires_grad_(False).eval(), about


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata in the file of a pixel prior, as Python values."""
    with safe_open(path, framework="pt") as file:
        return {name: json.loads(value) for name, value in (file.metadata() or {}).items()}


def save_patch_prior(path: Path, network: PatchUNet, about: dict[str, Any]) -> None:
    """Writes the weights in half precision and the metadata ``about`` as JSON, atomically; see ``load_patch_prior``."""
    weights = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_tensors(Path(path), weights, {name: json.dumps(value) for name, value in about.items()})


def shipped_prior(name: str) -> Path | None:
    """The file of a shipped prior, given its name without folder and suffix; None if no shipped prior has this name."""
    path = SHIPPED / f"{name}.safetensors"
    return path if Path(name).name == name and path.is_file() else None
