"""``torch.compile`` of a run's inner steps, where it pays for itself within the run."""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

CHOICES = ("auto", "yes", "graphs", "no")
# Calls from which "auto" compiles: a graph costs 5 to 40 s. On two CPU cores a call at 32 px and batch 256 takes half a second
# and gets 1.1 to 1.5 times as fast; on a GPU it takes about ten milliseconds.
LEAST_CALLS = {"cpu": 2000, "cuda": 20000}


class Hot(NamedTuple):
    """A function of tensors, without loops and random numbers, that a round calls often.

    ``owner.name`` is the function; ``calls`` are those of one round; ``what`` is for the log.
    """

    owner: Any
    name: str
    calls: int
    what: str


class Compiler:
    """Compiles functions, or leaves them as they are and says why.

        compiler = Compiler("auto", device, print)
        losses = compiler(losses, calls=100_000, name="synthesis losses")

    A compiled function does the same arithmetic in another order: float32 results differ by rounding, about 1e-6 relative.
    Whether "auto" compiles follows from the run's lengths alone, so a resumed run does what the unbroken one did.

    Args:
        choice: "auto", "yes", "graphs" (yes, and networks and student step replayed as CUDA graphs on a GPU) or "no".
        log: takes one line of text.
    """

    def __init__(self, choice: str, device: torch.device, log: Callable[[str], None] = print):
        self.choice, self.device, self.log = choice, device, log

    def __call__(
        self, function: Callable, calls: int, name: str, *, constant_weights: bool = False, keeps_tensors: bool = False
    ) -> Callable:
        """A callable like ``function``, compiled at its first call.

        Args:
            function: a module or function of tensors whose shapes stay the same.
            calls: in the whole run.
            name: for the log.
            constant_weights: the module's weights never change and nobody wants gradients; they become constants, and batch
                norms part of the convolutions before them.
            keeps_tensors: it leaves tensors elsewhere than in what it returns, which the next replay of a CUDA graph would
                write over; so it is compiled without.
        """
        if self.choice == "no" or self.choice == "auto" and calls < LEAST_CALLS[self.device.type]:
            return function
        if self.device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            self._report(name, "there is no C++ compiler")
            return function
        graphs = self.choice == "graphs" and self.device.type == "cuda" and not keeps_tensors
        return _Compiled(function, name, {"freezing": constant_weights, "triton.cudagraphs": graphs}, self)

    def compile_hot(self, functions: Iterable[Hot], rounds: int) -> None:
        """Puts compiled functions in the place of hot ones, where that pays in so many rounds."""
        for owner, name, calls, what in functions:
            setattr(owner, name, self(getattr(owner, name), rounds * calls, what, keeps_tensors=True))

    def _report(self, name: str, reason: str) -> None:
        self.log(f"compile: the {name} runs uncompiled: {reason}")


class _Compiled:
    """A compiled function that turns into the plain one if its first call fails."""

    def __init__(self, function: Callable, name: str, options: dict, compiler: Compiler):
        # It would warn of a missing CUDA runtime on machines that are not to have one.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        self.plain, self.name, self.compiler, self.tried = function, name, compiler, False
        self.call = torch.compile(function, dynamic=False, options=options)
        if options["triton.cudagraphs"]:
            self.call = _copying(self.call)

    def __call__(self, *args, **kwargs):
        if self.tried:
            return self.call(*args, **kwargs)
        self.tried = True
        self.compiler.log(f"compile: the {self.name}; its first steps take longer (--compile no does without)")
        try:
            return self.call(*args, **kwargs)
        except Exception as error:  # of many kinds: missing headers, a full disk, an operation that it does not know
            self.call = self.plain
            result = self.plain(*args, **kwargs)  # an error of the function itself comes up here
            self.compiler._report(self.name, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
            return result


def _copying(function: Callable) -> Callable:
    """The function with its output tensors copied: a CUDA graph writes those of the next call to the same place."""
    return lambda *args, **kwargs: tree_map_only(torch.Tensor, torch.clone, function(*args, **kwargs))
