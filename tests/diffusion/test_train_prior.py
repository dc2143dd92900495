"""Training a diffusion prior from an npz file and from class folders, resuming, starting from a file, and wrong input."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from datafree.diffusion import patch_unet, train_prior
from datafree.diffusion.denoising import Denoising
from datafree.diffusion.patch_unet import load_patch_prior
from datafree.diffusion.priors import load_prior
from engine.loops.measures import density_coverage, frechet_distance
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_tensors, save_checkpoint
from tests.conftest import build_network

TINY = "--channels 8,8 --no_attention --batch_size 4 --round_steps 2 --report_every 2 --images 32 --samples 12 --gpu -1"


def pictures(count, seed, classes=3, size=8):
    """Images (count, size, size, 3) uint8 and labels; an image is noise around the grey level of its class."""
    random, labels = np.random.default_rng(seed), np.arange(count) % classes
    return (random.integers(0, 60, (count, size, size, 3)) + 60 * labels[:, None, None, None]).astype(np.uint8), labels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with ``greys.npz`` and the same images as class folders."""
    root = tmp_path_factory.mktemp("data")
    arrays = {"classes": np.array(["dark", "grey", "light"])}
    for split, count in (("train", 30), ("test", 12)):
        images, labels = pictures(count, seed=count)
        arrays |= {f"x_{split}": images, f"y_{split}": labels}
        for k, (image, label) in enumerate(zip(images, labels)):
            file = root / "greys" / split / arrays["classes"][label] / f"{k:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    np.savez(root / "greys.npz", **arrays)
    return root


def train_in(folder, root, name="prior", extra="", dataset="greys"):
    output = folder / f"{name}.safetensors"
    arguments = f"{TINY} --dataset {dataset} --data_root {root} --output {output} --save_dir {folder / name} {extra}"
    with mock.patch("sys.argv", ["train_prior", *arguments.split()]), mock.patch.object(train_prior, "SAMPLING_STEPS", 3):
        train_prior.main()
    return output


@pytest.fixture
def train(data, tmp_path):
    """Function train(name, flags) that trains a prior and returns its file."""
    return lambda *args, root=data, **kwargs: train_in(tmp_path, root, *args, **kwargs)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """File of a prior trained with the flags ``TINY``, beside its run folder. Tests must not change the files."""
    return train_in(tmp_path_factory.mktemp("trained"), data)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one, other):
    ours, theirs = load_tensors(one), load_tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_tiny_prior_from_end_to_end(trained):
    network, about = load_patch_prior(trained)
    assert (about["num_classes"], about["image_size"], about["class_names"]) == (3, 8, ("dark", "grey", "light"))
    assert (about["name"], about["dataset"], about["images_drawn"], about["training_images"]) == ("prior", "greys", 32, 30)
    assert about["settings"]["lr"] == 1e-3 and {t.dtype for t in load_tensors(trained).values()} == {torch.float16}
    figures, folder = lines(trained.with_suffix("")), trained.with_suffix("")
    assert [line["images"] for line in figures] == [8, 16, 24, 32]
    assert ["held_out" in line for line in figures] == [False, True, False, True] and "frechet" not in figures[-1]
    assert sorted(p.name for p in (folder / "pictures").iterdir()) == ["samples_000000016.png", "samples_000000032.png"]
    assert list(folder.glob("events.*"))


def test_class_folders_give_the_same_prior_as_an_npz(train, trained, data):
    folders = train("folders", "--image_size 8", "folder", root=data / "greys")
    # The order of the images differs (class by class), and therefore the weights; the metadata are the same.
    (_, ours), (_, theirs) = (load_patch_prior(file) for file in (trained, folders))
    assert theirs["dataset"] == "greys" and all(
        ours[k] == theirs[k] for k in ("class_names", "image_size", "training_images")
    )


