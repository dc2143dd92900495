"""Does many tiny runs of two processes each; every run must end with exit code 0 and a finished run folder.

    python -m tests.many_processes --runs 200

The processes are forks of this one, which has imported all modules that they need. They end as ``python datafree_kd.py``
does. ``tests/entry/test_processes.py`` tests what such runs compute. This module tests how they end, because a fault there
shows only once in many runs.
"""

import argparse
import collections
import importlib
import os
import runpy
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.conftest import ROOT, TINY, TINY_TASK, build_network

IMPORTED = ("engine.loops.stages", "datafree.filter", "torch.utils.tensorboard", "sklearn.datasets", "torch.distributed")


def start(rank: int, port: int, words: list[str], log: Path) -> int:
    """Starts one process of a run; returns its id."""
    process = os.fork()
    if process:
        return process
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.argv = ["datafree_kd.py", *words]
    runpy.run_path(str(ROOT / "datafree_kd.py"), run_name="__main__")
    sys.exit()  # leaves through all frames, so that the interpreter is finalized like that of any script


def run(number: int, folder: Path, method: str, teacher: Path) -> list[int]:
    """Does one run of two processes; returns their exit codes, negative after a signal."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    target = folder / f"run{number}"
    words = f"--method {method} {TINY_TASK} {TINY[method]} --teacher_ckpt {teacher} --save_dir {target}".split()
    processes = [start(rank, port, words, folder / f"log{number}") for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(codes) or not (target / "result.json").exists():
        print(
            f"run {number}: exit codes {codes}; its last lines:\n{(folder / f'log{number}').read_text()[-600:]}", flush=True
        )
        codes = codes if any(codes) else [1, 1]
    return codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--method", default="csd")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after this time")
    args = parser.parse_args()
    begun, ends = time.monotonic(), collections.Counter()
    torch.set_num_threads(1)
    for module in IMPORTED:
        importlib.import_module(module)
    folder = Path(tempfile.mkdtemp())  # no context manager, because the forks would delete the folder too
    teacher = folder / "teacher.pth"
    torch.manual_seed(0)
    torch.save(build_network("resnet8", 10).state_dict(), teacher)
    for number in range(args.runs):
        if time.monotonic() - begun > args.seconds:
            break
        ends[tuple(run(number, folder, args.method, teacher))] += 1
    shutil.rmtree(folder)
    print(f"{sum(ends.values())} runs in {time.monotonic() - begun:.0f} s; exit codes: {dict(ends)}")
    return 0 if set(ends) == {(0, 0)} else 1


if __name__ == "__main__":
    sys.exit(main())
