"""``torch.compile`` of the inner steps of a run, if it saves more time in the run than compiling takes."""

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

CHOICES = ("auto", "yes", "graphs", "no")
# Smallest number of calls for which "auto" compiles. Compiling a graph takes 5 to 40 s. On two CPU cores a call at 32 px and
# batch 256 takes half a second and becomes 1.1 to 1.5 times as fast. On a GPU a call takes about ten milliseconds.
LEAST_CALLS = {"cpu": 2000, "cuda": 20000}


class CompileTarget(NamedTuple):
    """A function of tensors, without loops and random numbers, that a round calls often and that is worth compiling.

    Args:
        owner: object whose attribute ``name`` is the function.
        name: name of the attribute.
        calls: number of calls in one round.
        what: name of the function in the log.
    """

    owner: Any
    name: str
    calls: int
    what: str


class Compiler:
    """Compiles functions. If compiling is impossible, it logs the reason and leaves the function unchanged.

        compiler = Compiler("auto", device, print)
        losses = compiler(losses, calls=100_000, name="synthesis losses")

    A compiled function does the same arithmetic in another order. Its float32 results differ by rounding, about 1e-6
    relative. Whether "auto" compiles depends only on the run's lengths, so a resumed run compiles the same functions.

    Args:
        choice: "auto", "yes", "graphs" or "no". "graphs" is "yes", with networks and student step replayed as CUDA graphs on
            a GPU.
        device: device of the run.
        log: function that takes one line of text.
        auto_graphs: whether "auto" also replays CUDA graphs.
    """

    def __init__(self, choice: str, device: torch.device, log: Callable[[str], None] = print, *, auto_graphs: bool = False):
        self.choice, self.device, self.log = choice, device, log
        self.graphs = device.type == "cuda" and (choice == "graphs" or choice == "auto" and auto_graphs)

    def __call__(
        self, function: Callable, calls: int, name: str, *, constant_weights: bool = False, keeps_tensors: bool = False
    ) -> Callable:
        """Returns a callable like ``function`` that is compiled at its first call, or ``function`` itself.

        Args:
            function: module or function of tensors whose shapes stay the same.
            calls: number of calls in the whole run.
            name: name of the function in the log.
            constant_weights: whether the module's weights never change and need no gradients. They are then compiled as
                constants, and BatchNorm layers are folded into the convolutions before them.
            keeps_tensors: whether the function stores tensors elsewhere than in its return value. The next replay of a CUDA
                graph would overwrite them, so the function is compiled without CUDA graphs.
        """
        if self.choice == "no" or self.choice == "auto" and calls < LEAST_CALLS[self.device.type]:
            return function
        found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if self.device.type == "cpu" and not found:
            self._report(name, "there is no C++ compiler")
            return function
        options = {"freezing": constant_weights, "triton.cudagraphs": self.graphs and not keeps_tensors}
        if self.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_f") and _tunes_for_no_processor(found):
            options["cpp.simdlen"] = 256
        return _Compiled(function, name, options, self)

    def compile_all(self, targets: Iterable[CompileTarget], rounds: int) -> None:
        """Replaces the functions of ``targets`` by compiled ones, if ``rounds`` rounds call them often enough."""
        for owner, name, calls, what in targets:
            setattr(owner, name, self(getattr(owner, name), rounds * calls, what, keeps_tensors=True))

    def _report(self, name: str, reason: str) -> None:
        self.log(f"compile: the {name} will run uncompiled: {reason}")


@cache
def _tunes_for_no_processor(compiler: str) -> bool:
    """Whether a C++ compiler is a GCC that does not know this processor and so tunes for a generic one.

    GCC 12.2 then compiles torch's transposition of 32 x 32 bf16 tiles with 512-bit vectors to wrong code: gradients become NaN
    or arbitrary numbers (seen on an Intel Xeon of model 207). Vectors of 256 bits avoid this code.
    """
    command = [*compiler.split(), "-march=native", "-Q", "--help=target"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return re.search(r"-mtune=\s+generic", told) is not None


class _Compiled:
    """A compiled function that is replaced by the uncompiled one if its first call fails."""

    def __init__(self, function: Callable, name: str, options: dict, compiler: Compiler):
        # Suppresses torch's warning about a missing CUDA runtime on machines without a GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        self.plain, self.name, self.compiler, self.tried = function, name, compiler, False
        self.call = torch.compile(function, dynamic=False, options=options)
        if options["triton.cudagraphs"]:
            self.call = _copying(self.call)

    def __call__(self, *args, **kwargs):
        if self.tried:
            return self.call(*args, **kwargs)
        self.tried = True
        self.compiler.log(
            f"compile: the {self.name} will be compiled; the first steps take longer (--compile no turns this off)"
        )
        try:
            return self.call(*args, **kwargs)
        except Exception as error:  # errors of many types: missing headers, a full disk, an unsupported operation
            self.call = self.plain
            result = self.plain(*args, **kwargs)  # raises errors of the function itself
            self.compiler._report(self.name, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
            return result


def _copying(function: Callable) -> Callable:
    """Returns the function with its output tensors copied, because a CUDA graph overwrites them in its next call."""
    return lambda *args, **kwargs: tree_map_only(torch.Tensor, torch.clone, function(*args, **kwargs))