def test_a_stopped_training_goes_on_bit_for_bit(train, trained, tmp_path, monkeypatch):
    fit, calls = Denoising.fit, []

    def stopping(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(self, *args)

    monkeypatch.setattr(Denoising, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        train("stopped")
    # The file can be used before the training ends.
    assert load_patch_prior(tmp_path / "stopped.safetensors")[1]["images_drawn"] == 16
    torch.rand(5)
    resumed = train("stopped")
    assert len(calls) == 5 and same(trained, resumed)
    timeless = [
        [{k: v for k, v in line.items() if "per" not in k} for line in lines(file.with_suffix(""))]
        for file in (trained, resumed)
    ]
    assert timeless[0] == timeless[1]
    longer = train("stopped", "--images 40")
    assert load_patch_prior(longer)[1]["images_drawn"] == 40 and not same(trained, longer)
    assert same(longer, train("at_once", "--images 40"))


def test_minutes_stop_a_training_that_can_go_on(train, trained):
    file = train("slow", "--minutes 0.0001")
    assert load_patch_prior(file)[1]["images_drawn"] == 8
    assert same(train("slow"), trained)


def test_changed_flags_are_refused_and_redo_forgets(train):
    first = train()
    before = first.read_bytes()
    with pytest.raises(
        UserError, match="started with --lr 0.001, now 0.002 is given; give the former value, another --save_dir, or --redo"
    ):
        train(extra="--lr 2e-3")
    train(extra="--lr 2e-3 --redo")
    assert first.read_bytes() != before


def test_a_file_of_others_is_not_replaced(train, trained, tmp_path):
    """Neither by --redo nor by a finished training. A lost file is written again."""
    first, run = train(), tmp_path / "prior"
    args = (run / "args.json").read_bytes()
    first.write_text("theirs")
    for extra in ("", "--redo", "--images 64"):
        with pytest.raises(UserError, match="prior.safetensors exists and is not from this run; give another --output"):
            train(extra=extra)
    with pytest.raises(UserError, match="started with --lr"):
        train(extra="--lr 2e-3")
    assert first.read_text() == "theirs" and (run / "args.json").read_bytes() == args and (run / "last.pth").exists()
    first.unlink()
    assert same(train(), trained) and load_patch_prior(first)[1] == load_patch_prior(trained)[1]
    (run / "outputs.json").unlink()
    train(extra="--images 40")  # of an earlier version


def test_the_folder_of_another_command_is_refused(train, tmp_path):
    (tmp_path / "prior").mkdir()
    stages = {"train": {"status": "incomplete", "depends_on": {}, "seconds": 0, "facts": {}}}
    (tmp_path / "prior" / "stages.json").write_text(json.dumps(stages))
    with pytest.raises(UserError, match="is the folder of a run of another command; give another --save_dir"):
        train()
    assert [file.name for file in (tmp_path / "prior").iterdir()] == ["stages.json"]


def test_start_goes_on_from_a_file(train, trained, tmp_path):
    second = train("second", f"--start {trained} --images 48")
    about = load_patch_prior(second)[1]
    assert about["images_drawn"] == 48 and [line["images"] for line in lines(tmp_path / "second")] == [40, 48]
    assert about["settings"]["start"] == "prior.safetensors" and not same(trained, second)
    with pytest.raises(UserError, match=r"has channels \(8, 8\), but this training has \(8, 16\)"):
        train("third", f"--start {trained} --channels 8,16 --images 48")
    with pytest.raises(UserError, match="missing.safetensors does not exist"):
        train("third", "--start missing.safetensors")


def test_a_file_may_be_renewed_from_itself_stopped_or_not(train, trained, tmp_path):
    first = shutil.copy(trained, tmp_path / "first.safetensors")
    whole = train("whole", f"--start {first} --images 64")
    again = f"--start {first} --output {first} --save_dir {tmp_path / 'renewed'} --report_every 1"
    train("first", f"{again} --images 48")
    assert load_patch_prior(first)[1]["images_drawn"] == 48
    train("first", f"{again} --images 64")
    assert same(first, whole)


def test_a_classifier_compares_samples_with_the_test_split(train, trained, tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "judge.pth", {"state_dict": build_network("resnet8", 3).state_dict(), "arch": "resnet8"})
    judged = train("judged", f"--eval_classifier {tmp_path / 'judge.pth'}")
    last = lines(tmp_path / "judged")[-1]
    assert last["frechet"] > 0 and 0 <= last["coverage"] <= 1 and 0 <= last["eval_classifier_acc1"] <= 100
    assert same(trained, judged)  # measuring changes nothing
    save_checkpoint(tmp_path / "nameless.pth", {"state_dict": build_network("resnet8", 3).state_dict()})
    with pytest.raises(UserError, match="nameless.pth does not record its architecture"):
        train("judged", f"--eval_classifier {tmp_path / 'nameless.pth'}")


def test_shipped_priors_load_by_name(train, tmp_path, monkeypatch):
    monkeypatch.setattr(patch_unet, "SHIPPED", tmp_path)
    train("natural_8")
    monkeypatch.chdir(tmp_path / "natural_8")
    prior = load_prior("natural_8", num_classes=3)
    assert prior.external_prior == "natural_8" and prior.shape == (3, 8, 8)
    assert patch_unet.shipped_prior("natural_8") == tmp_path / "natural_8.safetensors"
    for name in ("natural_9", "../natural_8", "natural_8/../natural_8"):
        assert patch_unet.shipped_prior(name) is None


def test_the_shipped_prior_of_natural_images():
    path = patch_unet.shipped_prior("natural_32")
    assert path and path.stat().st_size <= 12e6
    about = load_patch_prior(path)[1]
    assert (about["dataset"], about["training_images"], about["num_classes"]) == ("cifar100", 50000, 100)
    assert about["image_size"] == 32 and about["images_drawn"] >= 600_000 and about["settings"]["amp"] == "bf16"
    assert "/" not in str({**about, "class_names": ()})  # no path of the machine on which it was trained


MISTAKES = {
    "--dataset nothing_here": "unknown dataset 'nothing_here'",
    "--dataset folder": "train|test",
    "--batch_size 0": "--batch_size 0 found",
    "--images 0": "--images 0 found",
    "--channels 8,7": "do not fit",
    "--patch 3": "do not fit",
    "--amp fp16": "one of auto, no, bf16 wanted",
    "--image_sise 8": "did you mean --image_size",
    "--eval_classifier missing.pth": "classifier for evaluation missing.pth does not exist",
    "--lr 1e12": "diverged .*lower --lr",
}


@pytest.mark.parametrize("flags, words", MISTAKES.items())
def test_a_mistake_is_one_line(flags, words, train):
    with pytest.raises(UserError, match=words) as caught:
        train("mistaken", flags)
    assert "\\n" not in str(caught.value)


def test_help_names_the_flags(train, capsys):
    with pytest.raises(SystemExit):
        train(extra="--help")
    assert "python -m datafree.diffusion.train_prior" in (text := capsys.readouterr().out) and "--report_every" in text


# Quality


def test_frechet_distance_in_closed_form():
    """For Gaussians with diagonal covariance the distance is (m1 - m2)^2 + (s1 - s2)^2 per axis."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    real = (real - real.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(real.T)).T)  # white, exactly
    other = real * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([3.0, 0.0, 1.0])
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(real, other) == pytest.approx(9 + 1 + 1 + 0.25)


def test_density_and_coverage():
    generator = torch.Generator().manual_seed(0)
    real, same_law = (torch.randn(800, 4, generator=generator) for _ in range(2))
    density, coverage = density_coverage(real, same_law)
    assert 0.9 < density < 1.1 and coverage > 0.9
    assert density_coverage(real, same_law + 50) == (0, 0)
    density, coverage = density_coverage(real, real[:1].expand(800, 4))  # the same image 800 times
    assert coverage < 0.05


def test_the_file_is_readable_by_safetensors_alone(trained):
    from safetensors.torch import load

    assert load(trained.read_bytes()).keys() == load_tensors(trained).keys()
