"""Images that stay in the mapped files of a bank, and batches that are read ahead of the step that needs them.

A mapped page is a page of the operating system's file cache: it counts as resident (``ru_maxrss``) while it is there, and is
given back as soon as memory is short. What is bounded, whatever the size of a bank, is the anonymous memory: some 40 bytes
an image (where it lies, its label, its place in the order of a pass), and the batches under way.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class MappedImages:
    """Images (N, 3, H, W) uint8 in any number of tensors, most of them mapped files; to be read, not written.

    An int, a slice or a LongTensor of any shape copies those images into an ordinary tensor, in time proportional to their
    number. A bool mask (N,) copies none: it gives the ``MappedImages`` it selects.

    Args:
        parts: at least one array (n_i, 3, H, W); to copy a row of an array costs a fraction of what a torch call does.
        where: (N, 2) int32, the part and row of every image.
    """

    dtype, device = torch.uint8, torch.device("cpu")

    def __init__(self, parts: list[np.ndarray], where: Tensor):
        self.parts, self.where = parts, where

    @classmethod
    def of(cls, parts: list[Tensor]) -> "MappedImages":
        """All images of at least one tensor (n_i, 3, H, W) on the CPU, in order."""
        lengths = torch.tensor([len(part) for part in parts])
        number = torch.arange(len(parts)).repeat_interleave(lengths)
        row = torch.arange(len(number)) - (lengths.cumsum(0) - lengths)[number]
        return cls([part.numpy() for part in parts], torch.stack([number, row], 1).int())

    def __len__(self) -> int:
        return len(self.where)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.parts[0].shape[1:]))

    def __getitem__(self, index: "int | slice | Tensor") -> "Tensor | MappedImages":
        where = self.where[index]
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            return MappedImages(self.parts, where)
        images = torch.empty(*where.shape[:-1], *self.shape[1:], dtype=self.dtype)
        for target, (part, row) in zip(images.view(-1, *self.shape[1:]).numpy(), where.reshape(-1, 2).tolist()):
            target[...] = self.parts[part][row]
        return images

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order as tensors of up to ``size``, each read when its turn comes."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def refer(self, start: int, images: "MappedImages") -> None:
        """Makes the places from ``start`` on stand for ``images``, of which none is copied."""
        self.where[start : start + len(images)] = images.where + torch.tensor([len(self.parts), 0], dtype=torch.int32)
        self.parts.extend(images.parts)


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The items of an endless iterator, made by one background thread up to ``depth`` ahead.

    What goes wrong in the thread is raised here. The thread ends with this generator: when it is closed or forgotten.
    """
    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        pending = deque(thread.submit(next, items) for _ in range(depth))
        while True:
            pending.append(thread.submit(next, items))
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
