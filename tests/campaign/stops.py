"""Runs that are killed at any moment, or whose disk is full, and are run again: they must end like an unbroken run."""

import fcntl
import itertools
import json
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datafree_kd
import train_scratch
from engine.data import splits
from engine.runtime.errors import run_command
from engine.runtime.processes import leave_processes
from engine.runtime.tensors import load_checkpoint, weights_digest
from registry import METHODS
from tests.campaign import readers
from tests.campaign.sandbox import EQUAL, Outcome
from tests.conftest import ROOT, TINY, outcome

KILLS, FULL = ("time", "operation", "write"), ("size limit", "tmpfs")
COMMANDS = (*METHODS, "train_scratch")
LONGER, SMALLER = "--epochs 4", "--image_size 8 --batch_size 32"  # not SMALLER for diffusion priors: their size is fixed
KILLED = 3  # largest number of kills of a run before it may finish
TWO, INTERPRETER = 0.15, 0.03  # shares of the kills: in runs of two processes; in a new interpreter in place of a fork
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Allowed exit codes: of a killed run, of a new interpreter killed while it imports, of two processes of which one is killed.
BY_SIGNAL = {-signal.SIGKILL, -signal.SIGXFSZ, 128 + signal.SIGTERM, 128 + signal.SIGINT}
EARLY = BY_SIGNAL | {-signal.SIGTERM, -signal.SIGINT}
OF_OTHERS = EARLY | {2}
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")  # audit events of ``sys.addaudithook``
PATIENCE = 20  # seconds that a launcher gives the other processes before it kills them
HANG = 300  # seconds until a run counts as hanging; long, because the machine may be shared


class Whole(NamedTuple):
    """An unbroken run: its result, its time in seconds, its number of file operations, and the size of its files."""

    end: Any
    seconds: float
    changes: int
    bytes: int


def by_name(folder: Path) -> dict[str, str | bytes]:
    """Bytes of all shards, the student's weights and the metrics of a run, by name."""
    shards, student, metrics = outcome(folder)
    return {**{str(path): content for path, content in shards.items()}, "student": student, "metrics": metrics}


def stage_now(folder: Path) -> str:
    """The stage of a run folder that is not finished."""
    file = folder / "stages.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    return next((name for name, entry in record.items() if entry["status"] != "done"), "between stages")


def end_of(command: str, folder: Path) -> Any:
    """Results of a run that must equal those of an unbroken run; None: the run did not finish."""
    if command == "train_scratch":
        weights = folder / "weights.pth"
        return weights_digest(load_checkpoint(weights)["state_dict"]) if weights.exists() else None
    return by_name(folder) if (folder / "student.pth").exists() else None


def at_each_change(call: Callable[[int], None]) -> None:
    """Calls ``call(k)`` before the k-th time that this process opens a file to write, or renames, removes or makes one."""
    numbers = itertools.count()

    def hook(event: str, arguments: tuple) -> None:
        if event in CHANGES or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            call(next(numbers))

    sys.addaudithook(hook)


def limit_files(size: int, kill: bool) -> None:
    """Limits the size of files: a write beyond ``size`` bytes fails, or with ``kill`` it kills the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def mount(folder: Path, pages: int, again: bool = False) -> bool:
    """Mounts a file system of ``pages`` pages of memory; returns whether this machine allows it."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"{'remount,' * again}size={pages * 4}k", "none", str(folder)]
    with suppress(FileNotFoundError):
        return subprocess.run(words, capture_output=True).returncode == 0
    return False


