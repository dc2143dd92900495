"""Runs many inputs in forked processes, each with limits of time and memory, and reports the outcome of each."""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from engine.runtime.errors import explain, one_line

MEMORY = 2**30  # bytes that an input may add to the memory of the process
ROOM = 6 * 2**30  # bytes that the address space may grow; further allocations fail
WALL = 120  # seconds without an outcome; long, because a shared machine may be slow
REFUSED, ACCEPTED, EQUAL = "one line, exit 2", "accepted and finite", "resumed bit-equal"
GOOD = (REFUSED, ACCEPTED, EQUAL)


class Outcome(NamedTuple):
    """Outcome of one input. kind: one of GOOD, or what went wrong. detail: last lines of the error."""

    kind: str
    detail: str = ""


class Hang(BaseException):
    """An input took too long."""


class Silent(Exception):
    """An input was accepted and changed the result."""


def judge(call: Callable[[], str], seconds: float, canary: Path) -> Outcome:
    """Runs one input in this process and returns its outcome.

    Args:
        call: the input; returns ACCEPTED or EQUAL, or raises.
        seconds: limit of processor time.
        canary: file that exists only if code of the input was executed.
    """

    def stop(*_):
        raise Hang

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        outcome = Outcome(call())
    except SystemExit as end:
        outcome = Outcome(REFUSED if end.code == 2 else f"exit {end.code}")
    except Hang:
        outcome = Outcome(f"hang over {seconds:g} s", "".join(traceback.format_exc().splitlines(True)[-6:]))
    except Silent as error:
        outcome = Outcome("silent change", str(error))
    except Exception as error:
        message = explain(error)
        shown = "".join(traceback.format_exc().splitlines(True)[-14:])
        outcome = Outcome("traceback", shown) if message is None else Outcome(REFUSED, one_line(message))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return Outcome("executed payload") if canary.exists() else outcome


def run_all(
    inputs: list[tuple[str, Callable[[], str]]], seconds: float, canary: Path, shown: bool = False, memory: int = MEMORY
) -> list[Outcome]:
    """Runs named inputs and returns their outcomes; if the process dies, another one runs the remaining inputs."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(inputs):
        outcomes += _one_process(inputs[len(outcomes) :], seconds, canary, shown, memory)
        canary.unlink(missing_ok=True)
    return outcomes


def _one_process(inputs: list, seconds: float, canary: Path, shown: bool, memory: int) -> list[Outcome]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            os.close(reader)
            _child(inputs, seconds, canary, writer, shown, memory)
        os._exit(0)
    os.close(writer)
    text, deadline = b"", time.monotonic() + WALL
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            if not (part := os.read(reader, 65536)):
                break
            text, deadline = text + part, time.monotonic() + WALL
    hung = left <= 0
    if hung:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    found = [Outcome(*json.loads(line)) for line in text.splitlines()]
    if len(found) < len(inputs) and not (found and found[-1].kind.startswith(("over", "hang"))):
        found.append(Outcome(f"hang over {WALL} s" if hung else f"the process died ({status})"))
    return found


def _child(inputs: list, seconds: float, canary: Path, writer: int, shown: bool, memory: int) -> None:
    if not shown:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        sys.stdout = sys.stderr = open(os.devnull, "w")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    before = _peak()
    for _, call in inputs:
        outcome: Any = judge(call, seconds, canary)
        if _peak() - before > memory:
            outcome = Outcome(f"over 1 GB of memory ({(_peak() - before) / 1e9:.1f}), {outcome.kind}", outcome.detail)
        os.write(writer, json.dumps(outcome).encode() + b"\n")
        if outcome.kind.startswith(("over", "hang", "executed")):  # the next input needs a clean process
            return


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
