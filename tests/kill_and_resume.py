"""Kills a run (SIGKILL, at times SIGTERM or SIGINT) at random moments and runs it again until it is done; the outcome must equal an unbroken run's.

    python -m tests.kill_and_resume --kills 20 --seed 0

Every run is a whole run on the debug task in processes of their own; ``tests/entry/test_kill.py`` does a few.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from engine.runtime.errors import resolve
from registry import METHODS
from tests.conftest import ROOT, TINY, TINY_TASK, build_network, outcome

# Long enough that kills land in every stage.
LONGER = {"init_rounds": 25, "fit_passes": 15, "variants": 8, "epochs": 25, "images_per_class": 6}


def by_name(folder: Path) -> dict[str, str | bytes]:
    """Every shard's bytes, the student's weights and the accuracies."""
    shards, student, metrics = outcome(folder)
    return {**{str(path): content for path, content in shards.items()}, "student": student, "metrics": metrics}


def stage_now(folder: Path) -> str:
    """The stage that is under way in a run folder."""
    file = folder / "stages.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    return next((name for name, entry in record.items() if entry["status"] != "done"), "between stages")


def check(kills: int, seed: int, folder: Path, method: str = "dda", end: float = float("inf")) -> dict[str, int]:
    """Runs the experiment; returns how many kills fell in which stage.

    Args:
        end: of ``time.monotonic()``, after which nothing is killed any more.
    Raises:
        AssertionError: a resumed run differs from the unbroken one.
    """
    teacher = folder / "teacher.pth"
    torch.manual_seed(0)
    torch.save(build_network("resnet8", 10).state_dict(), teacher)
    names = resolve(METHODS[method]).Config.__dataclass_fields__
    longer = " ".join(f"--{name} {value}" for name, value in LONGER.items() if name == "epochs" or name in names)
    flags = f"--method {method} {TINY_TASK} {TINY[method]} {longer} --teacher_ckpt {teacher} --save_dir"
    command = [sys.executable, "datafree_kd.py", *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT, "env": environment}
    begun = time.monotonic()
    subprocess.run([*command, str(folder / "whole")], check=True, **quiet)
    length = time.monotonic() - begun
    expected, draw, where = by_name(folder / "whole"), random.Random(seed), {}
    run = 0
    while kills and time.monotonic() < end:
        run += 1
        target = folder / f"run{run}"
        while kills and time.monotonic() < end:
            process = subprocess.Popen([*command, str(target)], **quiet)
            try:
                process.wait(draw.uniform(0.2, 1.0) * length)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
                process.wait()
                kills -= 1
                stage = stage_now(target)
                where[stage] = where.get(stage, 0) + 1
                print(f"killed in {stage}", flush=True)
        subprocess.run([*command, str(target)], check=True, **quiet)
        found = by_name(target)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not different, f"after kills, these differ from the unbroken run: {different}"
        print(f"run {run} equals the unbroken one ({len(expected)} files and figures)", flush=True)
    return where


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="dda", choices=METHODS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("kills by stage:", check(args.kills, args.seed, Path(folder), args.method))
