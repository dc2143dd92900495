"""What each loop does on this machine, and its ratio to the plain loop of the field, measured in turns in one run.

    python -m engine.benchmark --teacher resnet20 --student wrn16_1

The plain loop is what public code of this field does: images as PNG files behind a DataLoader with worker processes,
contiguous NCHW tensors, mean and variance of every BN input in two passes, upsampling and convolution apart, and a loss
read back at every step. Both loops compute the same losses on networks of the same weights.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from datafree.bank import ImageBank, Manifest, TransferSet, export_folders
from datafree.bn_statistics import BNStatistics, bn_loss
from datafree.generators import Generator, UpsampleConv2d, reset
from datafree.losses import kd_loss, one_hot_loss
from engine.augmentation import crop_flip
from engine.data import dataset_info
from engine.errors import run_command
from engine.networks import build_classifier
from engine.precision import AMP, Precision, choose_device
from engine.report import markdown, replace_table
from engine.run import machine, peak_memory
from models.classifier import frozen


class Plain:
    """The field's loop."""

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

    @property
    def images(self) -> Tensor:
        if not hasattr(self, "_images"):
            self._images = next(self.batches)[0].to(self.device)
        return self._images

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
    """This project's loop, from the same pieces as ``datafree_kd.py``."""

    def __init__(self, info, teacher, student, columns: dict[str, Tensor], batch_size: int, precision: Precision):
        self.teacher, self.student, self.precision, self.info = teacher, student.train(), precision, info
        device = precision.device
        transfer = TransferSet(len(columns["labels"]), info.image_size, device)
        transfer.add(columns["images"], columns["labels"])
        self.batches = transfer.batches(batch_size, self.view, seed=0)
        self.images = next(self.batches)[0]
        self.generator = reset(Generator(256, info.image_size)).to(device, memory_format=torch.channels_last)
        self.statistics = BNStatistics(teacher)
        self.optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.z = torch.randn(batch_size, 256, device=device, requires_grad=True)
        self.labels = torch.randint(info.num_classes, (batch_size,), device=device)
        self.inversion_optimizer = torch.optim.Adam([*self.generator.parameters(), self.z], lr=1e-3)

    def view(self, images: Tensor) -> Tensor:
        return crop_flip(images, self.info.crop_padding, self.info.flip)

    def sample(self) -> None:
        next(self.batches)

    def teacher_forward(self) -> None:
        with torch.no_grad(), self.precision.autocast():
            self.teacher(self.images)

    def distillation(self) -> None:
        images, _ = next(self.batches)
        with self.precision.autocast():
            with torch.no_grad():
                teacher_logits = self.teacher(images)
            logits = self.student(images)
        self.precision.minimize(kd_loss(logits, teacher_logits, 20.0), self.optimizer)

    def inversion(self) -> None:
        with self.statistics.collect() as stats, self.precision.autocast():
            logits = self.teacher(self.view(self.generator(self.z)))
        loss = bn_loss(stats, self.statistics.running) + one_hot_loss(logits, self.labels)
        self.precision.minimize(loss, self.inversion_optimizer)


def _apart(module: nn.Module) -> nn.Module:
    """Every ``UpsampleConv2d`` as the two layers that it stands for."""
    for name, child in module.named_children():
        if isinstance(child, UpsampleConv2d):
            convolution = nn.Conv2d(child.in_channels, child.out_channels, 3, padding=1, bias=False)
            setattr(module, name, nn.Sequential(nn.Upsample(scale_factor=2), convolution))
        else:
            _apart(child)
    return module


def rate(step: Callable[[], None], images: int, seconds: float, device: torch.device) -> float:
    """Images a second of one loop over about ``seconds``, after one step unmeasured."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    step()
    begun, steps = now(), 0
    while (passed := now() - begun) < seconds or steps < 2:
        step()
        steps += 1
    return steps * images / passed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet20", help="a name of registry.MODELS [resnet20]")
    parser.add_argument("--student", default="wrn16_1", help="a name of registry.MODELS [wrn16_1]")
    parser.add_argument("--dataset", default="cifar10", help="for image size and classes; its data are not opened [cifar10]")
    parser.add_argument("--batch_size", type=int, default=256, help="images a step [256]")
    parser.add_argument("--bank", type=int, default=4096, help="random images in the bank [4096]")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader processes of the plain loop [2]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement [4]")
    parser.add_argument("--repeats", type=int, default=3, help="measurements in turn; the median counts [3]")
    parser.add_argument("--amp", default="no", choices=AMP, help="of our loop; the plain one is fp32 [no]")
    parser.add_argument("--gpu", type=int, default=None, help="index, -1 for the CPU; default: GPU 0 if there is one")
    parser.add_argument("--into", type=Path, help="rewrite the table 'benchmark' in this file as well")
    args = parser.parse_args()
    device = choose_device(args.gpu)
    info = dataset_info(args.dataset)
    torch.manual_seed(0)
    rates: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest(info.name, info.num_classes, info.image_size)
        bank = ImageBank(Path(folder, "bank"), manifest)
        images = torch.randint(0, 256, (args.bank, 3, info.image_size, info.image_size), dtype=torch.uint8)
        bank.append("synthesize", 0, images, torch.arange(args.bank) % info.num_classes)
        export_folders(bank, Path(folder, "png"))
        networks = [[build_classifier(name, info, device) for name in (args.teacher, args.student)] for _ in range(2)]
        for mine, plain in zip(*networks):
            plain.load_state_dict(mine.state_dict())
        (teacher, student), (plain_teacher, plain_student) = networks
        loops = {
            "ours": Ours(
                info, frozen(teacher), student, bank.read("synthesize"), args.batch_size, Precision(args.amp, device)
            ),
            "plain": Plain(info, frozen(plain_teacher), plain_student, Path(folder, "png"), args.batch_size, args.workers),
        }
        for name in ("sample", "teacher_forward", "distillation", "inversion"):
            for _ in range(args.repeats):
                for kind, loop in loops.items():
                    value = rate(getattr(loop, name), args.batch_size, args.seconds, device)
                    rates.setdefault(name, {}).setdefault(kind, []).append(value)
    titles = {
        "sample": "bank sampling",
        "teacher_forward": "teacher forward",
        "distillation": "distillation step",
        "inversion": "inversion step",
    }
    rows = []
    for name, by_kind in rates.items():
        ours, plain = (statistics.median(by_kind[kind]) for kind in ("ours", "plain"))
        rows.append(
            {
                "loop": titles[name],
                "ours, images/s": f"{ours:.0f}",
                "plain, images/s": f"{plain:.0f}",
                "ratio": f"{ours / plain:.2f}",
            }
        )
    memory = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in peak_memory().items())
    setting = f"{args.teacher} -> {args.student}, {info.image_size} px, batch {args.batch_size}, amp {args.amp}"
    table = f"{setting}; {machine()}, {memory}\n\n{markdown(rows)}"
    print(table)
    if args.into:
        replace_table(args.into, "benchmark", table)


if __name__ == "__main__":
    run_command(main)