class Stops:
    """Stops tiny runs of every command and resumes them.

    Args:
        root: folder that is to be made.
        teacher: checkpoint of a resnet8.
        seed: seed of the stops.
    """

    def __init__(self, root: Path, teacher: Path, seed: int):
        root.mkdir()
        self.root, self.teacher, self.seed = root, teacher, seed
        self.disk, self.whole = root / "disk", {}
        self.full = FULL if mount(self.disk, 1) else FULL[:1]
        if self.full == FULL:
            self.unmount()

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.disk)], capture_output=True)

    def start(self, command: str, folder: Path, errors: int, prepare=None, rank: dict[str, str] | None = None) -> int:
        """Starts a command in a fork of this process, where all is imported; returns the process id.

        Args:
            errors: file descriptor for its stderr.
            prepare: function called in the fork before the command; None: start a new interpreter, as users do.
            rank: environment variables that a launcher sets.
        """
        if command in METHODS:
            smaller = "" if "num_inference_steps" in TINY[command] else SMALLER
            module, words = datafree_kd, f"{readers.flags_of(command, self.teacher, folder)} {LONGER} {smaller}"
        else:
            module, words = train_scratch, f"{readers.SCRATCH} --save_dir {folder} --output {folder}/weights.pth"
        words = [f"{module.__name__}.py", *words.split()]
        if prepare is None:
            return subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT).pid
        if child := os.fork():
            return child
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(errors, 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            os.environ |= rank or {}
            sys.argv = words
            splits._train_split_forbidden = False
            prepare()
            run_command(module.main, leave_processes)
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            os._exit(3)

    def run(self, command, folder, count=1, prepare=None, after=None, number=0, victims=()) -> tuple[list[int], str]:
        """Does one run; returns the exit codes of its processes, negative after a signal, and their stderr.

        If one of several processes fails, the others are ended, as a launcher does.

        Args:
            count: number of processes.
            after: seconds after which signal ``number`` is sent to the processes in ``victims``; None: never.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2**20)
        os.set_blocking(reader, False), os.set_blocking(writer, False)
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
        running = {self.start(command, folder, writer, prepare, rank): k for k, rank in enumerate(ranks)}
        os.close(writer)
        codes, now, everyone, errors = [0] * count, time.monotonic(), range(count), ""
        hang, due = now + HANG, [] if after is None else [(now + after, number, victims)]
        while running:
            for process, place in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    del running[process]
                    if status and not any(codes):
                        due += [(now, signal.SIGTERM, everyone), (now + PATIENCE, signal.SIGKILL, everyone)]
                    codes[place] = os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if now > hang:
                errors, hang = f"no end after {HANG} s\n", now + HANG
                due.append((now, signal.SIGKILL, everyone))
            for moment in [moment for moment in due if moment[0] <= now]:
                due.remove(moment)
                for process in [process for process, place in running.items() if place in moment[2]]:
                    os.kill(process, moment[1])
            time.sleep(0.005)
        with suppress(BlockingIOError):
            while part := os.read(reader, 2**20):
                errors += part.decode(errors="replace")
        os.close(reader)
        return codes, errors

    def unbroken(self, command: str, count: int) -> Whole:
        """The unbroken run of ``count`` processes, made once, which stopped runs must equal."""
        if (command, count) not in self.whole:
            folder, changes = self.root / f"whole {command} {count}".replace(" ", "_"), mmap.mmap(-1, 8)

            def note(number: int) -> None:
                if os.environ.get("RANK", "0") == "0":
                    changes[:] = number.to_bytes(8, "little")

            begun = time.monotonic()
            codes, errors = self.run(command, folder, count, lambda: at_each_change(note))
            assert not any(codes), (command, codes, errors)
            seconds, sizes = time.monotonic() - begun, [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
            end = end_of(command, folder)
            assert end, command
            self.whole[command, count] = Whole(end, seconds, int.from_bytes(changes[:], "little"), sum(sizes))
            shutil.rmtree(folder)
        return self.whole[command, count]

    def stop(self, command: str, folder: Path, count: int, way: str, draw: random.Random) -> tuple[str, list[int], str]:
        """Does a run and stops it in one way, unless it ends first; returns how, its exit codes, and its stderr."""
        whole, number = self.unbroken(command, count), draw.choice(SIGNALS)
        run, name = partial(self.run, command, folder, count), signal.Signals(number).name
        if way in ("time", "interpreter"):
            victims = draw.choice(((0,), (count - 1,), tuple(range(count))))
            prepare, start = (None, 6) if way == "interpreter" else (lambda: None, 0)
            after = draw.uniform(0, 1) * (whole.seconds + start)
            return f"{name} to {victims} after {after:.2f} s", *run(prepare, after, number, victims)
        if way == "operation":
            last = draw.randrange(whole.changes)
            kill = lambda k: k == last and os.environ.get("RANK", "0") == "0" and os.kill(os.getpid(), number)  # noqa: E731
            return f"{name} before file operation {last}", *run(lambda: at_each_change(kill))
        if way == "tmpfs":
            pages = draw.randrange(1, whole.bytes // 4096 + 2)
            mount(self.disk, pages)
            return f"tmpfs of {pages} pages", *run(lambda: None)
        size = int(10 ** draw.uniform(1, 5.5))
        return f"{way} beyond {size} bytes", *run(lambda: limit_files(size, kill=way == "write"))

    def check(self, command: str, number: int, ways: tuple[str, ...]) -> tuple[str, list[tuple[str, Outcome]]]:
        """Stops a run up to ``KILLED`` times and lets it finish; returns its row of the table, and each stop's outcome."""
        draw, full = random.Random(f"{self.seed} {ways} {command} {number}"), ways == FULL
        way, row, count, wanted = "", f"kills of {command}", 1, BY_SIGNAL
        if full:
            ways, wanted = (way := draw.choice(self.full),), {2}
            row = f"full disk, {way}"
        elif command in METHODS and draw.random() < TWO:
            row, count, wanted = "kills, two processes", 2, OF_OTHERS
        elif draw.random() < INTERPRETER:
            row, ways, wanted = "kills, new interpreter", ("interpreter",), EARLY
        folder, expected, found, codes = self.root / "stopped", self.unbroken(command, count).end, [], [0]
        if way == "tmpfs":
            folder = self.disk / "run"
        try:
            for _ in range(1 if full else draw.randrange(1, KILLED + 1)):
                way = draw.choice(ways)
                how, codes, errors = self.stop(command, folder, count, way, draw)
                if not any(codes):
                    break
                how = f"{command}, round {number}: {how}, in {stage_now(folder)}"
                last = errors.strip().splitlines()[-14:] or [""]
                good = wanted.issuperset({*codes} - {0}) and not any(word in errors for word in ("Traceback", "no end"))
                good = good and (not full or last[-1].startswith("error: no space left"))
                kind = EQUAL if good else "traceback" if "Traceback" in errors else f"exit codes {codes}"
                found.append((how, Outcome(kind, "" if good else "\n".join(last))))
            if way == "tmpfs":
                mount(self.disk, 2**16, again=True)
            if any(codes):
                codes, errors = self.run(command, folder, count, lambda: None)
            if any(codes) or "Traceback" in errors or end_of(command, folder) != expected:
                unequal = Outcome(f"no end: exit codes {codes}" if any(codes) else "unequal", errors[-2000:])
                found = [(how, unequal) for how, _ in found or [(f"{command}, round {number}: no stop", unequal)]]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.unmount()
        return row, found
