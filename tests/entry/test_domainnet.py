"""A tiny DomainNet in the published layout: teachers trained by flags and by script, and heads for other classes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from engine.networks.weights import load_weights
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_checkpoint
from registry import DATASETS
from tests.conftest import ROOT, build_network, script_commands

PUBLISHED = ("train_from_scratch/domainnet", "generate_data/generate_data_domainNet", "distill/distill")
OTHER = {"aircraft carrier": 0, "ambulance": 4, "zigzag": 344}  # classes that are not among the ten
SMALL = "--model resnet8 --image_size 32 --epochs 1 --batch_size 8 --workers 0 --gpu -1"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """A sketch domain of the ten classes and three others; a class has two images a split, of noise in its own colour."""
    root = tmp_path_factory.mktemp("data")
    folder, random = root / "domainnet", np.random.default_rng(0)
    for split in ("train", "test"):
        lines = []
        for name, number in (DATASETS["domainnet"]["ten"] | OTHER).items():
            for k in range(2):
                path = folder / "sketch" / name.replace(" ", "_") / f"{split}_{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                colour = np.array([number % 256, number // 2, 255 - number % 256])
                pixels = (colour + random.integers(-40, 40, (40, 48, 3))).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
                lines.append(f"{path.relative_to(folder)} {number}\n")
        (folder / f"sketch_{split}.txt").write_text("".join(lines))
    return root


def logged(folder):
    return (folder / "log.txt").read_text()


def script_command(name, flags, **variables):
    """The flags with which a script of ``scripts/`` calls datafree_kd.py or train_scratch.py, followed by ``flags``."""
    (arguments,) = script_commands([f"scripts/{name}.sh"], flags, **variables).values()
    return arguments[1:]


@pytest.mark.parametrize(
    "classes, name, count, images", [("", "sketch", 10, 20), ("--classes all", "sketch_all", 345, 26)], ids=["ten", "all"]
)
def test_a_teacher_of_ten_classes_or_all(classes, name, count, images, command, data_root, tmp_path):
    output = tmp_path / "teacher.pth"
    flags = f"{SMALL} --dataset domainnet --domain sketch {classes} --data_root {data_root}"
    command("train_scratch", f"{flags} --save_dir {tmp_path / 'run'} --output {output}")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dataset"] == f"domainnet_{name}" and 0 <= result["acc1_last"] <= 100
    assert f"{images} training and {images} test images" in logged(tmp_path / "run")
    load_weights(build_network("resnet8", count), output)
    command("train_scratch", f"{flags} --save_dir {tmp_path / 'run'} --output {output}")
    assert "already trained" in logged(tmp_path / "run")


def test_the_classes_are_part_of_the_run(command, data_root, tmp_path):
    flags = f"{SMALL} --dataset domainnet --domain sketch --data_root {data_root}"
    flags += f" --save_dir {tmp_path / 'run'} --output {tmp_path / 'a.pth'}"
    command("train_scratch", flags)
    with pytest.raises(UserError, match="--classes unset, now all"):
        command("train_scratch", f"{flags} --classes all")
    with pytest.raises(UserError, match="'five' found, one of ten, all wanted"):
        command("train_scratch", f"{flags} --classes five")
    with pytest.raises(UserError, match="no domains; leave out --classes"):
        command("train_scratch", f"{SMALL} --dataset digits --classes ten --save_dir {tmp_path / 'digits'}")


def test_the_classes_reach_a_data_free_run(command, teacher_file, data_root, tmp_path):
    flags = f"--method csd --dataset domainnet --domain sketch --image_size 32 --data_root {data_root}"
    with pytest.raises(UserError, match="has 10 classes.*, 345 wanted"):
        teacher = f"--teacher resnet8 --teacher_ckpt {teacher_file} --gpu -1"
        command("datafree_kd", f"{flags} --classes all {teacher} --save_dir {tmp_path}")


def test_the_teacher_script_takes_smaller_flags(command, data_root, tmp_path):
    """Runs the script in bash and its own process, as a user does."""
    small = f"{SMALL} --data_root {data_root} --save_dir {tmp_path} --output {tmp_path / 'a.pth'}"
    environment = os.environ | {"VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["bash", ROOT / f"scripts/{PUBLISHED[0]}.sh", *small.split()]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "args.json").read_text())["args"]
    assert (args["domain"], args["lr"], args["weight_decay"]) == ("sketch", 0.01, 2e-4)
    with pytest.raises(UserError, match="unknown --domain 'scetch'"):
        command("train_scratch", script_command(PUBLISHED[0], small, DOMAIN="scetch"))


def test_the_other_scripts_generate_and_distill(command, teacher_file, data_root, miniature, tmp_path):
    small = (
        f"--teacher resnet8 --student resnet8 --image_size 32 --gpu -1 --teacher_ckpt {teacher_file} --data_root {data_root}"
    )
    fewer = "--images_per_class 1 --diffusion_batch_size 5 --num_inference_steps 2 --resolution 32 --adv_steps 1"
    prior, made = miniature("stable_diffusion"), tmp_path / "generated"
    command("datafree_kd", script_command(PUBLISHED[1], f"{small} {fewer} --diffusion_model {prior} --save_dir {made}"))
    args = json.loads((made / "args.json").read_text())["args"]
    assert (args["guidance_scale"], args["bn"], args["oh"], args["adv"], args["adv_from"]) == (7, 0.1, 1, 1, 20)
    fewer = f"--init_bank {made / 'bank'} --epochs 1 --kd_steps 1 -b 8 --save_dir {tmp_path / 'student'}"
    command("datafree_kd", script_command(PUBLISHED[2], f"{small} {fewer}"))
    result = json.loads((tmp_path / "student" / "result.json").read_text())
    assert (result["dataset"], result["bank_images"]) == ("domainnet_sketch", 10)
    args = json.loads((tmp_path / "student" / "args.json").read_text())["args"]
    assert (args["lr"], args["weight_decay"], args["T"], args["warmup_epochs"]) == (0.1, 1e-4, 30, 0)


@pytest.fixture
def imagenet_file(tmp_path):
    """Path of random weights of torchvision's resnet18 with its 1000 classes."""
    torch.manual_seed(0)
    file = tmp_path / "resnet18-12345678.pth"
    torch.save(build_network("resnet18_imagenet", 1000).state_dict(), file)
    return file


