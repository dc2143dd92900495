"""Measures the speed, the memory and the operations of steps, and the limits ("ceilings") of the machine."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.runtime.run import clock, machine

Step = Callable[[], None]


def flops(step: Step) -> int:
    """Floating-point operations of the matrix products and convolutions in one step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Ceilings:
    """Highest measured speeds of this machine.

    Attributes:
        arithmetic: FLOP/s.
        kind: operation that reached ``arithmetic``.
        memory: bytes/s read and written by a large copy.
    """

    arithmetic: float
    kind: str
    memory: float

    def or_higher(self, other: "Ceilings") -> "Ceilings":
        """The higher arithmetic and memory speed of the two."""
        best = max(self, other, key=lambda c: c.arithmetic)
        return Ceilings(best.arithmetic, best.kind, max(self.memory, other.memory))

    def __str__(self) -> str:
        return (
            f"{machine()}; ceilings: {self.arithmetic / 1e12:.3g} TFLOP/s ({self.kind}), "
            f"{self.memory / 1e9:.3g} GB/s (copy, read + written)"
        )


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.7, scale: int | None = None) -> Ceilings:
    """Measures the ceilings of a device.

    Args:
        dtype: number format of the arithmetic. float32 is computed as in a run: in TF32 on GPUs that support it.
        seconds: time for each candidate operation.
        scale: side of the smaller matrices; None: 4096 on a GPU, 512 on a CPU. An operation of this size takes a few
            milliseconds and is seldom disturbed.
    """
    scale = scale or (4096 if device.type == "cuda" else 512)

    def fastest(step: Step) -> float:
        """Seconds of the fastest call among those that fit into ``seconds``; the first call is not counted."""
        step()
        times, begun = [], clock(device)
        while not times or sum(times) < seconds:
            step()
            now = clock(device)
            times.append(now - begun)
            begun = now
        return min(times)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    name, rates = str(dtype).removeprefix("torch."), {}
    with torch.no_grad():
        for side in (scale, 2 * scale):
            a, b = random(side, side), random(side, side)
            rates[f"{name} product of {side} x {side}"] = 2 * side**3 / fastest(lambda: a @ b)
        images = random(max(1, scale**2 // 2**17), 256, 32, 32).contiguous(memory_format=torch.channels_last)
        weight = random(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
        work = 2 * images.numel() * weight[0].numel()
        rates[f"{name} 3 x 3 convolution, 256 channels"] = work / fastest(lambda: F.conv2d(images, weight, padding=1))
        source = torch.ones(2**28, dtype=torch.uint8, device=device)  # more than caches hold
        target = torch.empty_like(source)
        memory = 2 * source.numel() / fastest(lambda: target.copy_(source))
    kind = max(rates, key=rates.get)
    return Ceilings(rates[kind], kind, memory)


def resident(name: str) -> int:
    """Memory of this process in MiB on Linux: "VmRSS" is the present memory, "VmHWM" the peak."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def reset_peak(device: torch.device) -> bool:
    """Resets the peak memory to the present memory; returns False if the system cannot do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmHWM") < resident("VmRSS") + 8  # some systems accept the write without effect
    except OSError:
        return False


def peak(device: torch.device) -> int:
    """Peak memory in MiB since ``reset_peak``: of the tensors on a GPU, else of this process."""
    return torch.cuda.max_memory_allocated(device) // 2**20 if device.type == "cuda" else resident("VmHWM")


def rate(step: Step, images: int, seconds: float, device: torch.device, least: int = 2) -> float:
    """Images per second of a step on ``images`` images, measured for about ``seconds`` and at least ``least`` steps."""
    begun, steps = clock(device), 0
    while (passed := clock(device) - begun) < seconds or steps < least:
        step()
        steps += 1
    return steps * images / passed


@dataclass
class Measured:
    """Measurements of one loop: images/s, one value per turn, and the peak memory of all turns in MiB (0: unknown)."""

    rates: list[float]
    peak: int = 0

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def in_turns(
    steps: dict[str, Step], images: int, seconds: float, repeats: int, device: torch.device, bar, least: int = 2
) -> dict[str, Measured]:
    """Measures several steps in turns, ``repeats`` times each; each step must have been taken once before.

    Slow steps are repeated less often: the turns end when they have taken longer than all measurements of ``seconds``
    together.
    """
    measured = {kind: Measured([]) for kind in steps}
    begun = time.monotonic()
    for turn in range(repeats):
        for kind, step in steps.items():
            time.sleep(min(seconds, 0.3))  # lets a DataLoader's workers fill their queue before the measurement
            known = reset_peak(device)
            measured[kind].rates.append(rate(step, images, seconds, device, least))
            measured[kind].peak = max(measured[kind].peak, peak(device)) if known else 0
        bar.update()
        if time.monotonic() - begun > len(steps) * seconds * repeats:
            break
    bar.update(repeats - turn - 1)
    return measured
