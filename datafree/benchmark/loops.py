"""What each loop does here: rate, ratio to the plain loop of the field, memory, and share of what this machine can do.

    python -m datafree.benchmark.loops                                        four pairs of networks; ten minutes or so on two cores
    python -m datafree.benchmark.loops --pairs resnet20:wrn16_1 --loops sample,inversion --amp bf16

The plain loop is what public code of this field does: images as PNG files behind a DataLoader with worker processes,
contiguous NCHW tensors, mean and variance of every BN input in two passes, upsampling and convolution apart, and a loss
read back at every step. Both loops compute the same losses on networks of the same weights, in turns in one run.

The ceilings are measured, too: arithmetic as the highest rate of matrix products and a large convolution in the number
format of our loop, memory as the rate of a large copy, before and after every pair of networks; the best so far counts. More
than 100 % of it says that the machine was busy with something else then, and that the run is worth repeating. A step's
operations are counted as it runs, those of matrix products and convolutions. Peak memory is that of this process with
both loops' networks in it, or of the GPU's tensors; the plain loop's workers come on top.
"""

import argparse
import contextlib
import gc
import io
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from datafree.bank import export_folders
from datafree.base import Synthesizer
from datafree.benchmark.measuring import Ceilings, Measured, Step, ceilings, clock, flops, in_turns
from datafree.bn_statistics import BNStatistics, bn_loss
from datafree.generators import Generator, UpsampleConv2d, reset
from datafree.losses import KLDistillation, kd_loss, one_hot_loss
from engine.data.bank import ImageBank, Manifest
from engine.data.datasets import DatasetInfo, dataset_info
from engine.data.transfer_set import TransferSet
from engine.data.views import KeyedViews, Views
from engine.loops.distill import Distillation, Schedule
from engine.loops.memo import STEPS, Memo
from engine.networks.build import build_classifier
from engine.report import markdown, replace_table
from engine.runtime.compilation import CHOICES, Compiler
from engine.runtime.errors import UserError
from engine.runtime.flags import Parser
from engine.runtime.names import lookup
from engine.runtime.precision import AMP, Precision, choose_amp, choose_device
from engine.runtime.run import machine, progress
from models.classifier import frozen
from registry import DATASETS, MODELS

