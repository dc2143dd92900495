"""A run folder: what was asked, what was measured, and the pictures, all of it readable while the run goes on.

args.json      flags, command, versions of the last command    stages.json    what is done
bank/, variants/   images; of a method that keeps none images.safetensors, some of its last
metrics.jsonl  one line a round or epoch                       log.txt        what was printed
times.jsonl    when each of those lines was written            result.json    the run's figures, once it is finished
events.*       TensorBoard                                     confusion.json teacher and student on the test split
"""

import fcntl
import functools
import json
import platform
import resource
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.runtime import sums
from engine.runtime.errors import UserError
from engine.runtime.files import atomic_path, delete_temporaries, is_temporary, parse_json, write_json
from engine.runtime.processes import is_main
from engine.runtime.schema import require

FOLDERS = ("bank", "variants", "pictures")  # of a run folder
METRICS, TIMES = "metrics.jsonl", "times.jsonl"
LINE = {
    "stage": str, "round": int, "seconds?": float, "cpu_seconds?": float, "images?": int, "student_steps?": int, "acc1?": float,
    "agreement?": float,
}  # fmt: skip


def require_run_folder(path: Path) -> None:
    """Raises a UserError if ``path`` holds files, but neither the args.json nor the stages.json of a run.

    A run killed before it wrote either has left nothing but its lock and temporary files.
    """
    if not path.is_dir() or all(file.name == ".lock" or is_temporary(file) for file in path.iterdir()):
        return
    args, stages = (_json_object(path / name) for name in ("args.json", "stages.json"))
    is_stage = (isinstance(entry, dict) and "depends_on" in entry for entry in stages.values())
    if not ({"args", "command", "versions"} <= args.keys() or any(is_stage)):
        raise UserError(
            f"--save_dir {path} holds files that are no run of this program; give a new folder, or that of a run"
        )


