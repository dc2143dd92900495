"""The prior of printed digits: rendering, the dataset, the shipped file, and files that are no prior."""

import json
import subprocess

import pytest
import torch
from PIL import ImageFont
from safetensors.torch import save_file
from torch.nn import functional as F

from datafree.diffusion import glyphs
from datafree.diffusion.glyphs import find_fonts, render
from datafree.diffusion.patch_unet import SHIPPED as FOLDER
from datafree.diffusion.patch_unet import PatchUNet, load_patch_prior
from datafree.diffusion.pixel import PriorAugmenter
from datafree.diffusion.priors import PatchPrior
from engine.data.splits import load_split
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_tensors, save_tensors
from tests.conftest import ROOT, build_network, dataset_info

SHIPPED = FOLDER / "glyphs_digits_16.safetensors"


@pytest.fixture(scope="module")
def fonts():
    return find_fonts(())


@pytest.fixture(scope="module")
def shipped():
    return load_patch_prior(SHIPPED)


@pytest.fixture(scope="module")
def pool(fonts):
    return render(2000, 16, fonts, seed=1)


# Rendering


def test_glyphs_look_like_the_dataset_in_their_figures(pool):
    images, labels = pool
    assert images.shape == (2000, 3, 16, 16) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [200] * 10
    assert images.amin() == 0 and images.amax() == 255 and torch.equal(images[:, 0], images[:, 2])
    assert (images.amax((1, 2, 3)) > 150).all() and (images[:, 0, ::15, ::15].float().mean((1, 2)) < 130).all()
    info, values = dataset_info("digits"), images.float() / 255
    assert abs(values.mean() - info.mean[0]) < 0.03 and abs(values.std() - info.std[0]) < 0.03
    assert glyphs.CLASS_NAMES == info.class_names


def test_an_image_depends_on_seed_and_position_alone(fonts):
    images, _ = render(40, 16, fonts, seed=1)
    assert torch.equal(images[:13], render(13, 16, fonts, seed=1)[0])
    other, _ = render(40, 16, fonts, seed=2)
    assert (images != other).flatten(1).any(1).all()
    assert len(images.flatten(1).unique(dim=0)) == 40
    assert render(10, 32, fonts)[0].shape == (10, 3, 32, 32)


@pytest.mark.parametrize("pen_share", [0.0, 1.0])
def test_pen_and_print_tell_the_classes_apart(fonts, pen_share):
    images, labels = render(400, 16, fonts, seed=3, pen_share=pen_share)
    values = images[:, 0].flatten(1).float()
    distances = torch.cdist(values, values).fill_diagonal_(torch.inf)
    assert (labels[distances.argmin(1)] == labels).float().mean() > 0.8


def test_every_class_has_its_variants():
    assert list(glyphs.PEN) == list(range(10)) and all(len(variants) >= 2 for variants in glyphs.PEN.values())
    closed = glyphs._spline(torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 0]]).numpy())
    assert (closed[0] == closed[-1]).all() and len(closed) == 25 and (closed[8] == (1, 0)).all()


def test_without_fonts_the_embedded_one_serves(monkeypatch, tmp_path):
    monkeypatch.setattr(glyphs, "SYSTEM_FONTS", (str(tmp_path / "none"),))
    assert [font.name for font in find_fonts()] == ["embedded"]
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    (tmp_path / "notes.txt").write_text("no font")
    assert [font.name for font in find_fonts([tmp_path])] == ["embedded"]
    with pytest.raises(UserError, match="--fonts .*absent: no such folder"):
        find_fonts([tmp_path / "absent"])


def test_fonts_of_a_folder_are_found(tmp_path):
    embedded = ImageFont.load_default(20).font_bytes
    (tmp_path / "deep").mkdir()
    for name in ("b.ttf", "deep/a.OTF"):
        (tmp_path / name).write_bytes(embedded)
    assert [font.name for font in find_fonts([tmp_path])] == ["embedded", "a", "b"]


def test_fonts_without_digits_are_left_out(fonts):
    (font,) = fonts
    shuffled = glyphs.Font("symbols", font.masks[1:] + font.masks[:1])
    assert glyphs._resembles(font, font) and not glyphs._resembles(shuffled, font)
    slashed = font.masks[0].copy()
    slashed.paste(255, (slashed.width // 3, slashed.height // 3, 2 * slashed.width // 3, 2 * slashed.height // 3))
    assert not glyphs._resembles(glyphs.Font("slashed", (slashed, *font.masks[1:])), font)


# The dataset


def test_the_dataset_is_one_that_training_reads(monkeypatch, tmp_path, capsys):
    arguments = f"--images 40 --test_images 20 --image_size 8 --output {tmp_path / 'printed.npz'} --fonts {tmp_path}"
    monkeypatch.setattr("sys.argv", ["glyphs", *arguments.split()])
    glyphs.main()
    assert "1 fonts: embedded" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["printed.npz"]
    info = dataset_info("printed", tmp_path)
    assert (info.num_classes, info.image_size, info.class_names) == (10, 8, glyphs.CLASS_NAMES)
    train, test = (load_split(info, split, "cpu") for split in ("train", "test"))
    assert len(train) == 40 and len(test) == 20 and not (train.images[:20] == test.images).all((1, 2, 3)).any()
    assert torch.equal(train.images, render(40, 8, find_fonts(()))[0])


def test_help_and_mistakes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["glyphs", "--help"])
    with pytest.raises(SystemExit):
        glyphs.main()
    assert "python -m datafree.diffusion.glyphs" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["glyphs", "--images", "3"])
    with pytest.raises(UserError, match="--images 3 found"):
        glyphs.main()


