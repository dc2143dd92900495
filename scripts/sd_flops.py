"""Counts what ImageNet-1k costs with Stable Diffusion v1-5: docs/many_devices.md. Nothing is downloaded, nothing is run.

    python scripts/sd_flops.py                                   print the tables
    python scripts/sd_flops.py --peak 700 --classifiers .2       with a machine's own figures in place of those assumed
    python scripts/sd_flops.py --into docs/many_devices.md       rewrite the tables of the page

Networks are built from their published configurations on the meta device, where operators have shapes and no data, and
torch counts two operations a multiply-add of matrix products and convolutions, attention's among them. Normalization,
activations and resizing are not counted.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from engine.networks.build import build_network  # noqa: E402
from engine.report import markdown, replace_table, synthesis_and_distillation  # noqa: E402
from engine.runtime.errors import run_command  # noqa: E402
from engine.runtime.files import read_json  # noqa: E402
from registry import MODELS  # noqa: E402

UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,  # 8 heads, in spite of the name
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}  # fmt: skip
VAE = {
    "sample_size": 512, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768,
}  # fmt: skip
TOKENS = 77  # of a prompt
FACTOR = 8  # px a latent pixel

BOTH = "UNet and decoder"  # the way of the teacher's gradient that the tables start from
GPUS = (8, 64, 512)
A_NODE = 8  # GPUs
IMAGES = (100_000, 200_000, 1_281_167)  # the last is ImageNet-1k's training split
TESTED = 50_000  # images of its validation split
SIZES = (512, 256)  # px at which the prior draws
IMAGE_BYTES = 3 * 224**2  # of the bank, uint8
STEPS = 50  # denoising steps
BATCH, ROUND, DRAWN_TOGETHER = 256, 200, 16  # --batch_size, --synthesis_batch_size, --diffusion_batch_size: defaults
KD_STEPS = 200  # of an epoch, the default
ROOM = 32  # images a GPU and student step, from which on a GPU is busy and BN statistics mean something


@dataclass(frozen=True)
class Cost:
    """Of one image through a network: parameters, operations forward, and of the way back."""

    parameters: int
    forward: int
    backward: int = 0

    @property
    def both(self) -> int:
        return self.forward + self.backward


def counted(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a function returns, and its operations."""
    with FlopCounterMode(display=False) as counter:
        value = function()
    return value, counter.get_total_flops()


def cost(module: nn.Module, run: Callable[[], Tensor], to: Tensor | None = None) -> Cost:
    """Of ``run``, and of the way back to a tensor with frozen weights; without one to the weights, if they want it."""
    module.requires_grad_(to is None)
    output, forward = counted(run)
    targets = list(module.parameters()) if to is None else [to]
    _, backward = counted(lambda: torch.autograd.grad(output.sum(), targets)[0])
    return Cost(sum(p.numel() for p in module.parameters()), forward, backward)