def _json_object(file: Path) -> dict[str, Any]:
    """A JSON file's object; {} for anything else."""
    try:
        value = parse_json(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or times.jsonl; [] where there is no such file.

    A last one cut off by a kill is passed over. A field that is null counts as missing.

    Raises:
        UserError: a line is no line of metrics.
    """
    lines, texts = [], file.read_text(errors="replace").split("\n") if file.exists() else []
    for number, text in enumerate(texts, start=1):
        if number == len(texts):  # what is not ended is not whole
            break
        try:
            line = parse_json(text)
        except ValueError as error:
            raise UserError(f"line {number} of {file} is not readable JSON ({error}); delete that line") from None
        require(line, LINE, f"line {number} of {file}", "delete that line")
        lines.append({name: value for name, value in line.items() if value is not None})
    return lines


def earlier_value(folder: Path, name: str) -> Any:
    """The value of a flag with which the run in a folder was begun; None where there is none."""
    stages, args = (_json_object(folder / file) for file in ("stages.json", "args.json"))
    settings = [entry.get("depends_on") for entry in stages.values() if isinstance(entry, dict)] + [args.get("args")]
    return next((values[name] for values in settings if isinstance(values, dict) and name in values), None)


class Run:
    """One run folder, held by one process at a time.

    Args:
        class_names: what its pictures call the classes; None: nothing.
    Raises:
        UserError: the folder cannot be written, holds something else than a run, or another process is using it.
    """

    def __init__(self, save_dir: str | Path, args: dict[str, Any], class_names: tuple[str, ...] | None = None):
        self.path, self.class_names = Path(save_dir), class_names
        try:
            require_run_folder(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")
        except OSError as error:
            raise UserError(f"--save_dir {self.path} cannot be written ({error.strerror}); give a writable folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is running in {self.path}; wait for it, or give another --save_dir") from None
        for folder in (self.path, *(self.path / name for name in FOLDERS)):
            delete_temporaries(folder)
        self._writer = None
        clocks = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
        before = {name: max((line.get(name, 0) for line in self._lines(TIMES)), default=0) for name in clocks}
        self._clocks = {name: (clock, clock() - before[name]) for name, clock in clocks.items()}
        self.provenance = {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "commit": commit(),
            "versions": versions(),
        }
        write_json(self.path / "args.json", {"args": args, **self.provenance})
        sums.keep(self.path)

    def log(self, text: str) -> None:
        """Prints a line above any progress bar and appends it to log.txt."""
        tqdm.write(text)
        with open(self.path / "log.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, stage: str, round: int, values: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl and the numbers to TensorBoard under ``<stage>/<name>``.

        What the clock says goes to times.jsonl, for the figures of a resumed run are those of an unbroken one, its times
        are not: seconds of all commands of this run so far, by the clock and of this process on CPUs, without those that a
        kill has cost.
        """
        for name, line in ((TIMES, self._times()), (METRICS, values)):
            with open(self.path / name, "a") as file:
                file.write(json.dumps({"stage": stage, "round": round, **line}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{stage}/{name}", value, round)

    def _times(self) -> dict[str, float]:
        return {name: round(clock() - start, 2) for name, (clock, start) in self._clocks.items()}

    def history(self, stage: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one stage; a line cut off by a kill is passed over."""
        return [line for line in self._lines(METRICS) if line["stage"] == stage]

    def rewind(self, stage: str, round: int) -> None:
        """Forgets a stage's metrics from ``round`` on: those rounds are about to be repeated."""
        for file in (self.path / METRICS, self.path / TIMES):
            kept = [line for line in self._lines(file.name) if line["stage"] != stage or line["round"] < round]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if file.exists() and file.read_text(errors="replace") != text:
                with atomic_path(file) as temporary:
                    temporary.write_text(text)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return read_lines(self.path / name)

    @property
    def board(self):
        """The TensorBoard writer, made at first use (its import takes seconds)."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path), flush_secs=10)
        return self._writer

    def picture(self, name: str, image: Tensor, round: int = 0) -> None:
        """An image (3, H, W) uint8 to TensorBoard and to ``pictures/<name>.png``."""
        from PIL import Image

        self.board.add_image(name, image, round)
        with atomic_path(self.path / "pictures" / f"{name}.png") as temporary:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")

    def result(self, values: dict[str, Any]) -> None:
        """Writes result.json: the run's figures, CPU time, peak memory and provenance."""
        cpu = {"cpu_seconds": self._times()["cpu_seconds"]}
        write_json(self.path / "result.json", {**values, **cpu, **peak_memory(), "machine": machine(), **self.provenance})

    def close(self) -> None:
        """Flushes TensorBoard and lets the folder go."""
        if self._writer is not None:
            self._writer.close()
        self._lock.close()


class Stopwatch:
    """Seconds spent inside ``with stopwatch:``. On a GPU it counts by events, so that nothing waits before ``read``."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.events = device, 0.0, []

    def __enter__(self) -> None:
        self.start = self._mark()

    def __exit__(self, *_) -> None:
        self.events.append((self.start, self._mark()))

    def _mark(self):
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Seconds so far."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        self.seconds += sum(a.elapsed_time(b) / 1000 if on_gpu else b - a for a, b in self.events)
        self.events = []
        return self.seconds


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    names = ("torch", "torchvision", "diffusers", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def machine() -> str:
    """What kind of machine this is, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


@functools.cache
def commit() -> str:
    """The commit of this checkout, with "+" behind it if files have changed since; "unknown" outside git."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def peak_memory() -> dict[str, float]:
    """Peak memory of this process in MiB: resident, and on the GPU where there is one.

    Pages of a mapped bank count as resident while the system has room for them; it takes them back when memory is short.
    """
    peak = {"peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}
    if torch.cuda.is_available():
        peak["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return peak


class _Lines:
    """A log file is no terminal: each state of a progress bar gets a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.replace("\r", "").rstrip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, what: str, unit: str, start: int = 0, delay: float = 0) -> tqdm:
    """A progress bar on stderr with rate and time left; where stderr is no terminal, a line every ten seconds.

    Of several processes the main one alone shows it.

    Args:
        start: units done before.
        delay: seconds before it shows; what is done by then needs no bar.
    """
    common = {"total": total, "initial": start, "desc": what, "unit": unit, "delay": delay, "leave": False}
    common["disable"] = not is_main()
    if sys.stderr.isatty():
        return tqdm(**common, mininterval=0.2, dynamic_ncols=True)
    return tqdm(**common, mininterval=10, maxinterval=20, ncols=110, file=_Lines())