# The shipped file


def test_the_shipped_prior(shipped):
    network, about = shipped
    assert SHIPPED.stat().st_size <= 4e6
    assert (about["name"], about["num_classes"], about["image_size"]) == ("glyphs", 10, 16)
    assert about["class_names"] == tuple("0123456789") and about["attention"] is False and type(about["patch"]) is int
    assert not network.training and not any(p.requires_grad or p.dtype != torch.float32 for p in network.parameters())
    assert {tensor.dtype for tensor in load_tensors(SHIPPED).values()} == {torch.float16}
    x_t = torch.randn(2, 3, 16, 16, requires_grad=True)
    network(x_t, torch.tensor([0.3, 0.9]), torch.tensor([3, 10])).sum().backward()
    assert x_t.grad.abs().sum() > 0


def test_git_keeps_the_shipped_prior():
    done = subprocess.run(["git", "check-ignore", "-q", str(SHIPPED.relative_to(ROOT))], cwd=ROOT)
    assert done.returncode != 0


def recogniser(images, labels):
    """A resnet8 trained for seconds on rendered glyphs."""
    torch.manual_seed(0)
    network = build_network("resnet8", 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 4e-3)
    for _ in range(100):
        chosen = torch.randint(len(images), (64,))
        F.cross_entropy(network(images[chosen].float() / 128 - 1), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


def test_samples_of_the_shipped_prior_are_recognised(shipped, pool, fonts):
    network, _ = shipped
    prior, labels = PatchPrior(network, "", 16, 10, num_classes=10, guidance_scale=2.0), torch.arange(60) % 10
    images = PriorAugmenter(prior, 10, 1.0, 10).augment(torch.zeros(60, 3, 16, 16), labels, list(range(60)))
    model = recogniser(*pool)
    for share, pixels in ((0.9, render(60, 16, fonts, seed=9)[0].float()), (0.85, images * 255)):
        with torch.no_grad():
            assert (model(pixels / 128 - 1).argmax(1) == labels).float().mean() > share
    assert (images[:10] - images[10:20]).abs().mean((1, 2, 3)).min() > 0.02  # samples of a class differ


def test_files_that_are_no_prior(shipped, tmp_path):
    path, whole = tmp_path / "x.safetensors", SHIPPED.read_bytes()
    with pytest.raises(UserError, match="x.safetensors does not exist"):
        load_patch_prior(path)
    for content in (b"", b"PK not this", whole[:7], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="x.safetensors") as caught:
            load_patch_prior(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"channels": None}, "channels"),
        ({"channels": [48, 48]}, "size mismatch"),
        ({"channels": [48, 96, 96]}, "Missing key"),
        ({"channels": [10**9, 96]}, "out of range"),
        ({"channels": "48,96"}, "out of range"),
        ({"channels": []}, "out of range"),
        ({"image_size": 15}, "do not fit"),
        ({"patch": 0}, "out of range"),
        ({"num_classes": 9, "class_names": list("012345678")}, "size mismatch"),
        ({"class_names": ["one"]}, "names"),
        ({"class_names": 10}, "len"),
    ],
)
def test_foreign_metadata(change, word, shipped, tmp_path):
    _, about = shipped
    metadata = {key: json.dumps(value) for key, value in (about | change).items() if value is not None}
    save_tensors(tmp_path / "x.safetensors", load_tensors(SHIPPED), metadata)
    with pytest.raises(UserError, match=f"x.safetensors is not a pixel prior .*{word}") as caught:
        load_patch_prior(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_foreign_tensors(shipped, tmp_path):
    path, tensors = tmp_path / "x.safetensors", load_tensors(SHIPPED)
    metadata = {key: json.dumps(value) for key, value in shipped[1].items()}
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, path, metadata)
    with pytest.raises(UserError, match="NaN or infinite weights"):
        load_patch_prior(path)
    save_tensors(path, {"weight": torch.ones(2)}, metadata)
    with pytest.raises(UserError, match="not a pixel prior"):
        load_patch_prior(path)
    save_tensors(path, tensors, {"format": "pt"})
    with pytest.raises(UserError, match="not a pixel prior"):
        load_patch_prior(path)


def test_the_network_is_that_of_the_pixel_prior(shipped):
    network, about = shipped
    fresh = PatchUNet(10, 16, about["patch"], about["channels"], about["attention"])
    assert list(fresh.state_dict()) == list(network.state_dict())
