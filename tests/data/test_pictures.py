"""Grids of images, with their class names if these are known."""

import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from engine.data.pictures import LINE, enlarge, grid, shortened


def test_a_grid_without_names_is_torchvisions():
    for count in (3, 20):
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        assert torch.equal(grid(images), make_grid(enlarge(images), nrow=16, padding=2, pad_value=255))


def test_names_stand_below_their_images():
    """Images with a label have text below them, an image without one (-1) has none; the images are unchanged."""
    images, labels = torch.zeros(3, 3, 64, 64, dtype=torch.uint8), torch.tensor([1, -1, 0])
    found = grid(images, labels=labels, names=("cat", "a very long name of a class"))
    assert found.shape == (3, 64 + LINE + 4, 3 * 66 + 2)
    plain = grid(images)
    assert torch.equal(found[:, :66], plain[:, :66])
    below = [found[:, 66:, 2 + k * 66 : 66 + k * 66] for k in range(3)]
    assert [bool((part < 255).any()) for part in below] == [True, False, True]
    assert (found[:, 66:, 66:68] == 255).all()  # a long name is cut at the edge of its image
    assert torch.equal(grid(images, labels=labels), plain)


def test_a_long_name_is_cut_off():
    draw = ImageDraw.Draw(Image.new("RGB", (8, 8)))
    cut = shortened(draw, "a very long name of a class", 64)
    assert cut.endswith(".") and draw.textlength(cut) <= 64 and shortened(draw, "cat", 64) == "cat"
    assert shortened(draw, "sea\n lion", 64) == "sea lion" and shortened(draw, "very long " * 10_000, 64).endswith(".")
