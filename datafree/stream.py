"""Shared code of the streaming methods: the student learns from a generator's newest images, and no image is kept.

A round is ``g_steps`` steps of the generator, then ``kd_steps`` student steps on images from fresh noise.

The default temperature is 1. Published scripts of DAFL, ZSKT and DFQ pass ``--T 20``. The training loops of CMI and Fast,
which produced the published tables, replace that loss by KL at temperature 1. Only CSD's loop uses T 20.

Deviations:
- The generator's BN layers always normalize by batch statistics, as in Fast's loop. The loops of CMI and CSD switch the
  generator to running averages while the student learns. With one generator step per round these averages lag behind the
  weights, and the student would see images of a different function than the trained one.
- The generator is initialized from N(0, .02), as in the other methods. The published loops keep PyTorch's initialization.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datafree.base import ImageBatch, Method, Synthesizer, Task
from datafree.generators import LARGE, Generator, reset
from datafree.losses import KLDistillation
from engine.runtime.compilation import CompileTarget
from engine.runtime.flags import flag

DISTILL = ("distill",)


def lr_schedule_flag(default: str):
    """Returns the flag lr_g_schedule with the given default."""
    text = "schedule of the generator's learning rate; student: proportional to the student's learning rate"
    return flag(default, text, choices=("constant", "student"), affects=DISTILL)


@dataclass(frozen=True)
class StreamConfig:
    """Flags of every method with a streaming generator."""

    g_steps: int = flag(1, "generator steps per round", affects=DISTILL, least=1)
    synthesis_batch_size: int = flag(256, "images per generator step", affects=DISTILL, least=1, most=1_000_000)
    lr_g: float = flag(1e-3, "Adam learning rate of the generator", affects=DISTILL, above=0)
    lr_g_schedule: str = lr_schedule_flag("constant")
    nz: int = flag(256, "length of the generator's noise vector", affects=DISTILL, least=1)
    T: float = flag(1.0, "temperature of the distillation loss", affects=DISTILL, above=0)


class GeneratorStream(Synthesizer):
    """One generator, trained during the whole run. Subclasses define its loss in ``losses``."""

    def __init__(self, config: StreamConfig, teacher: nn.Module, task: Task):
        self.config, self.teacher, self.task = config, teacher, task
        generator = reset(Generator(config.nz, task.info.image_size, LARGE))
        self.generator = generator.to(task.device, memory_format=torch.channels_last).train()
        self.shared = self.generator
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.lr_g, betas=(0.5, 0.999), fused=True)
        self.precision = task.precision.fresh()
        self.run_generator, self.measure = self.generator, self.losses

    def losses(self, images: Tensor, student: nn.Module) -> dict[str, Tensor]:
        """Named losses of generated images (B, 3, H, W); "loss" is their weighted sum."""
        raise NotImplementedError

    def generate(self, count: int) -> Tensor:
        """Images (count, 3, H, W) in [0, 1] from fresh noise."""
        with self.task.precision.autocast():
            return self.run_generator(torch.randn(count, self.config.nz, device=self.task.device)).float()

    def compile_targets(self) -> list[CompileTarget]:
        return [
            CompileTarget(self, "run_generator", self.config.g_steps + self.task.kd_steps, "generator"),
            CompileTarget(self, "measure", self.config.g_steps, "synthesis losses"),
        ]

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Takes ``g_steps`` generator steps; returns the image batch of the last one."""
        if self.config.lr_g_schedule == "student":
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr_g * self.lr_factor
        for _ in range(self.config.g_steps):
            images = self.generate(self.config.synthesis_batch_size)
            losses = self.measure(images, student)
            self.precision.minimize(losses["loss"], self.optimizer)
        scalars = {("loss_synthesis" if name == "loss" else name): value.detach() for name, value in losses.items()}
        return ImageBatch(images.detach(), unlabelled(images), scalars)

    def batches(self, batch_size: int, *, seed: int, rank: int = 0, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of new images, without augmentation, with labels -1."""
        while True:
            with torch.no_grad():
                images = self.generate(batch_size // count)
            yield images, unlabelled(images)

    def state_dict(self) -> dict[str, Any]:
        """State of the generator, its optimizer and its loss scale."""
        parts = {"generator": self.generator, "optimizer": self.optimizer, "precision": self.precision}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_state_dict(state.get("precision", {}))


def unlabelled(images: Tensor) -> Tensor:
    """Labels (B,) of -1, for images that were made for no class."""
    return torch.full((len(images),), -1, device=images.device)


class StreamingMethod(Method):
    """Method with stage distill only. The default student loss is KL at temperature T."""

    streams = True
    defaults = {"epochs": 200, "kd_steps": 5, "ep_steps": 400, "batch_size": 256, "lr": 0.1}

    def objective(self) -> nn.Module:
        return KLDistillation(self.config.T)