PAIRS = "wrn40_2:wrn16_1,wrn40_2:wrn16_2,resnet34:resnet18,resnet20:wrn16_1"
LOOPS = {
    "sample": "bank sampling",
    "teacher_forward": "teacher forward",
    "distillation": "distillation step",
    "memo": "distillation step",
    "run": "distillation steps of a run",
    "inversion": "inversion step",
    "growth": "sampling from banks of growing size",
}
KNOWN = (0.5, 0.9, 1.0)  # shares of the questions that the teacher has answered before
# A run of Fast as published (20 + 200 rounds of 256 images, 200 x 400 steps of 256) in small: as many questions an image, and a
# bank that grows as much meanwhile, so that as large a share of the questions comes again.
RUN_ROUNDS, RUN_QUESTIONS, RUN_BEFORE = 6, 366, 1 / 11
RUN_VIEWS = {"all views": None, "16 views": 16}
GROWING = (4096, 16384, 65536)  # images
Kept = list[tuple[str, str, float, Measured, Measured]]  # loop, which, share of the teacher's answers known, ours, plain
ALWAYS = 10**9  # calls, as of a run that is long enough to compile for


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
    """This project's loop: that of ``datafree_kd.py`` for student steps, and its pieces for inversion.

    Args:
        compiler: of teacher, student step, generator and synthesis losses.
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
        """Rounds of a hundred steps."""
        for round in count():
            yield from self.transfer.viewed(self.batch_size, self.views, seed=round, steps=100)

    def _synthesis_losses(self, images: Tensor, labels: Tensor) -> Tensor:
        """bn + oh of images (B, 3, S, S) that are to be of classes labels (B,), scalar."""
        with self.statistics.collect() as stats:
            logits = self.network(images)
        return bn_loss(stats, self.statistics.running) + one_hot_loss(logits, labels)

    def sample(self) -> None:
        next(self.batches)

    def teacher_forward(self) -> None:
        self.loop.ask(self.images)

    def distillation(self) -> None:
        self.loop.student_steps(self.batches, 0, self.bar)

    def remembering(self, known: float) -> Step:
        """``STEPS`` student steps, of whose questions the teacher has answered that share before."""
        device, block = self.precision.device, self.batch_size
        group, keys = STEPS * block, torch.randperm(len(self.views), device=device)
        old, fresh = keys.split(-(-len(keys) // 2))
        memo = Memo(partial(self._answer, self.transfer, self.views), len(keys), 4 * group, block, device)
        old = old[:group]
        memo.prepare(old)
        used, unknown, starts = memo.used, round((1 - known) * group), count()

        def step() -> None:
            places = next(starts) * unknown + torch.arange(unknown, device=device)
            new = fresh[places % len(fresh)]
            memo.row_of[new], memo.used = 0, used  # in the place of those before
            asked = torch.cat([new, old[torch.randint(len(old), (group - unknown,), device=device)]])
            asked = asked[torch.randperm(group, device=device)].view(STEPS, block)
            memo.prepare(asked)
            self._steps(memo, ((self.transfer.look(self.views, keys), self.labels, keys) for keys in asked), STEPS)

        return step

    def whole_run(self, few: int | None) -> float:
        """All student steps of a run in small, see ``RUN_ROUNDS``; returns the share of questions that came again.

        Args:
            few: ``--views``.
        """
        device, block = self.precision.device, self.batch_size
        images = max(2 * RUN_ROUNDS, RUN_ROUNDS * STEPS * block // RUN_QUESTIONS)
        transfer = TransferSet(images, self.images.shape[-1], device)
        views = KeyedViews(self.view, images, few, device=device)
        memo = Memo(partial(self._answer, transfer, views), len(views), len(views), block, device)
        for round in range(RUN_ROUNDS):
            end = -(-images * (RUN_BEFORE + (1 - RUN_BEFORE) * (round + 1) / RUN_ROUNDS) // 1)
            places = torch.arange(len(transfer), min(images, int(end))) % len(self.transfer)
            transfer.add(self.transfer.images[places], self.transfer.labels[places])
            plan = {"prepare": memo.prepare, "steps": STEPS, "ahead": STEPS}
            self._steps(memo, transfer.viewed(block, views, seed=round, **plan), STEPS)
        return 1 - memo.asked / memo.questions

    def _answer(self, transfer: TransferSet, views: KeyedViews, keys: Tensor) -> Tensor:
        return self.loop.ask(transfer.look(views, keys)).logits

    def _steps(self, memo: Memo, batches: Iterator[tuple[Tensor, ...]], steps: int) -> None:
        """Student steps on these batches, for which the memo answers."""
        self.loop.memo = memo
        for _ in range(steps):
            self.loop.student_steps(batches, 0, self.bar)
        self.loop.memo = None

    def inversion(self) -> None:
        with self.precision.autocast():
            loss = self.synthesis_losses(self.view(self.generator(self.z)), self.labels)
        self.inversion_precision.minimize(loss, self.inversion_optimizer)


def repeat(step: Step, times: int) -> None:
    """So many steps."""
    for _ in range(times):
        step()


def _apart(module: nn.Module) -> nn.Module:
    """Every ``UpsampleConv2d`` as the two layers that it stands for."""
    for name, child in module.named_children():
        if isinstance(child, UpsampleConv2d):
            convolution = nn.Conv2d(child.in_channels, child.out_channels, 3, padding=1, bias=False)
            setattr(module, name, nn.Sequential(nn.Upsample(scale_factor=2), convolution))
        else:
            _apart(child)
    return module


def sampling_bytes(image_size: int) -> int:
    """Least memory traffic of one image on its way from the bank into a batch, in bytes.

    Of P = 3 * image_size^2 values: gathered as uint8 (read P, write P), augmented as uint8 (read P, write P), made float32
    (read P, write 4 P); 9 P. Padding and index arithmetic come on top, and caches may serve part of it.
    """
    return 9 * 3 * image_size**2


def line(name: str, ours: Measured, plain: Measured, work: int, best: Ceilings, what: str = "") -> dict[str, str]:
    """One row of the table.

    Args:
        what: to say of the loop besides its name.
        work: operations an image, or, of bank sampling, bytes.
    """
    ratios = [a / b for a, b in zip(ours.rates, plain.rates, strict=True)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    limit, kind = (best.memory, "copy") if name == "sample" else (best.arithmetic, "arithmetic")
    return {
        "loop": LOOPS[name] + what,
        "ours, images/s": f"{ours.rate:.0f}",
        "plain, images/s": f"{plain.rate:.0f}",
        "ratio": f"{statistics.median(ratios):.2f}{spread}",
        "ours, peak MiB": f"{ours.peak or ''}",
        "plain, peak MiB": f"{plain.peak or ''}",
        "GFLOP an image": "" if name == "sample" else f"{work / 1e9:.3g}",
        "ours, of the ceiling": f"{100 * ours.rate * work / limit:.0f} % ({kind})",
    }


class Benchmark:
    """The measurements that a command line asks for.

    Args:
        args: see ``parse``.
        bank: random images; png: the same as class folders.
    """

    def __init__(self, args: argparse.Namespace, bank: ImageBank, png: Path, device: torch.device, info: DatasetInfo, bar):
        self.args, self.bank, self.png, self.device, self.info, self.bar = args, bank, png, device, info, bar
        self.precision = Precision(choose_amp(args.amp, device), device)
        self.ceilings = Ceilings(0, "", 0)

    def look(self) -> None:
        """Measures the ceilings once more: the higher ones count, so that a busy moment makes none too low."""
        measured = ceilings(self.device, self.precision.dtype or torch.float32, min(0.7, self.args.seconds))
        self.ceilings = self.ceilings.or_higher(measured)

    def in_turns(self, steps: dict[str, Step], batches: int = 1) -> dict[str, Measured]:
        """``batches``: of a step."""
        args, least = self.args, 2 if batches == 1 else 1
        return in_turns(steps, batches * args.batch_size, args.seconds, args.repeats, self.device, self.bar, least)

    def pair(self, teacher: str, student: str, loops: list[str]) -> str:
        """The table of a pair of networks."""
        args, info, notes = self.args, self.info, []
        compiler = Compiler(args.compile, self.device, notes.append)
        networks = [[build_classifier(MODELS, name, info, self.device) for name in (teacher, student)] for _ in range(2)]
        for mine, theirs in zip(*networks):
            theirs.load_state_dict(mine.state_dict())
        (mine, learner), (theirs, other) = networks
        columns = self.bank.read("synthesize")
        parts = info, frozen(mine), learner, columns, args.batch_size, self.precision
        eager, ours = Ours(*parts, Compiler("no", self.device)), Ours(*parts, compiler)
        plain = Plain(info, frozen(theirs), other, self.png, args.batch_size, args.workers)
        # Compiled functions show no operations to count.
        timed = [name for name in loops if name not in ("memo", "run")]
        counted = {"distillation", "teacher_forward", *timed} - {"sample"}
        work = {name: flops(getattr(eager, name)) // args.batch_size for name in counted}
        del eager
        work["sample"] = sampling_bytes(info.image_size)
        begun = clock(self.device)
        for name in timed:
            getattr(ours, name)()  # compiled at their first step
        compiling = clock(self.device) - begun
        self.look()
        found = {}
        for name in timed:
            self.bar.set_postfix_str(f"{teacher} -> {student}, {LOOPS[name]}")
            getattr(plain, name)()  # as ours was, when its operations were counted
            found[name] = self.in_turns({"ours": getattr(ours, name), "plain": getattr(plain, name)})
        kept = self.memo(ours, plain) if "memo" in loops else []
        kept += self.run(ours, plain) if "run" in loops else []
        self.look()
        rows = [line(name, m["ours"], m["plain"], work[name], self.ceilings) for name, m in found.items()]
        for name, which, known, measured, reference in kept:
            left = round(work["distillation"] - known * work["teacher_forward"])
            what = f"{which}, {100 * known:.0f} % of the teacher's answers known"
            rows.append(line(name, measured, reference, left, self.ceilings, what))
        setting = f"{teacher} -> {student}, {info.image_size} px, batch {args.batch_size}, amp {self.precision.amp}"
        compiled = "not compiled" if not notes else f"compiled in {compiling:.0f} s"
        failed = [note for note in notes if "uncompiled" in note]
        return "  \n".join([f"{setting}, {compiled}", *failed, f"{self.ceilings}\n\n{markdown(rows)}"])

    def memo(self, ours: Ours, plain: Plain) -> Kept:
        """Student steps by the share of their questions that was answered before."""
        steps: dict[Any, Step] = {known: ours.remembering(known) for known in KNOWN}
        measured = self.in_turns(steps | {"plain": partial(repeat, plain.distillation, STEPS)}, STEPS)
        return [("memo", "", known, measured[known], measured["plain"]) for known in KNOWN]

    def run(self, ours: Ours, plain: Plain) -> Kept:
        """All student steps of a run."""
        known: dict[str, float] = {}
        steps: dict[Any, Step] = {n: lambda n=n: known.update({n: ours.whole_run(RUN_VIEWS[n])}) for n in RUN_VIEWS}
        count = RUN_ROUNDS * STEPS
        measured = self.in_turns(steps | {"plain": partial(repeat, plain.distillation, count)}, count)
        return [("run", f", {name}", known[name], measured[name], measured["plain"]) for name in RUN_VIEWS]

    def growth(self) -> str:
        """The table of sampling from banks of growing size: what a batch costs should not grow with them."""
        self.bar.set_postfix_str(LOOPS["growth"])
        size, steps = self.info.image_size, {}
        view = Views(self.info.crop_padding, self.info.flip)
        for stored in GROWING:
            transfer = TransferSet(stored, size, self.device)
            images = torch.randint(0, 256, (stored, 3, size, size), dtype=torch.uint8)
            transfer.add(images, torch.zeros(stored, dtype=torch.long))
            steps[str(stored)] = transfer.batches(self.args.batch_size, view, seed=0).__next__
            steps[str(stored)]()
        times = {stored: 1000 * self.args.batch_size / m.rate for stored, m in self.in_turns(steps).items()}
        rows = [
            {
                "images in the bank": stored,
                "MiB": f"{int(stored) * 3 * size**2 / 2**20:.0f}",
                "sampling, ms a batch": f"{value:.2f}",
                "against the smallest": f"{value / times[str(GROWING[0])]:.2f}",
            }
            for stored, value in times.items()
        ]
        return f"{machine()}; bank sampling, {size} px, batch {self.args.batch_size}\n\n{markdown(rows)}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``pairs`` as a list of (teacher, student), ``loops`` as a list of names.

    Raises:
        UserError: a pair is none, or a loop is not known.
    """
    parser = Parser(prog="python -m datafree.benchmark.loops", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default=PAIRS, help=f"teacher:student,..., names of registry.MODELS [{PAIRS}]")
    usual = ",".join(name for name in LOOPS if name != "run")
    parser.add_argument("--loops", default=usual, help=f"what to measure, run: a hundred steps and more [{usual}]")
    parser.add_argument("--dataset", default="cifar10", help="for image size and classes; its data are not opened [cifar10]")
    parser.add_argument("--batch_size", type=int, least=1, default=256, help="images a step [256]")
    parser.add_argument("--bank", type=int, least=1, default=4096, help="random images in the bank [4096]")
    parser.add_argument(
        "--workers", type=int, least=0, most=1024, default=2, help="DataLoader processes of the plain loop [2]"
    )
    parser.add_argument("--seconds", type=float, least=0, default=2.5, help="of each measurement, at least two steps [2.5]")
    parser.add_argument(
        "--repeats", type=int, least=1, default=3, help="measurements in turn, fewer if slow; medians count [3]"
    )
    parser.add_argument("--amp", default="no", choices=AMP, help="of our loop; the plain one is fp32 [no]")
    parser.add_argument(
        "--compile", default="auto", choices=CHOICES, help="of our loop, auto as in a long run; the plain one is not [auto]"
    )
    parser.add_argument(
        "--gpu", type=int, least=-1, default=None, help="index, -1 for the CPU; default: GPU 0 if there is one"
    )
    parser.add_argument("--into", type=Path, help="rewrite a table in this file as well")
    parser.add_argument("--name", default="benchmark", help="of that table [benchmark]")
    args = parser.parse_args(argv)
    args.pairs = [tuple(pair.split(":")) for pair in args.pairs.split(",")]
    if wrong := [pair for pair in args.pairs if len(pair) != 2 or not all(pair)]:
        raise UserError(f"--pairs {':'.join(wrong[0])} is no pair; wanted teacher:student,teacher:student,...")
    args.loops = args.loops.split(",")
    for name in args.loops:
        lookup(LOOPS, name, "loop")
    if args.bank < args.batch_size:
        raise UserError(f"--bank {args.bank} must hold a batch ({args.batch_size}); give more")
    return args


