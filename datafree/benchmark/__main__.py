"""What each loop does here: rate, ratio to the plain loop of the field, memory, and share of what this machine can do.

    python -m datafree.benchmark                                             four pairs of networks; ten minutes or so on two cores
    python -m datafree.benchmark --pairs resnet20:wrn16_1 --loops sample,inversion --amp bf16

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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datafree.bank import export_folders
from datafree.benchmark.loops import RUN_ROUNDS, Ours, Plain, repeat
from datafree.benchmark.measuring import Ceilings, Measured, Step, ceilings, clock, flops, in_turns
from engine.data.bank import ImageBank, Manifest, MappedImages
from engine.data.crops import Views
from engine.data.datasets import DatasetInfo, dataset_info
from engine.data.transfer_set import TransferSet
from engine.loops.memo import STEPS
from engine.networks.build import build_classifier
from engine.report import markdown, replace_table
from engine.runtime.compilation import CHOICES, Compiler
from engine.runtime.errors import UserError, lookup, run_command
from engine.runtime.files import load_tensors, save_tensors
from engine.runtime.flags import Parser
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
RUN_VIEWS = {"all views": None, "16 views": 16}
GROWING, SHARDS = (10**3, 10**4, 10**5), 10  # images, and so many times the last number, mapped
Kept = list[tuple[str, str, float, Measured, Measured]]  # loop, which, share of the teacher's answers known, ours, plain


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
        """The table of sampling from banks of growing size: what a batch costs should not grow with them.

        The largest stays in its mapped shards, all of which are one file.
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
            batches.close()  # and with it the thread that reads ahead
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
    """The command line; ``pairs`` as a list of (teacher, student), ``loops`` as a list of names.

    Raises:
        UserError: a pair is none, or a loop is not known.
    """
    parser = Parser(prog="python -m datafree.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default=PAIRS, help=f"teacher:student,..., names of registry.MODELS [{PAIRS}]")
    usual = ",".join(name for name in LOOPS if name != "run")
    parser.add_argument(
        "--loops", default=usual, help=f"what to measure; run, the steps of a whole run, is one more [{usual}]"
    )
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


if __name__ == "__main__":
    run_command(main)