def test_a_head_for_other_classes_is_dropped(command, data_root, imagenet_file, tmp_path):
    flags = f"--model resnet18_imagenet {SMALL.partition('resnet8 ')[2]} --dataset domainnet --domain sketch --lr 1e-30"
    flags += f" --weight_decay 0 --data_root {data_root} --save_dir {tmp_path / 'run'} --output {tmp_path / 'a.pth'}"
    command("train_scratch", f"{flags} --resume {imagenet_file}")
    assert f"starting from {imagenet_file}, without its head (fc of 1000 classes)" in logged(tmp_path / "run")
    before, checkpoint = load_checkpoint(imagenet_file), load_checkpoint(tmp_path / "a.pth")
    after = checkpoint["state_dict"]
    assert torch.equal(after["conv1.weight"], before["conv1.weight"]) and after["fc.weight"].shape == (10, 512)
    assert checkpoint["start"] == imagenet_file.name


def test_only_the_head_may_differ(imagenet_file):
    network = build_network("resnet18_imagenet", 10)
    with pytest.raises(UserError, match="1000 classes.*, 10 wanted"):
        load_weights(network, imagenet_file)
    before = network.fc.weight.clone()
    assert load_weights(network, imagenet_file, new_head=True) == {"dropped_head": "fc of 1000 classes"}
    assert torch.equal(network.fc.weight, before)
    assert load_weights(build_network("resnet18_imagenet", 1000), imagenet_file, new_head=True) == {}
    with pytest.raises(UserError, match="another network, ResNet wanted: .*missing"):
        load_weights(build_network("resnet34_imagenet", 10), imagenet_file, new_head=True)


def test_pretrained_weights_come_from_the_cache_or_the_network(command, data_root, imagenet_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    fetched = []

    def download(url, target, hash_prefix):
        fetched.append(hash_prefix)
        Path(target).write_bytes(imagenet_file.read_bytes())

    def no_network(*args):
        raise URLError("no route to host")

    flags = f"--model resnet18_imagenet {SMALL.partition('resnet8 ')[2]} --dataset domainnet --domain sketch --pretrained"
    flags += f" --data_root {data_root} --save_dir {tmp_path / 'run'} --output {tmp_path / 'a.pth'}"
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    message = "resnet18-.*cannot be downloaded.*no route to host.*--resume resnet18-.*dropped"
    with pytest.raises(UserError, match=message) as caught:
        command("train_scratch", flags)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    command("train_scratch", flags)
    assert len(fetched) == 1 and len(fetched[0]) == 8 and "without its head (fc of 1000 classes)" in logged(tmp_path / "run")
    command("train_scratch", f"{flags} --redo")
    assert len(fetched) == 1


@pytest.mark.parametrize(
    "extra, message",
    [("--model wrn16_1", "no published ImageNet weights of 'wrn16_1'.*resnet34_imagenet"), ("--resume x.pth", "exclude")],
)
def test_pretrained_is_refused_where_it_has_no_meaning(extra, message, command, tmp_path):
    with pytest.raises(UserError, match=message):
        command("train_scratch", f"{SMALL} --dataset digits --save_dir {tmp_path} --pretrained {extra}")
