"""The views of an image that a student sees: crops out of its zero-padded self, mirrored or not, a finite set with numbers.

Image and view together have a key, ``image * count + number``. Which views a round shows is a function of its seed, drawn on
the host for all of its steps at once; what follows from a key happens on the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.crops import crop_flip, flip_shift
from engine.runtime.seeding import position_seed


@dataclass(frozen=True)
class Views:
    """All shifts by up to ``padding`` px, and their mirror images where ``flip`` says so. Called, it draws one an image.

    Args:
        padding: zero pixels on each side, and so the largest shift.
        flip: mirror left and right.
    """

    padding: int
    flip: bool

    @property
    def count(self) -> int:
        return (2 * self.padding + 1) ** 2 * (1 + self.flip)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in views from the global random stream, differentiably."""
        return crop_flip(images, self.padding, self.flip)

    def show(self, images: Tensor, number: Tensor) -> Tensor:
        """Images (B, 3, H, W), float or uint8, in the views of these numbers (B,) in 0 .. count - 1."""
        if self.count == 1:
            return images
        mirror = number % 2 == 1 if self.flip else None
        corner = number // (1 + self.flip)
        side = 2 * self.padding + 1
        return flip_shift(images, corner // side, corner % side, mirror, self.padding)


class KeyedViews:
    """The views of a set of images, by key.

    Args:
        views: of any image.
        images: how many there are, or will be.
        few: of each image only so many views, drawn once by its place in the set (one may come twice); None: all.
        seed: decides which.
        device: where keys are.
    """

    def __init__(self, views: Views, images: int, few: int | None = None, seed: int = 0, device: torch.device | str = "cpu"):
        self.views, self.images, self.device = views, images, device
        self.few = few if few and few < views.count else None
        self.count = self.few or views.count
        if self.few:
            generator = torch.Generator().manual_seed(position_seed(seed, "views"))
            self.chosen = torch.randint(views.count, (images * self.few,), generator=generator, dtype=torch.int32).to(device)

    def __len__(self) -> int:
        """Keys."""
        return self.images * self.count

    def draw(self, index: Tensor, seed: int) -> Tensor:
        """Keys of random views of the images at these places, of ``index``'s shape, on the device."""
        generator = torch.Generator().manual_seed(position_seed(seed, "views"))
        number = torch.randint(self.count, index.shape, generator=generator)
        return index.to(self.device) * self.count + number.to(self.device)

    def show(self, images: Tensor, keys: Tensor) -> Tensor:
        """The images (B, 3, H, W) at the places of keys (B,), in their views."""
        return self.views.show(images, self.chosen[keys] if self.few else keys % self.count)
