"""Compares the speed and memory of this project's loops with a plain loop and with the limits of this machine.

    python -m datafree.benchmark        (four pairs of networks; about ten minutes on two cores)
    python -m datafree.benchmark --pairs resnet20:wrn16_1 --loops sample,inversion --amp bf16

The plain loop is written like public code of this field. Images are PNG files behind a DataLoader with worker processes, and
tensors are contiguous NCHW. Mean and variance of every BN input take two passes. Upsampling and convolution are separate.
The loss is read back at every step. Both loops compute the same losses on networks with the same weights and are measured in
turns.

The limits of the machine ("ceilings") are measured as well. The arithmetic ceiling is the highest rate of matrix products
and a large convolution in the number format of our loop. The memory ceiling is the rate of a large copy. Both are measured
before and after every pair of networks, and the highest values so far are used. A share above 100 % means that the machine
was busy with something else while the ceilings were measured. Repeat such a run.

A step's operations are counted while it runs; only matrix products and convolutions count. Peak memory is that of this
process with the networks of both loops, or that of the GPU's tensors. The workers of the plain loop are not included.
"""

import argparse
import contextlib
import gc
import io
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datafree.bank import export_folders
from datafree.benchmark.loops import RUN_ROUNDS, Ours, Plain, repeat
from datafree.benchmark.measuring import Ceilings, Measured, Step, ceilings, flops, in_turns
from engine.data.crops import Views
from engine.data.datasets import DatasetInfo, dataset_info
from engine.data.image_bank import ImageBank, Manifest, MappedImages
from engine.data.transfer_set import TransferSet
from engine.loops.logit_cache import STEPS
from engine.networks.build import build_classifier
from engine.report import markdown, replace_table
from engine.runtime.compilation import CHOICES, Compiler
from engine.runtime.errors import UserError, lookup, run_command
from engine.runtime.flags import Parser
from engine.runtime.precision import AMP, Precision, choose_amp, choose_device
from engine.runtime.run import clock, machine, progress
from engine.runtime.tensors import load_tensors, save_tensors
from models.classifier import frozen
from registry import DATASETS, MODELS

PAIRS = "wrn40_2:wrn16_1,wrn40_2:wrn16_2,resnet34:resnet18,resnet20:wrn16_1"
LOOPS = {
    "sample": "bank sampling",
    "teacher_forward": "teacher forward",
    "distillation": "distillation step",
    "logit_cache": "distillation step",
    "run": "distillation steps of a run",
    "inversion": "inversion step",
    "growth": "sampling from banks of growing size",
}
KNOWN = (0.5, 0.9, 1.0)  # shares of a step's images whose teacher logits are cached
RUN_VIEWS = {"all views": None, "16 views": 16}
GROWING, SHARDS = (10**3, 10**4, 10**5), 10  # sizes of the banks in memory; the mapped bank has SHARDS times the last size
Kept = list[tuple[str, str, float, Measured, Measured]]  # (loop, variant, share of cached teacher logits, ours, plain)


def sampling_bytes(image_size: int) -> int:
    """Least memory traffic in bytes for one image on its way from the bank into a batch.

    An image has P = 3 * image_size^2 values. They are gathered as uint8 (read P, write P), augmented as uint8 (read P, write
    P) and converted to float32 (read P, write 4 P): 9 P in all. Padding and index arithmetic add traffic; caches may reduce
    it.
    """
    return 9 * 3 * image_size**2


