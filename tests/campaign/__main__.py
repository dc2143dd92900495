"""Tests with damaged files, odd flags, hostile files, killed runs and full disks, and counts the outcomes.

    python -m tests.campaign --minutes 10 --seed 0                  all kinds of input, in turn
    python -m tests.campaign --minutes 10 --only files flags        some of: files, flags, payloads, full, kills

Three outcomes are right: an error of one line with exit code 2; accepted, with finite numbers; resumed, bit-equal to an
unbroken run. Any other outcome is printed with the input that repeats it, and the exit code is 1.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine.loops.settings import DistillFlags, RunFlags, TaskFlags
from engine.runtime.errors import resolve
from registry import METHODS
from tests.campaign import readers, stops
from tests.campaign.sandbox import ACCEPTED, EQUAL, GOOD, MEMORY, ROOM, Outcome, Silent, run_all
from tests.conftest import ROOT

KINDS = ("files", "flags", "payloads", "full", "kills")
MOST = 120  # largest number of inputs for one process
ODD_TEXT = (
    "", "x", "x" * 300, "a\nb", "../../..", "/dev/null", "{seed}", "é\u2028", "-", "nan", "1,2", ",", "/proc/self/mem", "x:y(z=1)",
)  # fmt: skip
ODD_NUMBERS = (
    "0", "-1", "1", "2", "3", "0.5", "1e-30", "1e12", "999999999999", "4096", "nan", "inf", "1e999", "0x10", " 1", "1_0",
)  # fmt: skip


class Campaign:
    """Runs inputs until the time is over.

    Args:
        files: whether to make the files of the readers.
        slow: whether to make those of readers that are whole commands too.
        shown: whether to show the output of the inputs.
        log: file that gets one line a batch; an existing file is counted and continued.
    """

    def __init__(self, root: Path, seed: int, minutes: float, files: bool, slow: bool, shown: bool, log: Path | None):
        self.root, self.seed, self.shown, self.log = root, seed, shown, log
        self.canary, self.counts, self.bad, self.stops = root / "executed", {}, [], None
        self.seconds, self.next, self.turn = 0.0, Counter(), ("", 0)
        for line in map(json.loads, log.read_text().splitlines() if log and log.exists() else ()):
            self.counts.setdefault(line["row"], Counter()).update(line["outcomes"])
            self.bad += line["bad"]
            self.seconds += line["seconds"]
            self.next[line["kind"]] = max(self.next[line["kind"]], line["number"] + 1)
        with (
            contextlib.nullcontext() if shown else contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(sys.stderr if shown else io.StringIO()),
        ):
            self.teacher = readers.make_teacher(root / "teachers")
            self.readers = readers.build(root / "whole", self.teacher, slow) if files else {}
            if slow:
                readers.warm(files)
        gc.freeze()  # so that garbage collection in forks does not copy memory
        for name, reader in self.readers.items():  # unchanged files are accepted
            folder = readers.shutil.copytree(reader.folder, root / "changed")
            (outcome,) = run_all([(name, lambda: reader.read(folder) is not None and ACCEPTED)], 60, self.canary, shown)
            assert outcome.kind == ACCEPTED, (name, outcome)
            readers.shutil.rmtree(folder)
        self.begun = self.noted = time.monotonic()
        self.end = self.begun + 60 * minutes

    def run(self, kinds: tuple[str, ...], batches: int | None = None) -> None:
        """Runs the kinds in turn until the time is over or ``batches`` are done; each kind has at least one batch."""
        done = 0
        while time.monotonic() < self.end:
            for kind in kinds:
                self.turn = kind, self.next[kind]
                self.next[kind] += 1
                for _ in getattr(self, kind)(self.turn[1]):
                    done += 1
                    if done == batches:
                        return
                    if time.monotonic() > self.end:
                        break

    def note(self, row: str, outcomes: list[tuple[str, Outcome]], wanted: tuple[str, ...] = GOOD) -> None:
        """Counts the outcomes of named inputs and prints those that are not in ``wanted``."""
        counts = Counter(outcome.kind for _, outcome in outcomes)
        bad = [(row, name, *o) for name, o in outcomes if o.kind not in wanted or o.kind in GOOD and "\n" in o.detail]
        for _, name, kind, detail in bad:
            print(f"!! {row}: {name}: {kind}\n{detail}", flush=True)
        self.counts.setdefault(row, Counter()).update(counts)
        self.bad += bad
        now, before = time.monotonic(), self.noted
        self.seconds, self.noted = self.seconds + now - before, now
        if self.log:
            line = {"kind": self.turn[0], "number": self.turn[1], "row": row, "outcomes": counts, "bad": bad}
            line |= {"seconds": round(now - before, 2)} | (
                {} if wanted == GOOD else {"stops": [name for name, _ in outcomes]}
            )
            with open(self.log, "a") as file:
                file.write(json.dumps(line) + "\n")

    def batch(self, row: str, inputs: list[tuple[str, Callable[[], str]]], seconds: float = 5, memory: int = MEMORY) -> None:
        """Runs named inputs, each for at most ``seconds`` of processor time."""
        self.note(
            row, [(name, o) for (name, _), o in zip(inputs, run_all(inputs, seconds, self.canary, self.shown, memory))]
        )

    def files(self, number: int) -> Iterator[None]:
        """Reads changed files with every reader; a reader that is a whole command gets one file every third time."""
        for name, reader in self.readers.items():
            first, whole_command = (self.seed << 40) + number * MOST, reader.many == 1
            inputs = [
                (f"input {k}", readers.changed_file(reader, self.root / "changed", k))
                for k in range(first, first + reader.many)
            ]
            if not (whole_command and number % 3):
                yield self.batch(name, inputs, 10 if whole_command else 5)

    def repeat(self, name: str, number: int) -> None:
        """Repeats one changed file."""
        call = readers.changed_file(self.readers[name], self.root / "changed", number)
        self.batch(name, [(f"input {number}", call)], 60)

    def flags(self, number: int) -> Iterator[None]:
        """Does tiny runs of every method with an odd value of one flag."""
        draw = random.Random(f"{self.seed} {number}")
        for method in METHODS:
            inputs = []
            for k in range(6):
                folder = self.root / "flags" / "a" / "b" / f"{method}{k}"
                words, text = self.odd_flag(method, draw)
                inputs.append((f"--method {method} {text}", self.run_of(method, words, folder)))
            yield self.batch(f"flags of {method}", inputs, 30, ROOM)  # a large batch may take much memory

    def odd_flag(self, method: str, draw: random.Random) -> tuple[list[str], str]:
        """A flag with an odd value, as words of a command line and as a text to print."""
        groups = (TaskFlags, RunFlags, DistillFlags, resolve(METHODS[method]).Config)
        fields = [field for group in groups for field in group.__dataclass_fields__.values() if field.type is not bool]
        field = draw.choice([field for field in fields if field.name not in ("gpu", "compile")])
        legal = field.metadata["range"]
        edges = [str(v) for v in (legal.least, legal.above, legal.most, legal.below) if v is not None]
        numeric = "int" in str(field.type) or "float" in str(field.type)
        value = draw.choice((*ODD_NUMBERS, *edges * 3) if numeric else ODD_TEXT)
        long = field.name in ("epochs", "kd_steps", "ep_steps", "init_rounds", "fit_passes", "scale", "images_per_class")
        if "steps" in field.name or "loops" in field.name or long or field.name in ("variants", "minutes", "lca_repair"):
            value = value if len(value) < 4 else "3"  # a long run is no error, but takes too long here
        return [f"--{field.name}={value}"], f"--{field.name}={value[:40]!r}"

    def run_of(self, method: str, words: list[str], folder: Path) -> Callable[[], str]:
        def call() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            os.chdir(folder)
            import datafree_kd

            flags = readers.flags_of(method, self.teacher, Path("run"))
            sys.argv = ["datafree_kd.py", *flags.split(), *words]
            readers.splits._train_split_forbidden = False
            datafree_kd.main()
            for file in folder.rglob("student.pth"):
                state = torch.load(file, weights_only=True)["state_dict"]
                if not readers.is_finite(state):
                    raise Silent("a student of NaN or infinite weights was saved as finished")
            return ACCEPTED

        return call

    def payloads(self, number: int) -> Iterator[None]:
        """Reads all hostile files, once."""
        if number == 0:
            yield self.batch("payloads", readers.hostile(self.root / "hostile", self.canary))

    def kills(self, number: int) -> Iterator[None]:
        """Kills runs of every command."""
        return self.stop(number, stops.KILLS)

    def full(self, number: int) -> Iterator[None]:
        """Fills the disk during runs of every command."""
        return self.stop(number, stops.FULL)

    def stop(self, number: int, ways: tuple[str, ...]) -> Iterator[None]:
        self.stops = self.stops or stops.Stops(self.root / "stops", self.teacher, self.seed)
        for command in stops.COMMANDS:
            row, outcomes = self.stops.check(command, number, ways)
            yield self.note(row, outcomes, (EQUAL,))

    def table(self) -> str:
        """Table of the number of outcomes for each row, and in total."""
        kinds = [*GOOD, *sorted({kind for counts in self.counts.values() for kind in counts} - set(GOOD))]
        rows = [["", "inputs", *kinds]]
        total: Counter = Counter()
        for name, counts in self.counts.items():
            total += counts
            rows.append([name, str(counts.total()), *(str(counts[kind]) for kind in kinds)])
        rows.append(["all", str(total.total()), *(str(total[kind]) for kind in kinds)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument(
        "--batches", type=int, help="stop after this number of batches (the inputs of a reader, or the stops of a command)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="kinds of input to run")
    parser.add_argument("--fast", action="store_true", help="leave out the readers that are whole commands")
    parser.add_argument("--log", type=Path, help="file of outcomes; a campaign continues an existing file")
    parser.add_argument("--repeat", nargs=2, metavar=("READER", "INPUT"), help="repeat one changed file")
    parser.add_argument("--shown", action="store_true", help="show what the inputs print")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell with "&" sets it to be ignored, also in children
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    log = args.log and args.log.resolve()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="campaign") as folder:
        files = "files" in args.only or bool(args.repeat)
        campaign = Campaign(Path(folder).resolve(), args.seed, args.minutes, files, not args.fast, args.shown, log)
        campaign.repeat(args.repeat[0], int(args.repeat[1])) if args.repeat else campaign.run(tuple(args.only), args.batches)
    print(f"\npython -m tests.campaign {shlex.join(sys.argv[1:])}: {campaign.seconds / 60:.1f} minutes")
    print(campaign.table())
    sys.exit(bool(campaign.bad))


if __name__ == "__main__":
    main()
