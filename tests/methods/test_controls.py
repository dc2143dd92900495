"""The control experiments: noise with both normalizations of the teacher, unrelated images, crops of one image."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as library

from datafree import noise, one_image
from datafree.losses import normalizing_by_batch
from engine.runtime.errors import UserError
from tests.conftest import make_classifier, make_task
from tests.plain_network import plain


def test_a_teacher_that_normalizes_by_the_batch():
    teacher = make_classifier().eval()
    with torch.no_grad():
        for _ in range(3):
            teacher.train()(torch.rand(8, 3, 16, 16))
    teacher.eval()
    images = torch.rand(64, 3, 16, 16) ** 3
    by_batch = normalizing_by_batch(teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        found = by_batch(images, return_features=True)
        assert not by_batch.training
        expected = make_classifier().train()
        expected.load_state_dict(before)
        assert torch.allclose(found.logits, expected(images), atol=1e-5)
        assert not torch.allclose(found.logits, teacher(images), atol=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_without_bn_there_is_nothing_to_normalize_by():
    method = noise.Noise(noise.NoiseConfig(bn_mode="batch"), make_classifier(plain()), make_classifier(), make_task())
    with pytest.raises(UserError, match="no BatchNorm layer .* --bn_mode running"):
        method.check_inputs(["distill"])


def test_the_student_of_noise_learns_what_that_teacher_says(finished):
    runs = [finished("noise", extra) for extra in ("", "--bn_mode batch")]
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert results[0]["teacher_acc1"] == results[1]["teacher_acc1"]  # measured with running statistics
    lines = [[json.loads(text)["loss"] for text in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert lines[0] != lines[1]


def test_logits_that_depend_on_the_batch_are_not_cached(tmp_path, finished):
    np.savez(tmp_path / "others.npz", x_train=np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8))
    log = (finished("noise", f"--images {tmp_path / 'others.npz'} --bn_mode batch --logit_cache 1") / "log.txt").read_text()
    assert "logit cache: none" in log


def test_an_archive_of_pictures_is_as_good_as_a_folder(tmp_path, finished):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "others.npz", x_train=pixels)
    for number, image in enumerate(pixels):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"folder/{number}.png")
    by_archive = noise.read_pictures(str(tmp_path / "others.npz"), 16)
    assert torch.equal(by_archive, noise.read_pictures(str(tmp_path / "folder"), 16))
    assert torch.equal(by_archive, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert noise.read_pictures(str(tmp_path / "others.npz"), 8).shape == (9, 3, 8, 8)
    result = json.loads((finished("noise", f"--images {tmp_path / 'others.npz'}") / "result.json").read_text())
    assert (result["external_prior"], result["images"]) == ("images of others", 9)
    np.savez(tmp_path / "empty.npz", labels=pixels)
    with pytest.raises(UserError, match="has no array x_train; it has labels"):
        noise.read_pictures(str(tmp_path / "empty.npz"), 16)


@pytest.fixture
def picture():
    torch.manual_seed(0)
    return torch.rand(3, 40, 56)


def crops(pyramid, centre, axes):
    return pyramid.sample(torch.tensor([centre], dtype=torch.float32), torch.tensor([axes], dtype=torch.float32))[0]


def test_crops_are_taken_turned_and_mirrored(picture):
    pyramid = one_image.Pyramid(picture, 16)
    box = picture[:, 10:26, 20:36]
    found = crops(pyramid, (28, 18), [[8, 0], [0, 8]])
    assert torch.allclose(found, box, atol=1e-5)
    assert torch.allclose(crops(pyramid, (28, 18), [[-8, 0], [0, 8]]), box.flip(2), atol=1e-5)
    # The crop's x axis points down in the picture, and the crop's y axis to the left.
    assert torch.allclose(crops(pyramid, (28, 18), [[0, -8], [8, 0]]), box.rot90(1, (1, 2)), atol=1e-5)


def test_large_crops_are_averages_not_single_pixels(picture):
    pyramid = one_image.Pyramid(picture, 16)
    assert pyramid.pixels.shape == (3, 60, 56) and pyramid.heights.tolist() == [40, 20]
    found = crops(pyramid, (24, 20), [[16, 0], [0, 16]])
    assert torch.allclose(found, nn.functional.avg_pool2d(picture[:, 4:36, 8:40], 2), atol=1e-5)


def test_beyond_the_edge_the_edge_is_repeated(picture):
    found = crops(one_image.Pyramid(picture, 16), (0, 20), [[8, 0], [0, 8]])
    assert torch.allclose(found[:, :, :8], picture[:, 12:28, :1].expand(-1, -1, 8), atol=1e-5)


def test_random_crops_are_a_function_of_the_stream(picture):
    pyramid = one_image.Pyramid(picture.repeat(1, 4, 4), 16)
    torch.manual_seed(1)
    first = one_image.random_crops(pyramid, 32)
    torch.manual_seed(1)
    assert torch.equal(first, one_image.random_crops(pyramid, 32))
    assert not torch.equal(first, one_image.random_crops(pyramid, 32))
    assert first.shape == (32, 3, 16, 16) and 0 <= first.min() and first.max() <= 1
    assert len(first.flatten(1).unique(dim=0)) == 32


@pytest.mark.parametrize("name, position", [("brightness", 0), ("contrast", 1), ("saturation", 2)])
def test_colours_change_as_in_the_library(name, position, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape))  # every image is jittered
    images = torch.linspace(0.2, 0.6, 960).view(5, 3, 8, 8)
    factors = [torch.ones(5), torch.ones(5), torch.ones(5), torch.zeros(5)]
    factors[position] = torch.full((5,), 1.3)
    expected = torch.stack([getattr(library, f"adjust_{name}")(image, 1.3) for image in images])
    assert torch.allclose(one_image.jittered(images, *factors), expected, atol=2e-3)


def test_a_turn_of_the_hue_keeps_the_brightness_and_comes_round(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape))
    images = torch.linspace(0.3, 0.6, 192).view(1, 3, 8, 8)
    one, grey = torch.ones(1), torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    turned = one_image.jittered(images, one, one, one, torch.tensor([0.25]))
    assert torch.allclose((turned * grey).sum(1), (images * grey).sum(1), atol=2e-3)
    assert (turned - images).abs().max() > 0.1
    assert torch.allclose(one_image.jittered(images, one, one, one, one), images, atol=1e-5)


def test_half_of_the_crops_keep_their_colours():
    torch.manual_seed(0)
    images, one = torch.full((200, 3, 2, 2), 0.5), torch.ones(200)
    changed = (one_image.jittered(images, one * 1.2, one, one, one * 0) != images).flatten(1).any(1)
    assert 70 < changed.sum() < 130


def test_the_datasets_own_images_are_not_unrelated(tmp_path):
    def check(images, **about):
        method = noise.Noise(noise.NoiseConfig(images=str(images)), make_classifier(), make_classifier(), make_task(**about))
        method.check_inputs(["distill"])

    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    for name in ("own", "other"):
        np.savez(tmp_path / f"{name}.npz", x_train=pixels)
        (tmp_path / "tree" / name / "train" / "0").mkdir(parents=True)
        Image.fromarray(pixels[0]).save(tmp_path / "tree" / name / "train" / "0" / "0.png")
    (tmp_path / "link.npz").symlink_to(tmp_path / "own.npz")
    npz = {"data_root": str(tmp_path), "archive": "own.npz"}
    folder = {"data_root": str(tmp_path / "tree"), "source": "own", "archive": "folder.npz"}
    check(tmp_path / "other.npz", **npz)
    check(tmp_path / "tree" / "other", **folder)
    for images, about in (
        (tmp_path / "own.npz", npz),
        (tmp_path / "link.npz", npz),
        (tmp_path / "tree" / "own" / "train" / "0", folder),
        (tmp_path / "tree", folder),
    ):
        with pytest.raises(UserError, match="has training images of debug, the dataset of this run; give unrelated images"):
            check(images, **about)


def test_a_picture_must_be_there_and_large_enough(tmp_path):
    def method(file):
        return one_image.OneImage(one_image.OneImageConfig(image=file), None, None, make_task())

    with pytest.raises(UserError, match="--image is missing"):
        method(None)
    Image.new("RGB", (40, 31)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="40 x 31 pixels, at least 32 a side"):
        method(str(tmp_path / "small.png")).check_inputs(["distill"])
    with pytest.raises(UserError, match="does not exist"):
        method(str(tmp_path / "none.png")).check_inputs(["distill"])


def test_a_run_names_its_picture(finished):
    result = json.loads((finished("one_image") / "result.json").read_text())
    assert result["external_prior"] == "the image natural_32.png" and result["images"] == result["student_steps"] * 8
