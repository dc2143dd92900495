"""Damages files, gives odd flags and hostile files, kills runs and fills the disk, and counts what becomes of it.

    python -m tests.campaign --minutes 10 --seed 0          all of it, in turn
    python -m tests.campaign --minutes 10 --only files flags        of files, flags, payloads, full and kills

Wanted are three outcomes: one line and exit 2; accepted, with finite numbers; resumed, bit-equal to an unbroken run. Anything
else is printed with the command that repeats it, and the exit code is 1.
"""

import argparse
import contextlib
import io
import itertools
import os
import random
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from engine.loops.settings import DistillFlags, RunFlags, TaskFlags
from engine.runtime.errors import resolve, run_command
from registry import METHODS
from tests.campaign import readers
from tests.campaign.sandbox import ACCEPTED, EQUAL, GOOD, MEMORY, ROOM, Outcome, Silent, run_all
from tests.conftest import ROOT
from tests.kill_and_resume import by_name, stage_now

KINDS = ("files", "flags", "payloads", "full", "kills")
LONGER = "--epochs 8"
AT_ONCE = 40  # inputs a process
ODD_TEXT = (
    "",
    "x",
    "x" * 300,
    "a\nb",
    "../../..",
    "/dev/null",
    "{seed}",
    "é\u2028",
    "-",
    "nan",
    "1,2",
    ",",
    "/proc/self/mem",
    "x:y(z=1)",
)
ODD_NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "3",
    "0.5",
    "1e-30",
    "1e12",
    "999999999999",
    "4096",
    "nan",
    "inf",
    "1e999",
    "0x10",
    " 1",
    "1_0",
)


