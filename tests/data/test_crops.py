"""Crop and flip: compared with a loop over images, checked by gradcheck, and tested for formats and random numbers."""

import pytest
import torch
import torch.nn.functional as F

from engine.data.crops import crop_flip, flip_shift, resized_boxes, resized_crop_flip

FORMATS = [torch.contiguous_format, torch.channels_last]


def naive(images, rows, columns, mirror, padding):
    """Reference for ``crop_flip``: flips, pads and slices image by image."""
    height, width = images.shape[2:]
    result = []
    for i, image in enumerate(images):
        image = image.flip(-1) if mirror is not None and mirror[i] else image
        image = F.pad(image, [padding] * 4)
        result.append(image[:, rows[i] : rows[i] + height, columns[i] : columns[i] + width])
    return torch.stack(result)


def draws(batch, padding, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator)
    return rows, columns, torch.randint(0, 2, (batch,), generator=generator).bool()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(16, 3, 8, 8), (5, 3, 6, 9), (4, 1, 7, 5), (1, 3, 4, 4)])
@pytest.mark.parametrize("padding", [0, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_equals_a_loop_over_images(shape, padding, dtype, memory_format):
    images = torch.randint(0, 256, shape).to(dtype).contiguous(memory_format=memory_format)
    rows, columns, mirror = draws(shape[0], padding)
    for flips in (mirror, None):
        result = flip_shift(images, rows, columns, flips, padding)
        assert torch.equal(result, naive(images, rows, columns, flips, padding))
        assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradient_is_the_opposite_move(memory_format):
    images = torch.rand(4, 2, 4, 3, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    rows, columns, mirror = draws(4, 2)
    for flips in (mirror, None):
        arguments = (images, rows, columns, flips, 2)
        assert torch.autograd.gradcheck(flip_shift, arguments)
        assert torch.autograd.gradgradcheck(flip_shift, arguments)
        weight = torch.rand_like(images)
        found = torch.autograd.grad(flip_shift(*arguments), images, weight)[0]
        wanted = torch.autograd.grad(naive(*arguments), images, weight)[0]
        assert torch.equal(found, wanted)


def test_nothing_to_draw_returns_the_input_and_leaves_the_random_stream():
    images, state = torch.rand(2, 3, 4, 4), torch.get_rng_state()
    assert crop_flip(images, 0, False) is images
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_follow_the_generator_and_differ_between_images():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(1000, 3, 8, 8)
    first, again, other = (crop_flip(images, 2, True, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 50  # all of 5 x 5 corners, flipped and not
    rows, columns, mirror = draws(1000, 2, seed=1)
    assert torch.equal(first, naive(images, rows, columns, mirror, 2))


def test_flip_alone_and_crop_alone():
    images = torch.rand(64, 3, 6, 6)
    flipped = crop_flip(images, 0, True)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 10 < same.sum() < 54
    cropped = crop_flip(torch.ones(64, 1, 6, 6), 1, False)
    assert set(cropped.flatten(1).sum(1).tolist()) <= {36.0, 30.0, 25.0}


def test_works_under_deterministic_algorithms():
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        crop_flip(images, 2, True).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert images.grad.isfinite().all()


def test_a_resized_box_is_that_of_the_library():
    """Compares the inside of the box only: at its edges, torchvision does not use pixels beyond the box."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resized_crop

    images, box = torch.rand(2, 3, 32, 32), (5, 7, 12, 16)
    arguments = [torch.full((2,), side / 32) for side in box]
    found = resized_boxes(images, *arguments, torch.ones(2))
    wanted = resized_crop(images, *box, [32, 32], interpolation=InterpolationMode.BICUBIC, antialias=False).clamp(0, 1)
    assert (found - wanted)[..., 6:-6, 6:-6].abs().max() < 1e-5
    assert torch.allclose(resized_boxes(images, *arguments, -torch.ones(2)), found.flip(3), atol=1e-5)
    whole = [torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2)]
    assert torch.allclose(resized_boxes(images, *whole, torch.ones(2)), images, atol=1e-5)


def test_resized_crops_have_the_areas_and_aspects_of_the_library():
    """Crops an image whose pixel values are its coordinates, so that each pixel shows where it comes from."""
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    count, size = 2000, 64
    ramp = ((torch.arange(size) + 0.5) / size).expand(size, size)
    images = torch.stack([ramp, ramp.T, ramp]).expand(count, 3, size, size)
    views = resized_crop_flip(images, flip=True)
    width = (views[:, 0, 32, 42] - views[:, 0, 32, 22]) * size / 20
    height = (views[:, 1, 42, 32] - views[:, 1, 22, 32]) * size / 20
    assert 0.45 < (width < 0).float().mean() < 0.55 and bool((height > 0).all())
    theirs = [RandomResizedCrop(size).make_params([images[0]]) for _ in range(count)]
    for mine, wanted in ((width.abs(), "width"), (height, "height")):
        drawn = torch.tensor([params[wanted] / size for params in theirs])
        assert mine.max() <= 1.01
        for q in (0.1, 0.5, 0.9):
            assert mine.quantile(q).item() == pytest.approx(drawn.quantile(q).item(), abs=0.03)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_resized_crops_keep_type_and_range(memory_format):
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8).contiguous(memory_format=memory_format)
    views = resized_crop_flip(images, flip=False)
    assert views.dtype == torch.uint8 and views.shape == images.shape and not torch.equal(views, images)
    assert resized_crop_flip(images / 255, flip=False).max() <= 1
