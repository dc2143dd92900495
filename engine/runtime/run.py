"""The run folder: flags, metrics, log and pictures of a run. All files can be read while the run is in progress.

args.json      flags, command, versions of the last command    stages.json    state of each stage
outputs.json   digests of the files written to --output
bank/, variants/   images; a streaming method keeps a sample of its last images in images.safetensors
metrics.jsonl  one line per round or epoch                     log.txt        printed lines
times.jsonl    when each of those lines was written            result.json    figures of the finished run
events.*       TensorBoard                                     confusion.json teacher and student on the test split
"""

import fcntl
import functools
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.runtime import checksums
from engine.runtime.errors import UserError
from engine.runtime.files import (
    atomic_path,
    delete_temporaries,
    is_temporary,
    json_object,
    parse_json,
    read_json,
    write_json,
)
from engine.runtime.processes import is_main
from engine.runtime.schema import require

FOLDERS = ("bank", "variants", "pictures")  # subfolders of a run folder
METRICS, TIMES = "metrics.jsonl", "times.jsonl"
OUTPUTS = "outputs.json"  # SHA-256 of all contents that a run has written to --output, which may lie outside its folder
LINE = {
    "stage": str, "round": int, "seconds?": float, "cpu_seconds?": float, "images?": int, "student_steps?": int, "acc1?": float,
    "agreement?": float,
}  # fmt: skip


def require_run_folder(path: Path) -> None:
    """Raises a UserError if ``path`` is a file, or holds files, but neither the args.json nor the stages.json of a run.

    A folder with only a lock and temporary files is accepted: a run was killed in it before it wrote args.json.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--save_dir {path} is a file, a folder wanted; give another --save_dir")
    if not path.is_dir() or all(file.name == ".lock" or is_temporary(file) for file in path.iterdir()):
        return
    args, stages = (json_object(path / name) for name in ("args.json", "stages.json"))
    is_stage = (isinstance(entry, dict) and "depends_on" in entry for entry in stages.values())
    if not ({"args", "command", "versions"} <= args.keys() or any(is_stage)):
        raise UserError(
            f"--save_dir {path} contains files, but not those of a run; give a new folder, or the folder of a run"
        )


def require_own_output(folder: Path, output: Path, earlier: bool = False) -> None:
    """Checks that a run may write to ``--output``. The run knows its own file by the digests in its ``OUTPUTS``.

    Args:
        folder: run folder; may be missing.
        output: path of the file.
        earlier: whether an existing file is that of this run, if the run was begun by an earlier version, without ``OUTPUTS``.
    Raises:
        UserError: ``output`` cannot be a file, or is a file of somebody else.
    """
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    if output.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        wrong = f"{output} is a folder" if output.is_dir() else f"{parent} is no writable folder"
        raise UserError(f"--output {output} cannot be written: {wrong}; give another --output")
    if output.exists():
        own = _own_outputs(folder)
        if not (earlier if own is None else checksums.digest_of(output) in own):
            raise UserError(f"{output} exists and is not from this run; give another --output, or move that file away")


def _own_outputs(folder: Path) -> list[str] | None:
    """Returns the digests in the ``OUTPUTS`` of a run folder; None if there is no such file."""
    file = folder / OUTPUTS
    if not file.exists():
        return None
    digests = read_json(file)
    require(digests, [str], str(file))
    return digests


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl or times.jsonl; [] if there is no such file.

    An incomplete last line, left by a kill, is ignored. Fields that are null are left out.

    Raises:
        UserError: a line is not a line of metrics.
    """
    lines, texts = [], file.read_text(errors="replace").split("\n") if file.exists() else []
    for number, text in enumerate(texts, start=1):
        if number == len(texts):  # text after the last line break: empty, or an incomplete line
            break
        try:
            line = parse_json(text)
        except ValueError as error:
            raise UserError(f"line {number} of {file} is not readable JSON ({error}); delete that line") from None
        require(line, LINE, f"line {number} of {file}", "delete that line")
        line = {name: value for name, value in line.items() if value is not None}
        figures = {name: value for name, value in line.items() if name != "stage"}
        require(figures, {str: float}, f"line {number} of {file}", "delete that line")
        lines.append(line)
    return lines


def earlier_value(folder: Path, name: str) -> Any:
    """Returns the value of a flag with which the run in a folder was begun; None if there is no run or no such flag."""
    stages, args = (json_object(folder / file) for file in ("stages.json", "args.json"))
    settings = [entry.get("depends_on") for entry in stages.values() if isinstance(entry, dict)] + [args.get("args")]
    return next((values[name] for values in settings if isinstance(values, dict) and name in values), None)