def wait(process: int, seconds: float = 600) -> int | None:
    """The exit code of a process, negative if a signal ended it; None: it goes on after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        number, status = os.waitpid(process, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.01)


class Campaign:
    """Runs inputs until the time is over.

    Args:
        shown: the inputs' own output is shown.
    """

    def __init__(self, root: Path, seed: int, minutes: float, slow: bool, shown: bool = False):
        self.root, self.seed, self.shown = root, seed, shown
        self.canary, self.counts, self.bad = root / "executed", {}, []
        with (
            contextlib.nullcontext() if shown else contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(sys.stderr if shown else io.StringIO()),
        ):
            self.readers = readers.build(root / "whole", slow)
        for name, reader in self.readers.items():  # what is whole is accepted
            folder = readers.shutil.copytree(reader.folder, root / "changed")
            (outcome,) = run_all([(name, lambda: reader.read(folder) is not None and ACCEPTED)], 60, self.canary, shown)
            assert outcome.kind == ACCEPTED, (name, outcome)
            readers.shutil.rmtree(folder)
        self.teacher = root / "whole/teachers/teacher.pth"
        self.unbroken: dict[str, tuple] = {}
        self.begun = time.monotonic()
        self.end = self.begun + 60 * minutes

    def note(self, name: str, input: str, outcome: Outcome, wanted: tuple[str, ...] = GOOD) -> None:
        """Counts an outcome; one that is not wanted is printed."""
        self.counts.setdefault(name, Counter())[outcome.kind] += 1
        if outcome.kind not in wanted or "\n" in outcome.detail:
            self.bad.append((name, input, outcome))
            print(f"!! {name}: {input}: {outcome.kind}\n{outcome.detail}", flush=True)

    def batch(
        self,
        name: str,
        inputs: list[tuple[str, Callable[[], str]]],
        seconds: float = 5,
        memory: int = MEMORY,
        wanted: tuple[str, ...] = GOOD,
    ) -> None:
        for (input, _), outcome in zip(inputs, run_all(inputs, seconds, self.canary, self.shown, memory)):
            self.note(name, input, outcome, wanted)

    def files(self, number: int) -> None:
        """A changed file for every reader; for the fast ones many."""
        for name, reader in self.readers.items():
            whole_run = reader.expected is not None or name == "page"
            count = 3 if whole_run else AT_ONCE
            first = (self.seed << 40) + number * AT_ONCE
            folder = self.root / "changed"
            inputs = [(f"input {first + k}", readers.changed_file(reader, folder, first + k)) for k in range(count)]
            self.batch(name, inputs, 30 if whole_run else 5)
            if time.monotonic() > self.end:
                return

    def repeat(self, name: str, number: int) -> None:
        """One changed file again."""
        call = readers.changed_file(self.readers[name], self.root / "changed", number)
        self.batch(name, [(f"input {number}", call)], 60)

    def flags(self, number: int) -> None:
        """Tiny runs of every method with one odd value of one flag."""
        draw = random.Random(f"{self.seed} {number}")
        for method in METHODS:
            inputs = []
            for k in range(6):
                folder = self.root / "flags" / "a" / "b" / f"{method}{k}"
                words, text = self.odd_flag(method, draw)
                inputs.append((f"--method {method} {text}", self.run_of(method, words, folder)))
            self.batch(f"flags of {method}", inputs, 30, ROOM)  # a large batch is its user's wish
            if time.monotonic() > self.end:
                return

    def odd_flag(self, method: str, draw: random.Random) -> tuple[list[str], str]:
        """A flag with an odd value, as words and for the eye."""
        groups = (TaskFlags, RunFlags, DistillFlags, resolve(METHODS[method]).Config)
        fields = [field for group in groups for field in group.__dataclass_fields__.values() if field.type is not bool]
        field = draw.choice([field for field in fields if field.name not in ("gpu", "compile")])
        legal = field.metadata["range"]
        edges = [str(v) for v in (legal.least, legal.above, legal.most, legal.below) if v is not None]
        numeric = "int" in str(field.type) or "float" in str(field.type)
        value = draw.choice((*ODD_NUMBERS, *edges * 3) if numeric else ODD_TEXT)
        long = field.name in ("epochs", "kd_steps", "ep_steps", "init_rounds", "fit_passes", "scale", "images_per_class")
        if "steps" in field.name or "loops" in field.name or long or field.name in ("variants", "minutes", "lca_repair"):
            value = value if len(value) < 4 else "3"  # a long run is no mistake
        return [f"--{field.name}={value}"], f"--{field.name}={value[:40]!r}"

    def run_of(self, method: str, words: list[str], folder: Path) -> Callable[[], str]:
        def call() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            os.chdir(folder)
            import datafree_kd

            flags = readers.flags_of(method, self.teacher, Path("run")).replace(f"--image {ROOT}", f"--image {ROOT}")
            sys.argv = ["datafree_kd.py", *flags.split(), *words]
            readers.splits._train_split_forbidden = False
            datafree_kd.main()
            for file in folder.rglob("student.pth"):
                state = torch.load(file, weights_only=True)["state_dict"]
                if not readers.is_finite(state):
                    raise Silent("a student of NaN or infinite weights was saved as finished")
            return ACCEPTED

        return call

    def payloads(self, number: int) -> None:
        """All hostile files, once."""
        if number == 0:
            self.batch("payloads", readers.hostile(self.root / "hostile", self.canary))

    def full(self, number: int) -> None:
        """No file can grow beyond a size for a while; afterwards the run goes on to the same end."""
        draw = random.Random(f"full {self.seed} {number}")
        for name, reader in self.readers.items():
            if not name.endswith("going on") or "scratch" in name:
                continue
            folder, limit = self.root / f"full_{number}", draw.choice((0, 100, 2000, 10**4, 10**5, 3 * 10**5))

            def fill(folder=folder, reader=reader, limit=limit) -> str:
                readers.shutil.copytree(reader.folder, folder)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                reader.read(folder)
                return EQUAL

            def again(folder=folder, reader=reader) -> str:
                found = reader.read(folder)
                readers.shutil.rmtree(folder)
                if found != reader.expected:
                    raise Silent("after a full disk the end is another")
                return EQUAL

            self.batch("full disk", [(f"{name}, {limit} bytes", fill)], 60)
            self.batch("after a full disk", [(f"{name}, {limit} bytes", again)], 60, wanted=(EQUAL,))
            if time.monotonic() > self.end:
                return

    def kills(self, number: int) -> None:
        """Kills of a run of every method at random moments, until it is done; it must end as the unbroken one."""
        draw = random.Random(f"kills {self.seed} {number}")
        for method in METHODS:
            whole, broken = (self.root / f"{kind}_{method}" for kind in ("unbroken", "killed"))
            if method not in self.unbroken:
                began = time.monotonic()
                assert wait(self.start(method, whole)) == 0, method
                self.unbroken[method] = by_name(whole), time.monotonic() - began
            expected, length = self.unbroken[method]
            stages, signals, process = [], (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT), None
            while process is None or wait(process, draw.uniform(0, 1) * length) is None:
                if process is not None:
                    os.kill(process, draw.choice(signals))
                    wait(process)
                    stages.append(stage_now(broken))
                process = self.start(method, broken)
            same = (broken / "student.pth").exists() and by_name(broken) == expected
            for stage in stages:
                kind = EQUAL if same else "unequal"
                self.note(f"kills of {method}", f"in {stage}, round {number}", Outcome(kind), wanted=(EQUAL,))
            readers.shutil.rmtree(broken)
            if time.monotonic() > self.end:
                return

    def start(self, method: str, folder: Path) -> int:
        """Begins a run of a method in a process of its own; returns its number."""
        child = os.fork()
        if child:
            return child
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                sys.argv = ["datafree_kd.py", *readers.flags_of(method, self.teacher, folder).split(), *LONGER.split()]
                readers.splits._train_split_forbidden = False
                run_command(readers.datafree_kd.main)
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            os._exit(3)

    def table(self) -> str:
        """Outcomes by reader."""
        kinds = [*GOOD, *sorted({kind for counts in self.counts.values() for kind in counts} - set(GOOD))]
        rows = [["", "inputs", *kinds]]
        total: Counter = Counter()
        for name, counts in self.counts.items():
            total += counts
            rows.append([name, str(counts.total()), *(str(counts[kind]) for kind in kinds)])
        rows.append(["all", str(total.total()), *(str(total[kind]) for kind in kinds)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def run(minutes: float, seed: int, kinds: tuple[str, ...] = KINDS, slow: bool = True, shown: bool = False) -> Campaign:
    """A campaign of so many minutes, each kind getting its share in turn."""
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="campaign") as folder:
        campaign = Campaign(Path(folder).resolve(), seed, minutes, slow, shown)
        for number in itertools.count():
            for kind in kinds:
                if time.monotonic() > campaign.end:
                    return campaign
                getattr(campaign, kind)(number)
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="some kinds of input")
    parser.add_argument("--fast", action="store_true", help="without the readers that are whole commands")
    parser.add_argument("--repeat", nargs=2, metavar=("READER", "INPUT"), help="one changed file again")
    parser.add_argument("--shown", action="store_true", help="show what the inputs print")
    args = parser.parse_args()
    if args.repeat:
        with tempfile.TemporaryDirectory(prefix="campaign") as folder:
            os.chdir(ROOT)
            campaign = Campaign(Path(folder).resolve(), 0, 1, not args.fast, args.shown)
            campaign.repeat(args.repeat[0], int(args.repeat[1]))
            print(campaign.table())
        return
    campaign = run(args.minutes, args.seed, tuple(args.only), not args.fast, args.shown)
    print(f"\npython -m tests.campaign {shlex.join(sys.argv[1:])}: {(time.monotonic() - campaign.begun) / 60:.1f} minutes")
    print(campaign.table())
    sys.exit(bool(campaign.bad))


if __name__ == "__main__":
    main()