def line(name: str, ours: Measured, plain: Measured, work: int, best: Ceilings, what: str = "") -> dict[str, str]:
    """One row of the table.

    Args:
        name: key of ``LOOPS``.
        ours, plain: measurements of the two loops.
        work: operations per image; for bank sampling bytes per image.
        best: ceilings of the machine.
        what: text after the loop's name.
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
    """The measurements of one command line.

    Args:
        args: result of ``parse``.
        bank: image bank of random images.
        png: folder with the same images as class folders.
        device: device of both loops.
        info: dataset that gives the image size, the classes and the augmentation.
        bar: progress bar.
    """

    def __init__(self, args: argparse.Namespace, bank: ImageBank, png: Path, device: torch.device, info: DatasetInfo, bar):
        self.args, self.bank, self.png, self.device, self.info, self.bar = args, bank, png, device, info, bar
        self.precision = Precision(choose_amp(args.amp, device), device)
        self.ceilings = Ceilings(0, "", 0)

    def measure_ceilings(self) -> None:
        """Measures the ceilings again and keeps the higher values, so that a busy moment does not make them too low."""
        measured = ceilings(self.device, self.precision.dtype or torch.float32, min(0.7, self.args.seconds))
        self.ceilings = self.ceilings.or_higher(measured)

    def in_turns(self, steps: dict[str, Step], batches: int = 1) -> dict[str, Measured]:
        """Measures steps in turns; ``batches`` is the number of batches in one step."""
        args, least = self.args, 2 if batches == 1 else 1
        return in_turns(steps, batches * args.batch_size, args.seconds, args.repeats, self.device, self.bar, least)

    def pair(self, teacher: str, student: str, loops: list[str]) -> str:
        """Measures ``loops`` for a pair of networks and returns the table as text."""
        args, info, notes = self.args, self.info, []
        compiler = Compiler(args.compile, self.device, notes.append, auto_graphs=True)
        networks = [[build_classifier(MODELS, name, info, self.device) for name in (teacher, student)] for _ in range(2)]
        for mine, theirs in zip(*networks):
            theirs.load_state_dict(mine.state_dict())
        (mine, learner), (theirs, other) = networks
        columns = self.bank.read("synthesize")
        parts = info, frozen(mine), learner, columns, args.batch_size, self.precision
        eager, ours = Ours(*parts, Compiler("no", self.device)), Ours(*parts, compiler)
        plain = Plain(info, frozen(theirs), other, self.png, args.batch_size, args.workers)
        # Operations are counted without compilation, since compiled functions hide them.
        timed = [name for name in loops if name not in ("logit_cache", "run")]
        counted = {"distillation", "teacher_forward", *timed} - {"sample"}
        work = {name: flops(getattr(eager, name)) // args.batch_size for name in counted}
        del eager
        work["sample"] = sampling_bytes(info.image_size)
        begun = clock(self.device)
        for name in timed:
            getattr(ours, name)()  # the first step compiles
        compiling = clock(self.device) - begun
        self.measure_ceilings()
        found = {}
        for name in timed:
            self.bar.set_postfix_str(f"{teacher} -> {student}, {LOOPS[name]}")
            getattr(plain, name)()  # one step before the measurement, as for our loop
            found[name] = self.in_turns({"ours": getattr(ours, name), "plain": getattr(plain, name)})
        kept = self.logit_cache(ours, plain) if "logit_cache" in loops else []
        kept += self.run(ours, plain) if "run" in loops else []
        self.measure_ceilings()
        rows = [line(name, m["ours"], m["plain"], work[name], self.ceilings) for name, m in found.items()]
        for name, which, known, measured, reference in kept:
            left = round(work["distillation"] - known * work["teacher_forward"])
            what = f"{which}, {100 * known:.0f} % of the teacher's logits cached"
            rows.append(line(name, measured, reference, left, self.ceilings, what))
        setting = f"{teacher} -> {student}, {info.image_size} px, batch {args.batch_size}, amp {self.precision.amp}"
        compiled = "not compiled" if not notes else f"compiled in {compiling:.0f} s"
        failed = [note for note in notes if "uncompiled" in note]
        return "  \n".join([f"{setting}, {compiled}", *failed, f"{self.ceilings}\n\n{markdown(rows)}"])

    def logit_cache(self, ours: Ours, plain: Plain) -> Kept:
        """Measures student steps for each share of cached teacher logits in ``KNOWN``."""
        steps: dict[Any, Step] = {known: ours.cached_steps(known) for known in KNOWN}
        measured = self.in_turns(steps | {"plain": partial(repeat, plain.distillation, STEPS)}, STEPS)
        return [("logit_cache", "", known, measured[known], measured["plain"]) for known in KNOWN]

    def run(self, ours: Ours, plain: Plain) -> Kept:
        """Measures all student steps of a run, for each entry of ``RUN_VIEWS``."""
        known: dict[str, float] = {}
        steps: dict[Any, Step] = {n: lambda n=n: known.update({n: ours.small_run(RUN_VIEWS[n])}) for n in RUN_VIEWS}
        count = RUN_ROUNDS * STEPS
        measured = self.in_turns(steps | {"plain": partial(repeat, plain.distillation, count)}, count)
        return [("run", f", {name}", known[name], measured[name], measured["plain"]) for name in RUN_VIEWS]

    def growth(self) -> str:
        """Measures sampling from banks of growing size and returns the table; the time of a batch should not grow.

        The largest bank is read from memory-mapped shards. All of its shards are the same file.
        """
        self.bar.set_postfix_str(LOOPS["growth"])
        size, sets = self.info.image_size, {}
        view = Views(self.info.crop_padding, self.info.flip)
        for stored in GROWING:
            images = torch.randint(0, 256, (stored, 3, size, size), dtype=torch.uint8)
            sets[stored, "in memory"] = TransferSet(stored, size, self.device)
            sets[stored, "in memory"].add(images, torch.zeros(stored, dtype=torch.long))
        file = self.png.parent / "shard.safetensors"
        save_tensors(file, {"images": images})
        shard = MappedImages.of([load_tensors(file)["images"]])
        sets[SHARDS * stored, "mapped"] = TransferSet(SHARDS * stored, size, self.device, mapped=True)
        for _ in range(SHARDS):
            sets[SHARDS * stored, "mapped"].add(shard, torch.zeros(stored, dtype=torch.long))
        drawn = {which: transfer.batches(self.args.batch_size, view, seed=0) for which, transfer in sets.items()}
        for batches in drawn.values():
            next(batches)
        measured = self.in_turns({which: batches.__next__ for which, batches in drawn.items()})
        for batches in drawn.values():
            batches.close()  # stops the thread that reads ahead, too
        times = {which: 1000 * self.args.batch_size / found.rate for which, found in measured.items()}
        rows = [
            {
                "images in the bank": f"{stored}, {where}",
                "MiB": f"{stored * 3 * size**2 / 2**20:.0f}",
                "sampling, ms a batch": f"{value:.2f}",
                "against the smallest": f"{value / times[GROWING[0], 'in memory']:.2f}",
            }
            for (stored, where), value in times.items()
        ]
        return f"{machine()}; bank sampling, {size} px, batch {self.args.batch_size}\n\n{markdown(rows)}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; ``pairs`` becomes a list of (teacher, student), ``loops`` a list of names.

    Raises:
        UserError: a pair is malformed, a loop is unknown, or the bank is smaller than a batch.
    """
    parser = Parser(prog="python -m datafree.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default=PAIRS, help=f"pairs teacher:student,... of names in registry.MODELS [{PAIRS}]")
    usual = ",".join(name for name in LOOPS if name != "run")
    parser.add_argument(
        "--loops",
        default=usual,
        help=f"loops to measure, comma-separated; also possible: run, all student steps of a run [{usual}]",
    )
    parser.add_argument(
        "--dataset", default="cifar10", help="dataset that gives image size and classes; its images are not read [cifar10]"
    )
    parser.add_argument("--batch_size", type=int, least=1, default=256, help="images per step [256]")
    parser.add_argument("--bank", type=int, least=1, default=4096, help="number of random images in the bank [4096]")
    parser.add_argument(
        "--workers", type=int, least=0, most=1024, default=2, help="DataLoader processes of the plain loop [2]"
    )
    parser.add_argument(
        "--seconds", type=float, least=0, default=2.5, help="duration of a measurement; at least two steps are taken [2.5]"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        least=1,
        default=3,
        help="measurements of each loop, in turns; slow loops get fewer; the table shows medians [3]",
    )
    parser.add_argument("--amp", default="no", choices=AMP, help="mixed precision of our loop; the plain loop is fp32 [no]")
    parser.add_argument(
        "--compile",
        default="auto",
        choices=CHOICES,
        help="compilation of our loop; auto: as in a long run; the plain loop is never compiled [auto]",
    )
    parser.add_argument("--gpu", type=int, least=-1, help="index of the GPU, -1 for the CPU; unset: GPU 0 if there is one")
    parser.add_argument("--into", type=Path, help="file in which to replace the table --name by the printed one")
    parser.add_argument("--name", default="benchmark", help="name of the table in the --into file [benchmark]")
    args = parser.parse_args(argv)
    args.pairs = [tuple(pair.split(":")) for pair in args.pairs.split(",")]
    if wrong := [pair for pair in args.pairs if len(pair) != 2 or not all(pair)]:
        raise UserError(f"--pairs {':'.join(wrong[0])} found, teacher:student,teacher:student,... wanted")
    args.loops = args.loops.split(",")
    for name in args.loops:
        lookup(LOOPS, name, "loop")
    if args.bank < args.batch_size:
        raise UserError(f"--bank {args.bank} found, at least one batch ({args.batch_size}) wanted; give a larger --bank")
    return args


def main() -> None:
    args = parse()
    device, info = choose_device(args.gpu), dataset_info(DATASETS, args.dataset)
    torch.manual_seed(0)
    loops = [name for name in args.loops if name != "growth"]
    bar = progress(args.repeats * (len(args.pairs) * len(loops) + ("growth" in args.loops)), "benchmark", "turn")
    texts = []

    def print_part(text: str) -> None:
        texts.append(text)
        bar.write(text + "\n")  # on stdout, above the bar

    with tempfile.TemporaryDirectory() as folder:
        bank = ImageBank(Path(folder, "bank"), Manifest(info.name, info.num_classes, info.image_size))
        images = torch.randint(0, 256, (args.bank, 3, info.image_size, info.image_size), dtype=torch.uint8)
        bank.append("synthesize", 0, images, torch.arange(args.bank) % info.num_classes)
        with contextlib.redirect_stderr(io.StringIO()):  # hides the progress bar of the export
            export_folders(bank, Path(folder, "png"))
        benchmark = Benchmark(args, bank, Path(folder, "png"), device, info, bar)
        for teacher, student in args.pairs if loops else ():
            print_part(benchmark.pair(teacher, student, loops))
            gc.collect()  # ends the plain loop's workers
        if "growth" in args.loops:
            print_part(benchmark.growth())
        bar.close()
    if args.into:
        replace_table(args.into, args.name, "\n\n".join(texts))


if __name__ == "__main__":
    run_command(main)