def main() -> None:
    args = parse()
    device, info = choose_device(args.gpu), dataset_info(DATASETS, args.dataset)
    torch.manual_seed(0)
    loops = [name for name in args.loops if name != "growth"]
    bar = progress(args.repeats * (len(args.pairs) * len(loops) + ("growth" in args.loops)), "benchmark", "turn")
    texts = []

    def say(text: str) -> None:
        texts.append(text)
        bar.write(text + "\n")  # on stdout, above the bar

    with tempfile.TemporaryDirectory() as folder:
        bank = ImageBank(Path(folder, "bank"), Manifest(info.name, info.num_classes, info.image_size))
        images = torch.randint(0, 256, (args.bank, 3, info.image_size, info.image_size), dtype=torch.uint8)
        bank.append("synthesize", 0, images, torch.arange(args.bank) % info.num_classes)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            export_folders(bank, Path(folder, "png"))
        benchmark = Benchmark(args, bank, Path(folder, "png"), device, info, bar)
        for teacher, student in args.pairs if loops else ():
            say(benchmark.pair(teacher, student, loops))
            gc.collect()  # ends the plain loop's workers
        if "growth" in args.loops:
            say(benchmark.growth())
        bar.close()
    if args.into:
        replace_table(args.into, args.name, "\n\n".join(texts))
