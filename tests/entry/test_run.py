"""Every method on the debug task: finite, reproducible, resumable, and clear about what it refuses."""

import json
import subprocess
import sys

import pytest
import torch

import registry
from engine.runtime.errors import UserError
from engine.runtime.files import load_checkpoint, load_tensors, weights_digest
from engine.runtime.names import resolve
from tests.conftest import (
    CPU,
    ROOT,
    TINY,
    TINY_TASK,
    build_classifier,
    build_network,
    dataset_info,
    load_teacher,
    make_task,
)

METHODS = sorted(registry.METHODS)
RESULT_FIELDS = {
    "method", "dataset", "teacher", "student", "seed", "external_prior", "teacher_acc1", "acc1_last", "acc1_best", "acc1_mean",
    "student_steps", "images", "synthesis_seconds", "seconds", "settings", "peak_memory_mib", "versions", "command", "commit",
}  # fmt: skip


def outcome(folder):
    """What must be equal when two runs are: weights, images, metrics."""
    shards = {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}
    student = weights_digest(load_checkpoint(folder / "student.pth")["state_dict"])
    return shards, student, (folder / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def whole():
    """Outcomes of unbroken runs by method, made once."""
    return {}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_student(method, distill, tmp_path, teacher_file, whole):
    before = teacher_file.read_bytes()
    distill(method, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert RESULT_FIELDS <= set(result) and result["method"] == method
    external = {"kd": "real training images", "diffdfkd": "glyphs_digits_16"}
    assert result["external_prior"] == external.get(method, "none")
    assert result["student_steps"] == 6 and result["images"] > 0
    assert 0 <= result["synthesis_seconds"] < result["seconds"]["distill"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    numbers = [v for line in lines for v in line.values() if isinstance(v, float)]
    assert numbers and all(v == v and abs(v) < 1e6 for v in numbers)
    assert teacher_file.read_bytes() == before
    picture = "bank" if method == "diffdfkd" else "images"
    for name in ("args.json", "log.txt", "stages.json", "student.pth", f"pictures/{picture}.png"):
        assert (tmp_path / name).exists(), name
    whole[method] = outcome(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_gives_the_same_bits(method, distill, tmp_path, whole):
    if method not in whole:
        distill(method, tmp_path / "first")
        whole[method] = outcome(tmp_path / "first")
    distill(method, tmp_path / "again")
    assert outcome(tmp_path / "again") == whole[method]
    distill(method, tmp_path / "other", "--seed 1")
    assert outcome(tmp_path / "other")[1] != whole[method][1]


@pytest.mark.parametrize("method", METHODS)
def test_the_student_changes_and_the_teacher_does_not(method, teacher_file):
    """One round and three student steps, through the same objects as a run."""
    from datafree.base import ImageBatch
    from engine.data.crops import crop_flip
    from engine.data.splits import load_split
    from engine.loops.distill import Distillation, Schedule
    from engine.loops.settings import DistillFlags
    from engine.runtime.flags import Parser, add_flags, from_args
    from engine.runtime.run import progress

    info = dataset_info("digits")
    teacher, student = load_teacher("resnet8", info, CPU, str(teacher_file)), build_classifier("resnet8", info, CPU)
    cls = resolve(registry.METHODS[method])
    parser = Parser()
    for group in (DistillFlags, cls.Config):
        add_flags(parser, group, method, cls.defaults)
    config = from_args(cls.Config, parser.parse_args(TINY[method].split()))
    task = make_task(
        random_view=lambda x: crop_flip(x, 1, False),
        training_split=lambda: load_split(info, "train", CPU) if cls.reads_train_split else None,
    )
    pieces = cls(config, teacher, student, task)
    before = weights_digest(teacher.network.state_dict()), weights_digest(student.network.state_dict())
    schedule = Schedule(1, 3, 3, 8, 0.1, 0.9, 1e-4, 0)
    distillation = Distillation(teacher, student, pieces.objective(), pieces.synthesizer(), schedule, task.precision)
    if pieces.streams or pieces.images_per_round:
        batch = distillation.synthesizer.synthesize(student.eval())
    else:
        batch = ImageBatch(torch.rand(8, 3, 16, 16), torch.arange(8))
    assert 0 <= batch.images.min() and batch.images.max() <= 1 and len(batch.images) == len(batch.labels)
    losses = distillation.student_steps(iter([(batch.images, batch.labels)] * 3), 0, progress(3, "", ""))
    assert all(torch.isfinite(value) for value in losses.values())
    assert weights_digest(teacher.network.state_dict()) == before[0]
    assert weights_digest(student.network.state_dict()) != before[1]
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


@pytest.mark.parametrize("point", ["save_tensors:2", "save_checkpoint:1", "save_checkpoint:4", "save_tensors:3"])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(point, distill, tmp_path, monkeypatch, whole):
    """Raises at the n-th write of a shard or a checkpoint, then runs the same command again."""
    if "dda" not in whole:
        distill("dda", tmp_path / "whole")
        whole["dda"] = outcome(tmp_path / "whole")
    name, n = point.split(":")
    module = "engine.data.bank" if name == "save_tensors" else "engine.loops.augment" if n == "1" else "engine.loops.distill"
    original = getattr(sys.modules[module], name)
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == (int(n) if module != "engine.loops.distill" else 2):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{name}", failing)
        with pytest.raises(KeyboardInterrupt):
            distill("dda", tmp_path / "run")
    distill("dda", tmp_path / "run")
    assert outcome(tmp_path / "run") == whole["dda"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_after_its_first_epoch(method, distill, tmp_path, monkeypatch, whole):
    """Stops before the checkpoint of the second epoch, then runs the same command again."""
    if method not in whole:
        distill(method, tmp_path / "whole")
        whole[method] = outcome(tmp_path / "whole")
    import engine.loops.distill as module

    original, calls = module.save_checkpoint, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", failing)
        with pytest.raises(KeyboardInterrupt):
            distill(method, tmp_path / "run")
    distill(method, tmp_path / "run")
    assert outcome(tmp_path / "run") == whole[method]


def test_images_that_stay_in_their_shards_make_the_same_student(distill, tmp_path, monkeypatch, whole):
    """Where no memory is free: bank, kept variants and the images of the rounds alike."""
    if "dda" not in whole:
        distill("dda", tmp_path / "whole")
        whole["dda"] = outcome(tmp_path / "whole")
    monkeypatch.setattr("engine.data.memory.memory_limit", lambda device: 0)
    distill("dda", tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert outcome(tmp_path / "run") == whole["dda"] and "in mapped shards" in log and "peak memory" in log.splitlines()[-1]


def test_several_seeds_in_one_command(distill, tmp_path, capsys):
    """--seeds makes one folder a seed and a table; done ones are skipped, and {seed} stands for the seed in paths."""
    distill("noise", tmp_path / "runs", "--seeds 0,2")
    assert "| noise | digits | resnet8 | resnet8 | none | 0,2 |" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"seed0", "seed2"}
    distill("noise", tmp_path / "runs", "--seeds 0,2,3")
    out = capsys.readouterr().out
    assert out.count("distill: done before, skipped") == 2 and "| 0,2,3 |" in out
    distill("csd", tmp_path / "bank{seed}", "--stages synthesize --seeds 0,1")
    assert "| csd" not in capsys.readouterr().out, "no run is finished, so there is no table"
    distill("csd", tmp_path / "s{seed}", f"--seeds 0,1 --init_bank {tmp_path}/bank{{seed}}")
    digests = [json.loads((tmp_path / f"s{seed}" / "args.json").read_text())["args"]["init_bank"] for seed in (0, 1)]
    assert digests == [f"{tmp_path}/bank0", f"{tmp_path}/bank1"]


def test_the_control_alone_opens_the_train_split(distill, tmp_path, capsys):
    distill("kd", tmp_path / "kd")
    assert "kd opens the training images of digits: a control" in capsys.readouterr().out
    assert json.loads((tmp_path / "kd" / "result.json").read_text())["images"] == 1195
    assert [m for m in METHODS if resolve(registry.METHODS[m]).reads_train_split] == ["kd"]


def test_noise_from_a_folder_of_pictures(distill, tmp_path):
    from PIL import Image

    for k in range(9):
        (tmp_path / "pictures" / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 14), (k * 20, 0, 9)).save(tmp_path / "pictures" / "deep" / f"{k}.png")
    distill("noise", tmp_path / "run", f"--images {tmp_path / 'pictures'}")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["images"] == 9 and result["external_prior"] == "images of pictures"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        distill("noise", tmp_path / "run2", f"--images {tmp_path / 'empty'}")


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "bn" in resolve(registry.METHODS[m]).Config.__dataclass_fields__]
)
def test_a_teacher_without_batch_norm(method, command, tmp_path):
    """One line that names the methods which need no BN statistics; with --bn 0 the method runs."""
    from tests.plain_network import plain

    torch.manual_seed(0)
    torch.save(plain(10).state_dict(), tmp_path / "plain.pth")
    flags = (
        f"--method {method} {TINY_TASK} --teacher tests.plain_network:plain --teacher_ckpt {tmp_path / 'plain.pth'} {TINY[method]} "
        f"--save_dir {tmp_path / 'run'}"
    )
    if "--bn 0" not in TINY[method]:
        with pytest.raises(UserError, match="no BatchNorm layer.*give --bn 0, or a method that works without: .*zskt"):
            command("datafree_kd", f"{flags} --bn 1")
    command("datafree_kd", f"{flags} --bn 0")
    assert (tmp_path / "run" / "result.json").exists()


def test_a_done_run_is_skipped(distill, tmp_path, capsys):
    distill("csd", tmp_path)
    student = (tmp_path / "student.pth").stat().st_mtime_ns
    distill("csd", tmp_path)
    assert "distill: done before, skipped" in capsys.readouterr().out
    assert (tmp_path / "student.pth").stat().st_mtime_ns == student


def test_a_changed_flag_is_named_and_redo_helps(distill, tmp_path):
    distill("csd", tmp_path)
    with pytest.raises(UserError, match="--init_g_steps 2, now 3"):
        distill("csd", tmp_path, "--init_g_steps 3")
    with pytest.raises(UserError, match="--T 20.0, now 4.0"):
        distill("csd", tmp_path, "--T 4")
    shard = (tmp_path / "bank" / "synthesize-000000.safetensors").stat().st_mtime_ns
    distill("csd", tmp_path, "--T 4 --redo distill")
    assert (tmp_path / "bank" / "synthesize-000000.safetensors").stat().st_mtime_ns == shard
    with pytest.raises(UserError, match="--redo nonsense"):
        distill("csd", tmp_path, "--redo nonsense")


def test_omega_can_change_without_generating_again(distill, tmp_path):
    distill("dda", tmp_path / "a")
    variants = tmp_path / "a" / "variants"
    cosine = load_tensors(tmp_path / "a" / "filter_teacher.safetensors")["cosine"]
    made = {f: f.stat().st_mtime_ns for f in variants.glob("augment-*")}
    omega = float(cosine.median())
    distill("dda", tmp_path / "b", f"--omega {omega} --init_bank {tmp_path / 'a'} --init_variants {tmp_path / 'a'}")
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert 0 < result["variants_kept"] < result["variants"] == 24 and result["omega"] == pytest.approx(omega, abs=1e-3)
    assert not load_tensors(tmp_path / "b" / "filter_teacher.safetensors")["keep"].all()
    assert load_tensors(tmp_path / "a" / "filter_teacher.safetensors")["keep"].all(), "another run's mask is its own"
    assert result["seconds"]["augment"] > 0 and not (tmp_path / "b" / "variants").exists()
    assert {f: f.stat().st_mtime_ns for f in variants.glob("augment-*")} == made
    with pytest.raises(UserError, match="keeps none"):
        distill("dda", tmp_path / "c", f"--omega 1.1 --init_bank {tmp_path / 'a'} --init_variants {tmp_path / 'a'}")


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
def test_pretrained_priors_make_the_variants(prior, distill, tmp_path):
    """A whole DDA run with a pipeline saved by save_pretrained, and CLIP for the filter; the table names both."""
    from tests import tiny_pipelines

    builder, extra = PRETRAINED[prior]
    model = getattr(tiny_pipelines, builder)(tmp_path / "tiny-diffusion")
    clip = tiny_pipelines.clip(tmp_path / "tiny-clip")
    kind = prior if prior in ("image_variation", "image_to_image") else "image_to_image"
    distill(
        "dda", tmp_path / "run",
        f"--prior {kind} --diffusion_model {model} --variants 1 --num_inference_steps 2 --embedding clip --embedding_model {clip} {extra}",
    )  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["external_prior"] == "tiny-clip + tiny-diffusion" and result["variants"] == 12
    assert (tmp_path / "run" / "filter_clip-tiny-clip.safetensors").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(distill, tmp_path):
    with pytest.raises(UserError, match="lambdalabs/sd-image-variations-diffusers: .*hf download"):
        distill("dda", tmp_path, "--prior image_variation")


def test_bfloat16_runs(distill, tmp_path):
    distill("dda", tmp_path, "--amp bf16")
    assert (tmp_path / "result.json").exists()


def test_stages_can_be_run_apart(distill, tmp_path, whole):
    with pytest.raises(UserError, match="stage synthesize .* is not begun; run it first"):
        distill("dda", tmp_path, "--stages augment")
    for stage in ("synthesize", "augment", "distill"):
        distill("dda", tmp_path, f"--stages {stage}")
    if "dda" in whole:
        assert outcome(tmp_path) == whole["dda"]
    with pytest.raises(UserError, match="--stages generate: this run has the stages synthesize, augment, distill"):
        distill("dda", tmp_path, "--stages generate")


def test_a_bank_of_another_teacher_is_refused(distill, tmp_path, teacher_file):
    distill("csd", tmp_path / "a", "--stages synthesize")
    other = tmp_path / "other.pth"
    torch.save(build_network("resnet8", 10).state_dict(), other)
    with pytest.raises(UserError, match="was made with the teacher"):
        distill("csd", tmp_path / "b", f"--init_bank {tmp_path / 'a'} --teacher_ckpt {other}")
    with pytest.raises(UserError, match="--teacher_ckpt"):
        distill("csd", tmp_path / "a", f"--teacher_ckpt {other}")
    with pytest.raises(UserError, match="no image bank"):
        distill("csd", tmp_path / "c", f"--init_bank {tmp_path / 'nowhere'}")


def test_an_imported_bank_serves_any_teacher(distill, command, tmp_path):
    distill("csd", tmp_path / "a", "--stages synthesize")
    command("datafree.bank", f"export {tmp_path / 'a' / 'bank'} {tmp_path / 'png'}")
    command("datafree.bank", f"import {tmp_path / 'png'} {tmp_path / 'bank'} --dataset digits")
    distill("csd", tmp_path / "b", f"--init_bank {tmp_path / 'bank'}")
    assert (tmp_path / "b" / "result.json").exists()


def test_nan_stops_the_run_before_anything_is_written(distill, tmp_path, monkeypatch):
    distill("csd", tmp_path / "a", "--stages synthesize")
    with pytest.raises(UserError, match="became nan|became inf"):
        distill("csd", tmp_path / "b", f"--lr 1e30 --init_bank {tmp_path / 'a'}")
    assert not (tmp_path / "b" / "student.pth").exists()


def test_a_data_free_run_cannot_open_the_train_split(distill, tmp_path):
    from engine.data.splits import load_split

    distill("csd", tmp_path, "--stages synthesize")
    with pytest.raises(UserError, match="train"):
        load_split(dataset_info("digits"), "train", CPU)


def test_two_processes_do_not_share_a_folder(distill, tmp_path):
    from engine.runtime.run import Run

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
    "--method csd --amp fp8": "none of no, bf16, fp16",
    "--method dda --embedding nonsense": "none of teacher, clip, dinov2",
    "": "--method",
}


@pytest.mark.parametrize("method", METHODS)
def test_counts_below_one_are_one_line(method, distill, tmp_path):
    """Of student and synthesis steps alike."""
    with pytest.raises(UserError, match="--epochs 0 found, a whole number from 1 on wanted"):
        distill(method, tmp_path, "--epochs 0")
    for name in {"g_steps", "synthesis_batch_size"} & set(
        resolve(registry.METHODS[method]).Config.__dataclass_fields__
    ):
        with pytest.raises(UserError, match=f"--{name} 0 found, a whole number from [12] on wanted"):
            distill(method, tmp_path, f"--{name} 0")


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments, command):
    with pytest.raises(UserError) as caught:
        command("datafree_kd", arguments)
    assert BAD[arguments] in str(caught.value) and "\n" not in str(caught.value)


def test_a_foreign_checkpoint_is_refused(distill, tmp_path):
    torch.save({"state_dict": {"fc.weight": torch.zeros(100, 64)}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="foreign.pth"):
        distill("csd", tmp_path / "run", f"--teacher_ckpt {tmp_path / 'foreign.pth'}")


def test_exit_code_and_one_line_in_a_real_process(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    python = [sys.executable, "datafree_kd.py", "--method", "csd", "--dataset", "nonsense"]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


def test_an_unwritable_save_dir_is_refused(distill, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--save_dir .* cannot be written"):
        distill("csd", tmp_path / "file" / "run")


def test_help_is_quick_and_loads_no_networks():
    code = "import sys; sys.argv=['x','--method','dda','--help']\nimport datafree_kd\ntry: datafree_kd.main()\nexcept SystemExit: pass\nprint('diffusers' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--omega" in done.stdout and "--kd_steps" in done.stdout and done.stdout.endswith("False False\n"), done.stderr
