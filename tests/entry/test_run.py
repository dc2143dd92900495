"""A run from the command line: its flags, its stages, how it is resumed, and one line for each error."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import registry
from engine.data.splits import load_split
from engine.runtime.errors import UserError, resolve, run_command
from engine.runtime.run import Run, progress
from engine.runtime.tensors import load_tensors
from tests.conftest import CPU, ROOT, build_network, dataset_info, outcome


def test_several_seeds_in_one_command(distill, tmp_path, capsys):
    """--seeds makes one folder a seed, and a table. Finished seeds are skipped, and {seed} in paths is the seed."""
    distill("noise", tmp_path / "runs", "--seeds 0,2")
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("noise ") and "±" in row
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"seed0", "seed2"}
    distill("noise", tmp_path / "runs", "--seeds 0,2,3")
    out = capsys.readouterr().out
    assert out.count("distill: already done, skipped") == 2 and out.splitlines()[-1].startswith("noise ")
    distill("csd", tmp_path / "bank{seed}", "--stages synthesize --seeds 0,1 --init_rounds 1")
    assert "\ncsd " not in capsys.readouterr().out, "no run is finished, so there is no table"
    distill("csd", tmp_path / "s{seed}", f"--seeds 0,1 --init_bank {tmp_path}/bank{{seed}} --epochs 1")
    digests = [json.loads((tmp_path / f"s{seed}" / "args.json").read_text())["args"]["init_bank"] for seed in (0, 1)]
    assert digests == [f"{tmp_path}/bank0", f"{tmp_path}/bank1"]


def test_the_control_alone_opens_the_train_split(distill, tmp_path, capsys):
    distill("kd", tmp_path / "kd", "--epochs 1")
    assert "kd opens the training images of digits: it is a control" in capsys.readouterr().out
    assert json.loads((tmp_path / "kd" / "result.json").read_text())["images"] == 1195
    assert [m for m in registry.METHODS if resolve(registry.METHODS[m]).reads_train_split] == ["kd"]


def test_noise_from_a_folder_of_pictures(distill, tmp_path):
    for k in range(9):
        (tmp_path / "pictures" / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 14), (k * 20, 0, 9)).save(tmp_path / "pictures" / "deep" / f"{k}.png")
    distill("noise", tmp_path / "run", f"--images {tmp_path / 'pictures'}")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["images"] == 9 and result["external_prior"] == "images of pictures"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        distill("noise", tmp_path / "run2", f"--images {tmp_path / 'empty'}")
    Image.new("RGB", (20, 14), (9, 9, 9)).save(tmp_path / "pictures" / "deep" / "3.png")
    with pytest.raises(UserError, match="is done with other files in --images .*pictures: they have changed since"):
        distill("noise", tmp_path / "run", f"--images {tmp_path / 'pictures'}")


def test_one_image_that_has_changed_is_another_run(distill, tmp_path):
    for seed in (0, 1):
        Image.effect_noise((64, 64), 50 + seed).save(tmp_path / "a.png")
        if seed:
            with pytest.raises(UserError, match="other files in --image .*a.png: they have changed since"):
                distill("one_image", tmp_path / "run", f"--image {tmp_path / 'a.png'}")
        else:
            distill("one_image", tmp_path / "run", f"--image {tmp_path / 'a.png'} --epochs 2")


def test_a_done_run_is_skipped(distill, copied, capsys):
    folder = copied("csd")
    student = (folder / "student.pth").stat().st_mtime_ns
    distill("csd", folder)
    accuracy = json.loads((folder / "result.json").read_text())["acc1_last"]
    assert f"distill: already done, skipped ({folder}): acc1 {accuracy:.2f} % (last)\n" in capsys.readouterr().out
    assert (folder / "student.pth").stat().st_mtime_ns == student


def test_a_changed_flag_is_named_and_redo_helps(distill, copied):
    folder = copied("csd")
    with pytest.raises(UserError, match="--init_g_steps 2, now 3"):
        distill("csd", folder, "--init_g_steps 3")
    with pytest.raises(UserError, match="--T 20.0, now 4.0"):
        distill("csd", folder, "--T 4")
    shard = (folder / "bank" / "synthesize-000000.safetensors").stat().st_mtime_ns
    distill("csd", folder, "--T 4 --redo distill")
    assert json.loads((folder / "result.json").read_text())["settings"]["T"] == 4
    assert (folder / "bank" / "synthesize-000000.safetensors").stat().st_mtime_ns == shard
    with pytest.raises(UserError, match="--redo nonsense"):
        distill("csd", folder, "--redo nonsense")


def test_omega_can_change_without_generating_again(distill, tmp_path, finished):
    first = finished("dda")
    variants = first / "variants"
    cosine = load_tensors(first / "filter_teacher.safetensors")["cosine"]
    made = {f: f.stat().st_mtime_ns for f in variants.glob("augment-*")}
    omega, given = float(cosine.median()), f"--init_bank {first} --init_variants {first}"
    distill("dda", tmp_path / "b", f"--omega {omega} {given}")
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert 0 < result["variants_kept"] < result["variants"] == 24 and result["omega"] == pytest.approx(omega, abs=1e-3)
    assert not load_tensors(tmp_path / "b" / "filter_teacher.safetensors")["keep"].all()
    assert load_tensors(first / "filter_teacher.safetensors")["keep"].all(), "another run's mask is its own"
    assert result["seconds"]["augment"] > 0 and not (tmp_path / "b" / "variants").exists()
    assert {f: f.stat().st_mtime_ns for f in variants.glob("augment-*")} == made
    with pytest.raises(UserError, match="keeps none"):
        distill("dda", tmp_path / "c", f"--omega 1 {given}")


def test_variants_do_not_depend_on_the_batch_size(distill, tmp_path):
    for size in (1, 5):
        distill("dda", tmp_path / str(size), f"--stages synthesize,augment --diffusion_batch_size {size}")
    one, five = (load_tensors(tmp_path / s / "variants" / "augment-000000.safetensors") for s in "15")
    assert torch.equal(one["source_index"], torch.arange(12).repeat(2)) and torch.equal(one["labels"], five["labels"])
    assert (one["images"].int() - five["images"].int()).abs().max() <= 1
    assert not torch.equal(one["images"][:12], one["images"][12:])


PRETRAINED = {
    "image_variation": ("image_variation", ""),
    "image_to_image": ("stable_diffusion", "--strength 0.5"),
    "sdxl_turbo": ("turbo", "--prior image_to_image --strength 0.5 --guidance_scale 0"),
}


@pytest.mark.parametrize("prior", PRETRAINED)
def test_pretrained_priors_make_the_variants(prior, distill, miniature, tmp_path):
    """A whole DDA run with a saved diffusers pipeline as prior and CLIP as filter; the result names both."""
    builder, extra = PRETRAINED[prior]
    kind = prior if prior in ("image_variation", "image_to_image") else "image_to_image"
    distill(
        "dda",
        tmp_path / "run",
        f"--prior {kind} --diffusion_model {miniature(builder)} --variants 1 --num_inference_steps 2 --embedding clip --embedding_model {miniature('clip')} {extra}",
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["external_prior"] == f"clip + {builder}" and result["variants"] == 12
    assert (tmp_path / "run" / "filter_clip-clip.safetensors").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(distill, tmp_path):
    with pytest.raises(UserError, match="lambdalabs/sd-image-variations-diffusers: .*hf download"):
        distill("dda", tmp_path, "--prior image_variation")


def test_bfloat16_runs(distill, tmp_path):
    distill("dda", tmp_path, "--amp bf16 --epochs 1")
    assert (tmp_path / "result.json").exists()


def test_stages_can_be_run_apart(distill, tmp_path, finished):
    with pytest.raises(UserError, match="stage synthesize .* is not started; run it first"):
        distill("dda", tmp_path, "--stages augment")
    for stage in ("synthesize", "augment", "distill"):
        distill("dda", tmp_path, f"--stages {stage}")
    assert outcome(tmp_path) == outcome(finished("dda"))
    with pytest.raises(UserError, match="--stages generate found, stages out of synthesize, augment, distill wanted"):
        distill("dda", tmp_path, "--stages generate")


def test_a_bank_of_another_teacher_is_refused(distill, tmp_path, finished):
    other = tmp_path / "other.pth"
    torch.manual_seed(1)
    torch.save(build_network("resnet8", 10).state_dict(), other)
    with pytest.raises(UserError, match="was made with the teacher"):
        distill("csd", tmp_path / "b", f"--init_bank {finished('csd')} --teacher_ckpt {other}")
    with pytest.raises(UserError, match="no image bank"):
        distill("csd", tmp_path / "c", f"--init_bank {tmp_path / 'nowhere'}")


def test_another_teacher_is_another_run(distill, tmp_path, copied):
    torch.manual_seed(1)
    torch.save(build_network("resnet8", 10).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="--teacher_ckpt"):
        distill("csd", copied("csd"), f"--teacher_ckpt {tmp_path / 'other.pth'}")


def test_an_imported_bank_serves_any_teacher(distill, command, tmp_path, finished):
    command("datafree.bank", f"export {finished('csd') / 'bank'} {tmp_path / 'png'}")
    command("datafree.bank", f"import {tmp_path / 'png'} {tmp_path / 'bank'} --dataset digits")
    distill("csd", tmp_path / "b", f"--init_bank {tmp_path / 'bank'} --epochs 1")
    assert (tmp_path / "b" / "result.json").exists()


def test_nan_stops_the_run_before_anything_is_written(distill, tmp_path, finished):
    with pytest.raises(UserError, match="became nan|became inf"):
        distill("csd", tmp_path, f"--lr 1e12 --init_bank {finished('csd')}")
    assert not (tmp_path / "student.pth").exists()


def test_a_data_free_run_cannot_open_the_train_split(distill, copied):
    distill("csd", copied("csd"))
    with pytest.raises(UserError, match="train"):
        load_split(dataset_info("digits"), "train", CPU)


def test_two_processes_do_not_share_a_folder(distill, tmp_path):
    run = Run(tmp_path, {})
    with pytest.raises(UserError, match="another process is running"):
        distill("csd", tmp_path)
    run.close()


BAD = {
    "--method qqq": "unknown method 'qqq'; known: ",
    "--method csd --dataset nonsense": "unknown dataset",
    "--method csd --dataset digits --teacher resnet200": "unknown model",
    "--method csd --g_step 3": "unknown flag --g_step; did you mean --g_steps",
    "--method csd --g_steps many": "g_steps",
    "--method csd --dataset digits --teacher vgg13": "no teacher checkpoint checkpoints/pretrained/digits_vgg13.pth",
    "--method csd --dataset digits --teacher resnet8 --teacher_ckpt README.md": "README.md cannot be read",
    "--method csd --gpu 3": "--gpu 3: this machine has no GPU",
    "--method csd --amp fp16": "--amp fp16 needs a GPU",
    "--method csd --amp fp8": "one of auto, no, bf16, fp16 wanted",
    "--method dda --embedding nonsense": "one of teacher, clip, dinov2 wanted",
    "": "--method",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments, command):
    with pytest.raises(UserError) as caught:
        command("datafree_kd", arguments)
    assert BAD[arguments] in str(caught.value) and "\n" not in str(caught.value)


def test_a_foreign_checkpoint_is_refused(distill, tmp_path):
    torch.save({"state_dict": {"fc.weight": torch.zeros(100, 64)}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="foreign.pth"):
        distill("csd", tmp_path / "run", f"--teacher_ckpt {tmp_path / 'foreign.pth'}")


def test_exit_code_and_one_line_in_a_real_process(command, forked):
    code, out, errors = forked(lambda: run_command(lambda: command("datafree_kd", "--method csd --dataset nonsense")))
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and not out


def test_an_unwritable_save_dir_is_refused(distill, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--save_dir .* cannot be written"):
        distill("csd", tmp_path / "file" / "run")
    with pytest.raises(UserError, match="--save_dir .*file is a file, a folder wanted; give another --save_dir"):
        distill("csd", tmp_path / "file")


def test_a_bar_without_stderr_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as Python sets it if the descriptor is closed
    bar = progress(3, "work", "step")
    bar.update(), bar.set_postfix({"acc1": 1}), bar.close()


def test_help_and_the_rooms_load_no_large_libraries():
    """--help imports no large library, and the modules of a run without diffusers or transformers import neither."""
    code = """
import sys
import datafree_kd, train_scratch
for main, words in ((train_scratch.main, []), (datafree_kd.main, []), (datafree_kd.main, ["--method", "dda"])):
    sys.argv = ["x", *words, "--help"]
    try:
        main()
    except SystemExit:
        print({"timm", "torchvision", "huggingface_hub", "onnx", "diffusers", "transformers"} & set(sys.modules))
import datafree.diffusion.pixel, datafree.diffusion.variation, datafree.filter
print({"diffusers", "transformers", "huggingface_hub"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--omega" in done.stdout and "--kd_steps" in done.stdout and done.stdout.splitlines().count("set()") == 4, (
        done.stdout
    )
