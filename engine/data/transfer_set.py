"""The images that a student learns from, stored in device memory, in host memory, or in the shards of a bank."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from engine.data.crops import KeyedViews
from engine.data.image_bank import MappedImages, prefetch, storage_device

COPIED_AT_ONCE = 256  # images copied from the shards to memory at a time


class TransferSet:
    """The images that a student learns from, with room for images that later rounds add.

    Storage is chosen once, from the total size: device memory if the images fit in half of what is free there, else host
    memory by the same rule, else the memory-mapped shards. Images outside the memory of ``device`` are read by a background
    thread, ahead of the training steps.

    Args:
        capacity: number of images that the set will hold in the end.
        image_size: height and width of the images in px.
        device: device of the networks.
        mapped: True: keep the images in the shards, however much memory is free.
    """

    def __init__(self, capacity: int, image_size: int, device: torch.device, mapped: bool = False):
        self.capacity, self.device, self.count = capacity, device, 0
        self.bytes = capacity * 3 * image_size**2
        storage = None if mapped else storage_device(self.bytes, device)
        self.mapped, self.storage = storage is None, storage or torch.device("cpu")
        self.labels = torch.empty(capacity, dtype=torch.long, device=self.storage)
        if self.mapped:
            nothing = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
            self.images = MappedImages([nothing.numpy()], torch.empty(capacity, 2, dtype=torch.int32))
        else:
            self.images = torch.empty(capacity, 3, image_size, image_size, dtype=torch.uint8, device=self.storage)

    def __len__(self) -> int:
        return self.count

    @property
    def description(self) -> str:
        """Capacity, size and storage of the set, in one line."""
        place = "memory-mapped" if self.mapped else "in host memory" if self.storage.type == "cpu" else f"on {self.storage}"
        return f"transfer set: {self.capacity} images, {self.bytes / 1e6:.0f} MB, {place}"

    def add(self, images: MappedImages | Tensor, labels: Tensor) -> None:
        """Appends images (n, 3, H, W) uint8 and labels (n,); a mapped set refers to ``images`` and copies nothing."""
        end = self.count + len(images)
        assert images.dtype == torch.uint8 and end <= self.capacity, f"{end} images for room for {self.capacity}"
        if self.mapped:
            self.images.refer(self.count, images if isinstance(images, MappedImages) else MappedImages.of([images.cpu()]))
        else:
            for part, target in zip(images.split(COPIED_AT_ONCE), self.images[self.count : end].split(COPIED_AT_ONCE)):
                target.copy_(part)
        self.labels[self.count : end] = labels
        self.count = end

    def evenly_spaced(self, most: int, batch_size: int = 250) -> Iterator[Tensor]:
        """Yields up to ``most`` of the images so far, evenly spaced, not augmented: (B, 3, H, W) float32 in [0, 1]."""
        chosen = torch.linspace(0, self.count - 1, min(most, self.count)).round().long()
        for part in chosen.split(batch_size):
            yield _to_float(self._select(part.to(self.storage)).to(self.device))

    def batches(
        self, batch_size: int, augment: Callable[[Tensor], Tensor], *, seed: int, rank: int = 0, count: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of endless shuffled passes: images (B, 3, H, W) float32 in [0, 1], channels_last, and labels (B,).

        The last batch of a pass is filled with images of the next pass, so every batch has ``batch_size`` images.

        Args:
            batch_size: images a training step, of all processes together.
            augment: function from uint8 images on the device to uint8 images. It draws from the global random stream, in the
                caller's thread.
            seed: seed of the order, which depends neither on the global random stream nor on where the images are stored.
            rank, count: index and number of the processes; this one gets every ``count``-th image of each batch, from
                ``rank`` on.
        """
        for images, labels in self._drawn(batch_size, seed, rank, count):
            yield _to_float(augment(images)), labels

    def keyed_batches(
        self,
        batch_size: int,
        views: KeyedViews,
        prepare: Callable[[Tensor], None] | None = None,
        *,
        seed: int,
        steps: int,
        ahead: int = 1,
        rank: int = 0,
        count: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields the first ``steps`` batches in the order of ``batches``, in views that ``seed`` determines too.

        Args:
            views: views to draw from.
            prepare: function called every ``ahead`` steps with the keys (at most ``ahead``, batch_size) of the next batches,
                for all processes together.
        Yields:
            Images (B, 3, H, W) and labels (B,), as ``batches`` does, and the keys (B,) of their views.
        """
        index = torch.stack([*islice(self._order(batch_size, seed), steps)])
        keys = views.draw(index, seed)
        for step, (images, labels) in zip(range(steps), self._drawn(batch_size, seed, rank, count)):
            if prepare and step % ahead == 0:
                prepare(keys[step : step + ahead])
            mine = keys[step, rank::count]
            yield _to_float(views.show(images, mine)), labels, mine

    def images_of_keys(self, views: KeyedViews, keys: Tensor) -> Tensor:
        """Returns the images (B, 3, H, W) of these keys (B,), as ``keyed_batches`` yields them."""
        images = self._select((keys // views.count).to(self.storage))
        return _to_float(views.show(images.to(self.device), keys))

    def _order(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Yields the positions (batch_size,) of each batch's images, on ``storage``, the device that stores the images."""
        assert self.count, "no images to draw from"
        generator, total = torch.Generator().manual_seed(seed), self.count
        order = torch.empty(0, dtype=torch.long, device=self.storage)
        while True:
            passes = -(-max(0, batch_size - len(order)) // total)
            order = torch.cat([order, *(torch.randperm(total, generator=generator).to(self.storage) for _ in range(passes))])
            yield order[:batch_size]
            order = order[batch_size:]

    def _drawn(self, batch_size: int, seed: int, rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this process's images (b, 3, H, W) uint8 and labels (b,) of each batch, on the device of the networks."""
        drawn = self._at_home(batch_size, seed, rank, count)
        for images, labels in prefetch(drawn) if self.mapped or self.storage != self.device else drawn:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _at_home(self, batch_size: int, seed: int, rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of ``_drawn`` on ``storage``; in pinned memory if they go to a GPU from there."""
        for places in self._order(batch_size, seed):
            chosen = places[rank::count]
            batch = self._select(chosen), self.labels[chosen]
            yield batch if self.storage == self.device else (batch[0].pin_memory(), batch[1].pin_memory())

    def _select(self, places: Tensor) -> Tensor:
        """The images at these positions, on ``storage``. On a CPU, index_select is twenty times as fast as [places]."""
        return self.images[places] if self.mapped else self.images.index_select(0, places)


def _to_float(images: Tensor) -> Tensor:
    """Converts uint8 (B, 3, H, W) to float32 in [0, 1], channels_last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)