class Run:
    """Writes a run folder, which is locked for this process.

    Args:
        save_dir: run folder; created if missing.
        args: all flags by name, for args.json.
        class_names: names of the classes in pictures; None: no names.
    Raises:
        UserError: the folder cannot be written, holds other files than a run's, or another process is using it.
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
        before = {name: max((line.get(name, 0) for line in read_lines(self.path / TIMES)), default=0) for name in clocks}
        self._clocks = {name: (clock, clock() - before[name]) for name, clock in clocks.items()}
        self.provenance = {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "commit": commit(),
            "versions": versions(),
        }
        write_json(self.path / "args.json", {"args": args, **self.provenance})
        checksums.keep(self.path)

    def log(self, text: str) -> None:
        """Prints a line above any progress bar and appends it to log.txt."""
        tqdm.write(text)
        with open(self.path / "log.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, stage: str, round: int, values: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl and the numbers to TensorBoard under ``<stage>/<name>``.

        Times are written to times.jsonl instead. The metrics of a resumed run equal those of an uninterrupted run, but its
        times do not. They are the seconds of all commands of this run so far: clock time, and CPU time of this process. The
        time between the last line and a kill is not counted.
        """
        for name, line in ((TIMES, self._times()), (METRICS, values)):
            with open(self.path / name, "a") as file:
                file.write(json.dumps({"stage": stage, "round": round, **line}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{stage}/{name}", value, round)

    def _times(self) -> dict[str, float]:
        return {name: round(clock() - start, 2) for name, (clock, start) in self._clocks.items()}

    def history(self, stage: str) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl of one stage, without an incomplete last line."""
        return [line for line in read_lines(self.path / METRICS) if line["stage"] == stage]

    def rewind(self, stage: str, round: int) -> None:
        """Deletes the metrics and times of a stage from ``round`` on, because these rounds will be repeated."""
        for file in (self.path / METRICS, self.path / TIMES):
            kept = [line for line in read_lines(file) if line["stage"] != stage or line["round"] < round]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if file.exists() and file.read_text(errors="replace") != text:
                with atomic_path(file) as temporary:
                    temporary.write_text(text)

    @property
    def board(self):
        """The TensorBoard writer, created at first use, because its import takes seconds."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path), flush_secs=10)
        return self._writer

    def adopt_output(self, output: Path) -> None:
        """Begins the list ``OUTPUTS`` of a run. A file at ``output``, which ``require_own_output`` has accepted, is on the list."""
        self._list_output([checksums.digest_of(output)] if output.exists() else [])

    @contextmanager
    def output(self, output: Path) -> Iterator[Path]:
        """As ``atomic_path``, for a file outside of the folder. Its digest is listed in ``OUTPUTS`` before it gets its name.

        Raises:
            UserError: ``output`` has become a file of somebody else.
        """
        require_own_output(self.path, output)
        with atomic_path(output) as temporary:
            try:
                yield temporary
            except UserError as error:
                raise UserError(str(error).replace(str(temporary), str(output))) from None
            self._list_output([checksums.digest_of(temporary)])

    def _list_output(self, digests: list[str]) -> None:
        known = _own_outputs(self.path)
        if known is None or set(digests) - set(known):
            write_json(self.path / OUTPUTS, [*(known or []), *digests])

    def picture(self, name: str, image: Tensor, round: int = 0) -> None:
        """Writes an image (3, H, W) uint8 to TensorBoard and to ``pictures/<name>.png``."""
        from PIL import Image

        self.board.add_image(name, image, round)
        with atomic_path(self.path / "pictures" / f"{name}.png") as temporary:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")

    def result(self, values: dict[str, Any]) -> None:
        """Writes result.json: the figures of the run, CPU time, peak memory, machine, command, commit and versions."""
        cpu = {"cpu_seconds": self._times()["cpu_seconds"]}
        write_json(self.path / "result.json", {**values, **cpu, **peak_memory(), "machine": machine(), **self.provenance})

    def close(self) -> None:
        """Closes the TensorBoard writer and unlocks the folder."""
        if self._writer is not None:
            self._writer.close()
        self._lock.close()


def clock(device: torch.device) -> float:
    """Waits for the device's pending work and returns the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


class Stopwatch:
    """Measures the seconds inside ``with stopwatch:``. On a GPU it uses CUDA events and synchronizes only in ``read``."""

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
        """Returns the seconds measured so far."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        self.seconds += sum(a.elapsed_time(b) / 1000 if on_gpu else b - a for a, b in self.events)
        self.events = []
        return self.seconds


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    names = ("torch", "torchvision", "diffusers", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def machine() -> str:
    """Returns the name of the GPU, or the number of CPU threads in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


@functools.cache
def commit() -> str:
    """Returns the git commit of this project, followed by "+" if files have changed since; "unknown" outside git."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def peak_memory() -> dict[str, float]:
    """Returns the peak memory of this process in MiB: resident memory, and GPU memory if there is a GPU.

    Resident memory includes pages of memory-mapped banks, which the system can take back when memory is short.
    """
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    peak = {"peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)}
    if torch.cuda.is_available():
        peak["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return peak


class _Lines:
    """Output stream for a progress bar in a log file: prints each state of the bar on a new line."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.replace("\r", "").rstrip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, what: str, unit: str, start: int = 0, delay: float = 0) -> tqdm:
    """Returns a progress bar on stderr with speed and remaining time. Only the main process shows it.

    If stderr is not a terminal, the bar prints a line every ten seconds.

    Args:
        total: number of units in all.
        what: description of the work.
        unit: name of the unit.
        start: number of units done by earlier commands.
        delay: seconds before the bar appears, so that short work shows none.
    """
    common = {"total": total, "initial": start, "desc": what, "unit": unit, "delay": delay, "leave": False}
    common["disable"] = not is_main() or sys.stderr is None  # None: the command was started with stderr closed
    if not common["disable"] and sys.stderr.isatty():
        return tqdm(**common, mininterval=0.2, dynamic_ncols=True)
    return tqdm(**common, mininterval=10, maxinterval=20, ncols=110, file=_Lines())
