"""The two loops that the benchmark compares: a plain loop like public code of this field, and this project's loop."""

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from datafree.base import Synthesizer
from datafree.benchmark.measuring import Step
from datafree.generators import Generator, UpsampleConv2d, reset
from datafree.losses import BNStatistics, KLDistillation, bn_loss, kd_loss, one_hot_loss
from engine.data.crops import KeyedViews, Views
from engine.data.transfer_set import TransferSet
from engine.loops.distill import Distillation, Schedule
from engine.loops.logit_cache import STEPS, LogitCache
from engine.runtime.compilation import Compiler
from engine.runtime.precision import Precision

# A small copy of a published Fast run, which has 20 + 200 rounds of 256 images and 200 x 400 steps of 256. Each image of the
# bank is drawn as often as there (RUN_QUESTIONS), and the bank starts with the same share of its images (RUN_BEFORE). The
# cache of teacher logits therefore has the same share of hits.
RUN_ROUNDS, RUN_QUESTIONS, RUN_BEFORE = 6, 366, 1 / 11
ALWAYS = 10**9  # number of calls, large enough for "auto" to compile


class Plain:
    """A loop like public code of this field; see ``datafree.benchmark.__main__`` for its steps.

    Args:
        folder: class folders of PNG images.
        workers: number of DataLoader processes.
    """

    def __init__(self, info, teacher, student, folder: Path, batch_size: int, workers: int):
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        self.teacher = teacher.to(memory_format=torch.contiguous_format)
        self.student = student.to(memory_format=torch.contiguous_format).train()
        self.device = next(student.parameters()).device
        self.generator = _apart(Generator(256, info.image_size)).to(self.device)
        self.padding, self.batch_size = info.crop_padding, batch_size
        steps = [transforms.RandomCrop(info.image_size, padding=info.crop_padding)]
        steps += [transforms.RandomHorizontalFlip()] if info.flip else []
        pool = ImageFolder(str(folder), transforms.Compose([*steps, transforms.ToTensor()]))
        self.loader = torch.utils.data.DataLoader(
            pool, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )
        self.batches = self._endless()
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-3, momentum=0.9)
        self.z = torch.randn(batch_size, 256, device=self.device, requires_grad=True)
        self.labels = torch.randint(info.num_classes, (batch_size,), device=self.device)
        self.inversion_optimizer = torch.optim.Adam([*self.generator.parameters(), self.z], lr=1e-3)
        self.stats: list[tuple[Tensor, Tensor]] = []
        self.layers = [m for m in teacher.modules() if isinstance(m, _BatchNorm)]
        self.running = [(layer.running_mean, layer.running_var) for layer in self.layers]

    def _endless(self):
        while True:
            yield from self.loader

    def sample(self) -> None:
        images, _ = next(self.batches)
        images.to(self.device)

    def teacher_forward(self) -> None:
        with torch.no_grad():
            self.teacher(self.images).sum().item()

    @cached_property
    def images(self) -> Tensor:
        return next(self.batches)[0].to(self.device)

    def distillation(self) -> None:
        images, _ = next(self.batches)
        images = images.to(self.device)
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        loss = kd_loss(self.student(images), teacher_logits, 20.0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()

    def inversion(self) -> None:
        def record(layer, inputs, output):
            x = inputs[0]
            mean = x.mean([0, 2, 3])
            var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
            self.stats.append((mean, var))

        self.stats = []
        handles = [layer.register_forward_hook(record) for layer in self.layers]
        images = self.generator(self.z)
        padded = F.pad(images, [self.padding] * 4)
        top, left = torch.randint(2 * self.padding + 1, (2,)).tolist()
        size = images.shape[-1]
        logits = self.teacher(padded[:, :, top : top + size, left : left + size])
        loss = bn_loss(self.stats, self.running) + one_hot_loss(logits, self.labels)
        self.inversion_optimizer.zero_grad()
        loss.backward()
        self.inversion_optimizer.step()
        for handle in handles:
            handle.remove()
        loss.item()


class Ours:
    """This project's loop: student steps as in ``datafree_kd.py``, and inversion steps from the same parts.

    Args:
        columns: images and labels of the bank.
        compiler: compiles teacher, student step, generator and synthesis losses.
    """

    def __init__(
        self, info, teacher, student, columns: dict[str, Tensor], batch_size: int, precision: Precision, compiler: Compiler
    ):
        self.precision, self.batch_size = precision, batch_size
        device = precision.device
        self.transfer = TransferSet(len(columns["labels"]), info.image_size, device)
        self.transfer.add(columns["images"], columns["labels"])
        self.view = Views(info.crop_padding, info.flip)
        self.views = KeyedViews(self.view, len(self.transfer), device=device)
        schedule = Schedule(ALWAYS, 1, 1, batch_size, 1e-3, 0.9, 0.0, 0)
        parts = teacher, student, KLDistillation(20.0), Synthesizer(), schedule, precision
        self.loop, self.bar = Distillation(*parts, compile=compiler), SimpleNamespace(update=lambda: None)
        self.batches = self._endless()
        self.images = next(self.batches)[0]
        generator = reset(Generator(256, info.image_size)).to(device, memory_format=torch.channels_last)
        self.network, self.statistics = teacher, BNStatistics(teacher)
        self.z = torch.randn(batch_size, 256, device=device, requires_grad=True)
        self.labels = torch.randint(info.num_classes, (batch_size,), device=device)
        self.inversion_precision = precision.fresh()
        self.inversion_optimizer = torch.optim.Adam([*generator.parameters(), self.z], lr=1e-3)
        self.generator = compiler(generator, ALWAYS, "generator")
        self.synthesis_losses = compiler(self._synthesis_losses, ALWAYS, "synthesis losses")

    def _endless(self) -> Iterator[tuple[Tensor, ...]]:
        """Yields batches without end, in rounds of a hundred steps."""
        for round in count():
            yield from self.transfer.keyed_batches(self.batch_size, self.views, seed=round, steps=100)

    def _synthesis_losses(self, images: Tensor, labels: Tensor) -> Tensor:
        """The sum of L_bn and the cross-entropy of images (B, 3, S, S) for labels (B,), scalar."""
        with self.statistics.collect() as stats:
            logits = self.network(images)
        return bn_loss(stats, self.statistics.running) + one_hot_loss(logits, labels)

    def sample(self) -> None:
        next(self.batches)

    def teacher_forward(self) -> None:
        self.loop.teacher_outputs(self.images)

    def distillation(self) -> None:
        self.loop.student_steps(self.batches, 0, self.bar)

    def cached_steps(self, known: float) -> Step:
        """Returns a function that takes ``STEPS`` student steps; the share ``known`` of their teacher logits is cached."""
        device, block = self.precision.device, self.batch_size
        group, keys = STEPS * block, torch.randperm(len(self.views), device=device)
        old, fresh = keys.split(-(-len(keys) // 2))
        logit_cache = LogitCache(
            partial(self._compute_logits, self.transfer, self.views), len(keys), 4 * group, block, device
        )
        old = old[:group]
        logit_cache.prepare(old)
        used, unknown, starts = logit_cache.used, round((1 - known) * group), count()

        def step() -> None:
            places = next(starts) * unknown + torch.arange(unknown, device=device)
            new = fresh[places % len(fresh)]
            logit_cache.row_of[new], logit_cache.used = 0, used  # overwrites the rows of the previous call
            drawn = torch.cat([new, old[torch.randint(len(old), (group - unknown,), device=device)]])
            drawn = drawn[torch.randperm(group, device=device)].view(STEPS, block)
            logit_cache.prepare(drawn)
            self._steps(logit_cache, ((self.transfer.images_of_keys(self.views, keys), self.labels, keys) for keys in drawn))

        return step

    def small_run(self, few: int | None) -> float:
        """Takes all student steps of a small run (see ``RUN_ROUNDS``) and returns the share of cache hits.

        Args:
            few: number of views per image, as ``--views`` of a run; None: all views.
        """
        device, block = self.precision.device, self.batch_size
        images = max(2 * RUN_ROUNDS, RUN_ROUNDS * STEPS * block // RUN_QUESTIONS)
        transfer = TransferSet(images, self.images.shape[-1], device)
        views = KeyedViews(self.view, images, few, device=device)
        logit_cache = LogitCache(partial(self._compute_logits, transfer, views), len(views), len(views), block, device)
        for round in range(RUN_ROUNDS):
            end = -(-images * (RUN_BEFORE + (1 - RUN_BEFORE) * (round + 1) / RUN_ROUNDS) // 1)
            places = torch.arange(len(transfer), min(images, int(end))) % len(self.transfer)
            transfer.add(self.transfer.images[places], self.transfer.labels[places])
            plan = {"prepare": logit_cache.prepare, "steps": STEPS, "ahead": STEPS}
            self._steps(logit_cache, transfer.keyed_batches(block, views, seed=round, **plan))
        return 1 - logit_cache.misses / logit_cache.lookups

    def _compute_logits(self, transfer: TransferSet, views: KeyedViews, keys: Tensor) -> Tensor:
        return self.loop.teacher_outputs(transfer.images_of_keys(views, keys)).logits

    def _steps(self, logit_cache: LogitCache, batches: Iterator[tuple[Tensor, ...]]) -> None:
        """Takes ``STEPS`` student steps on ``batches`` with the teacher logits that ``logit_cache`` holds."""
        self.loop.logit_cache = logit_cache
        for _ in range(STEPS):
            self.loop.student_steps(batches, 0, self.bar)
        self.loop.logit_cache = None

    def inversion(self) -> None:
        with self.precision.autocast():
            loss = self.synthesis_losses(self.view(self.generator(self.z)), self.labels)
        self.inversion_precision.minimize(loss, self.inversion_optimizer)


def repeat(step: Step, times: int) -> None:
    """Takes ``times`` steps."""
    for _ in range(times):
        step()


def _apart(module: nn.Module) -> nn.Module:
    """Replaces every ``UpsampleConv2d`` in ``module`` by an upsampling and a convolution layer; returns ``module``."""
    for name, child in module.named_children():
        if isinstance(child, UpsampleConv2d):
            convolution = nn.Conv2d(child.in_channels, child.out_channels, 3, padding=1, bias=False)
            setattr(module, name, nn.Sequential(nn.Upsample(scale_factor=2), convolution))
        else:
            _apart(child)
    return module