def costs() -> dict[str, Cost]:
    """Every network's, by name and image size in px."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    found = {}
    with torch.device("meta"):
        unet, decoder = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE).decoder
        text = CLIPTextModel(CLIPTextConfig(**TEXT))
        teacher, student = (build_network(MODELS, f"{name}_imagenet", 1000) for name in ("resnet34", "resnet18"))
        time, words = torch.zeros((), dtype=torch.long), torch.zeros(1, TOKENS, dtype=torch.long)
        prompt, picture = torch.zeros(1, TOKENS, TEXT["hidden_size"]), torch.zeros(1, 3, 224, 224, requires_grad=True)
        for size in SIZES:
            z = torch.zeros(1, UNET["in_channels"], size // FACTOR, size // FACTOR, requires_grad=True)
            found[f"UNet {size}"] = cost(unet, lambda z=z: unet(z, time, encoder_hidden_states=prompt).sample, z)
            found[f"decoder {size}"] = cost(decoder, lambda z=z: decoder(z), z)
        _, forward = counted(lambda: text(words).last_hidden_state)
        found["text"] = Cost(sum(p.numel() for p in text.parameters()), forward)
        found["teacher"] = cost(teacher.eval(), lambda: teacher(picture), picture)
        found["student"] = cost(student.train(), lambda: student(picture.detach()))
    return found


def drawing(found: dict[str, Cost], size: int) -> dict[str, tuple[int, int]]:
    """Operations of one image of ``STEPS`` denoising steps under classifier-free guidance, by the gradient's way.

    At every step (``datafree.diffusion.guidance``): two passes of the UNet, with and without the prompt; and for the
    teacher's gradient the decoder and the teacher there and back, and the UNet's two passes back. The decoder once more at
    the end. In micro-batches the way there is gone once for the images and again for the gradient. The teacher is float32.

    Returns:
        {way: (in half precision, in float32)}.
    """
    unet, decoder, teacher = found[f"UNet {size}"], found[f"decoder {size}"], found["teacher"].both
    there, back = 2 * unet.forward, 2 * unet.backward
    a_step = {
        BOTH: (there + back + decoder.both, teacher),
        "both, in micro-batches": (2 * there + back + decoder.forward + decoder.both, teacher),
        "decoder alone": (there + decoder.both, teacher),
        "unguided": (there, 0),
    }
    return {way: (STEPS * half + decoder.forward, STEPS * full) for way, (half, full) in a_step.items()}


def tables(peak: float = 989, diffusion: float = 0.35, classifiers: float = 0.1) -> dict[str, str]:
    """Every table of the page, by name.

    Args:
        peak: TFLOP/s of one GPU in bf16, dense.
        diffusion, classifiers: shares of it that the two kinds of networks reach.
    """
    found = costs()
    drawn = {(size, way): work for size in SIZES for way, work in drawing(found, size).items()}
    # float32 is TF32 here, at half the rate
    seconds = {key: (half + 2 * full) / (peak * 1e12 * diffusion) for key, (half, full) in drawn.items()}
    learning = found["teacher"].forward + found["student"].both  # operations an image and pass
    learned = peak * 1e12 * classifiers / learning  # images/s of one GPU
    return {
        "sd_flops": markdown(counts(found)),
        "drawing": markdown([drawing_row(*key, sum(drawn[key]), seconds[key]) for key in drawn]),
        "distilling": markdown([distilling_row(epochs, learning, learned) for epochs in (100, 200)]),
        "bank": markdown([bank_row(images) for images in IMAGES]),
        "limits": markdown(limits(found, learned, seconds[SIZES[0], BOTH])),
        "alone": markdown([alone(method) for method in ("csd", "dda")]),
    }


def counts(found: dict[str, Cost]) -> list[dict[str, str]]:
    """Rows of what was counted."""
    names = {"UNet": "UNet, one pass", "decoder": "VAE decoder", "text": "text encoder, 77 tokens"}
    names |= {"teacher": "resnet34, way back to the image", "student": "resnet18, way back to the weights"}
    rows = []
    for key, c in found.items():
        name, _, size = key.partition(" ")
        back = f"{c.backward / 1e9:,.1f}" if c.backward else ""
        px = size or ("" if name == "text" else "224")
        row = {"network": names[name], "px": px, "parameters, M": f"{c.parameters / 1e6:.1f}"}
        rows.append(row | {"forward, GFLOP": f"{c.forward / 1e9:,.1f}", "way back, GFLOP": back})
    return rows


def drawing_row(size: int, way: str, work: int, seconds: float) -> dict[str, str]:
    """What drawing costs: operations an image, seconds of a GPU an image, hours."""
    row = {"px": str(size), "gradient through": way, "TFLOP an image": f"{work / 1e12:.0f}", "s an image": f"{seconds:.2f}"}
    row |= {f"GPU-hours for {n:,}": f"{n * seconds / 3600:.0f}" for n in IMAGES}
    return row | {f"hours on {gpus}": f"{IMAGES[-1] * seconds / 3600 / gpus:.1f}" for gpus in GPUS}


def distilling_row(epochs: int, learning: int, learned: float) -> dict[str, str]:
    """What distilling costs if it is cut into parts without loss."""
    images = epochs * IMAGES[-1]
    row = {"passes": str(epochs), "EFLOP": f"{images * learning / 1e18:.1f}", "GPU-hours": f"{images / learned / 3600:.1f}"}
    return row | {f"minutes on {gpus}": f"{images / learned / 60 / gpus:.1f}" for gpus in GPUS}


def bank_row(images: int) -> dict[str, str]:
    """What a bank of uint8 images takes."""
    return {"images": f"{images:,}"} | {f"{size} px, GB": f"{3 * size**2 * images / 1e9:.0f}" for size in (224, 512)}


def limits(found: dict[str, Cost], learned: float, seconds: float) -> list[dict[str, str]]:
    """What ``GPUS`` ask of everything that is no GPU.

    Args:
        learned: images/s that one GPU distills.
        seconds: that one GPU takes to draw an image.
    """
    bank = IMAGES[-1] * IMAGE_BYTES / 1e9  # GB
    seen = found["student"].forward / (learned * (found["teacher"].forward + found["student"].both))  # s an image
    batches = -(-ROUND // DRAWN_TOGETHER)
    all_reduce = {gpus: 2 * (gpus - 1) / gpus * 4 * found["student"].parameters for gpus in GPUS}  # bytes, of a ring
    quantities: dict[str, Callable[[int], str]] = {
        "nodes": lambda n: f"{n // A_NODE}",
        "drawing: GPUs busy in a round of the default size, %": lambda n: f"{100 * batches / (n * -(-batches // n)):.0f}",
        "drawing: smallest round in which all are busy, images": lambda n: f"{n * DRAWN_TOGETHER:,}",
        "drawing: such a round, GB to process 0": lambda n: f"{n * DRAWN_TOGETHER * IMAGE_BYTES / 1e9:.2f}",
        "drawing: such a round, s": lambda n: f"{DRAWN_TOGETHER * seconds:.1f}",
        "drawing: images to process 0, MB/s": lambda n: f"{n / seconds * IMAGE_BYTES / 1e6:.1f}",
        f"distilling: images a GPU at batch {BATCH}": lambda n: f"{BATCH / n:g}",
        "distilling: such a step's arithmetic, ms": lambda n: f"{1000 * BATCH / n / learned:.2f}",
        "distilling: all-reduce a GPU and step, MB": lambda n: f"{all_reduce[n] / 1e6:.0f}",
        "distilling: all-reduce a GPU in that time, GB/s": lambda n: f"{all_reduce[n] / 1e9 * n * learned / BATCH:.0f}",
        f"distilling: batch at {ROOM} images a GPU": lambda n: f"{ROOM * n:,}",
        "distilling: all-reduce a GPU at that batch, GB/s": lambda n: f"{all_reduce[n] / 1e9 * learned / ROOM:.0f}",
        "distilling: steps of 100 passes at that batch": lambda n: f"{100 * IMAGES[-1] // (ROOM * n):,}",
        "distilling: s a pass": lambda n: f"{IMAGES[-1] / learned / n:.1f}",
        f"distilling: an epoch of {KD_STEPS} such steps, s": lambda n: f"{KD_STEPS * ROOM / learned:.1f}",
        "distilling: test accuracy by process 0, s": lambda n: f"{TESTED * seen:.1f}",
        "distilling: bank reads a node, GB/s": lambda n: f"{A_NODE * learned * IMAGE_BYTES / 1e9:.1f}",
        "distilling: bank reads of all nodes, GB/s": lambda n: f"{n * learned * IMAGE_BYTES / 1e9:.0f}",
        "distilling: the whole bank for each process of a node, GB": lambda n: f"{A_NODE * bank:.0f}",
        "distilling: the bank cut into a part a GPU, GB": lambda n: f"{bank / n:.1f}",
        "distilling: into the page caches of all nodes, TB": lambda n: f"{n // A_NODE * bank / 1e3:.1f}",
    }
    return [{"GPUs": name} | {str(n): of(n) for n in GPUS} for name, of in quantities.items()]


def alone(method: str) -> dict[str, str]:
    """Amdahl's law for a method whose rounds of synthesis the main process makes alone, from its finished CIFAR-10 run."""
    making, learning = synthesis_and_distillation(read_json(ROOT / f"checkpoints/results/cifar10/{method}/result.json"))
    part = making / (making + learning)
    row = {"method": method, "synthesis, % of its CIFAR-10 run": f"{100 * part:.0f}"}
    return row | {f"times as fast on {n}, at most": f"{1 / (part + (1 - part) / n):.2f}" for n in GPUS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a GPU in bf16, dense [989: H100, H200]")
    parser.add_argument("--diffusion", type=float, default=0.35, help="share of it that UNet and decoder reach [0.35]")
    parser.add_argument("--classifiers", type=float, default=0.1, help="share that teacher and student reach [0.1]")
    parser.add_argument("--into", type=Path, help="rewrite the tables in this file instead of printing them")
    args = parser.parse_args()
    for name, table in tables(args.peak, args.diffusion, args.classifiers).items():
        if args.into:
            replace_table(args.into, name, table)
        else:
            print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    run_command(main)
