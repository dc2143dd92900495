"""DiffDFKD: the student's losses and whole runs."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from datafree.activation_maps import MapDistillation
from datafree.diffusion.default_prior import DEFAULT_MODEL, default_prior
from engine.data.crops import mixed
from engine.data.image_bank import ImageBank, Manifest
from engine.loops import fill as fill_module
from engine.loops.stages import first_per_class
from engine.report.images import training_images
from engine.runtime.errors import UserError
from models.classifier import frozen
from tests import tiny_pipelines
from tests.conftest import make_classifier, make_task

# The student's losses


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_batches(kind):
    torch.manual_seed(0)
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(-1, 3, 20, 20)
    out = mixed(images, kind)
    assert out.dtype == torch.uint8 and out.shape == images.shape and not torch.equal(out, images)
    values = [x.unique().tolist() for x in out]
    if kind == "mixup":
        assert all(len(v) == 1 for v in values)
    else:
        assert all(len(v) <= 2 for v in values) and sum(k in v for k, v in enumerate(values)) > 40
        share = (out != images)[:, 0].float().mean()
        assert 0.2 < share < 0.5  # half, minus the parts of boxes beyond the border
    assert mixed(torch.rand(4, 3, 8, 8), kind).dtype == torch.float32


def output(classifier, images):
    return classifier(images, return_features=True)


def test_map_loss_is_zero_for_equal_networks_and_follows_its_formula():
    torch.manual_seed(0)
    teacher = frozen(make_classifier())
    student = make_classifier("wrn16_1")
    images = torch.rand(3, 3, 16, 16)
    same_loss = MapDistillation(30.0, 1.0, teacher, teacher)(*[output(teacher, images)] * 2, None)
    assert float(same_loss["msarc"]) < 1e-6 and float(same_loss["kd"]) < 1e-4
    objective = MapDistillation(30.0, 2.0, teacher, student)
    assert not list(objective.parameters())
    losses = objective(output(teacher, images), output(student, images), None)
    assert torch.allclose(losses["loss"], losses["kd"] + 2 * losses["msarc"]) and losses["msarc"] > 0
    losses["msarc"].backward()
    assert student.network.fc.weight.grad is not None and next(student.parameters()).grad.abs().sum() > 0
    plain = MapDistillation(30.0, 0.0, teacher, student)(output(teacher, images), output(student, images), None)
    assert set(plain) == {"loss", "kd"}


def test_map_loss_of_known_maps():
    objective = MapDistillation(1.0, 1.0, frozen(make_classifier()), make_classifier())
    objective.heads = (None, None)
    up, down = torch.zeros(1, 2, 2, 2), torch.zeros(1, 5, 2, 2)
    up[:, :, 0], down[:, :, 1] = 3, 4
    classes = torch.tensor([0])
    # Two disjoint maps of length 1 have the distance sqrt 2.
    assert float(objective.map_distance({(2, 2): up}, {(2, 2): down}, classes)) == pytest.approx(2.0)
    finer = F.interpolate(up, scale_factor=2)
    assert float(objective.map_distance({(4, 4): finer}, {(2, 2): up}, classes)) == pytest.approx(0.0, abs=1e-6)
    head = torch.nn.Linear(2, 10)
    head.weight.data.zero_()[4] = torch.tensor([1.0, -1.0])
    objective.heads = (head, head)
    one, two = torch.rand(1, 2, 2, 2), torch.rand(1, 2, 2, 2)
    cams = [F.normalize((m[:, 0] - m[:, 1]).flatten(1)) for m in (one, two)]
    expected = float((cams[0] - cams[1]).square().sum())
    found = objective.map_distance({(2, 2): one}, {(2, 2): two}, torch.tensor([4])).detach()
    assert float(found) == pytest.approx(expected, rel=1e-4)


# Whole runs

KINDS = tiny_pipelines.GENERATIVE
# Stage generate alone, with a student of --adv that is trained on the images of earlier rounds.
COMPETING = "--images_per_class 2 --stages generate --adv 1000 --adv_from 1 --adv_steps 10"


def shards(folder):
    return {f.name: f.read_bytes() for f in sorted((folder / "bank").glob("*.safetensors"))}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prior_makes_a_student(kind, generative, distill, tmp_path):
    extra = {"turbo": "--guidance_scale 0", "dit": "--guidance_backprop decoder", "sdxl": "--resolution 16"}.get(kind, "")
    distill("diffdfkd", tmp_path, f"--diffusion_model {generative[kind]} --epochs 1 --bn .1 {extra}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["external_prior"] == kind and result["bank_images"] == 10 and result["seconds"]["generate"] > 0
    columns = ImageBank(tmp_path / "bank", Manifest("digits", 10, 16)).read("generate")
    assert columns["images"].shape == (10, 3, 16, 16) and columns["labels"].bincount().tolist() == [1] * 10
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if line["stage"] == "generate"] == [6, 4]
    assert "teacher_acc1" in lines[0] and "loss_bn" in lines[0] and (tmp_path / "pictures" / "bank.png").exists()


@pytest.mark.parametrize("classes", ["own", "none", None])
def test_an_unguided_prior_of_other_classes_leaves_the_labels_to_the_teacher(classes, distill, tmp_path):
    model = tiny_pipelines.patch_prior(tmp_path / "tiny.safetensors", classes=7)
    flag = f"--prior_classes {classes}" if classes else ""
    distill("diffdfkd", tmp_path / "run", f"--diffusion_model {model} {flag} --oh 0 --bn 0 --epochs 1")
    assert (classes is None) == ("another number of classes" in (tmp_path / "run" / "log.txt").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "teacher_acc1" not in lines[0] and "loss_bn" in lines[0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["external_prior"] == "tiny" and "bank_teacher_acc1" not in result and result["bank_images"] == 10


def test_a_run_stopped_at_a_shard_goes_on_to_the_same_bits(generative, distill, finished, tmp_path, monkeypatch):
    extra = f"--diffusion_model {generative['patch_prior']} {COMPETING}"
    whole = shards(finished("diffdfkd", extra))
    original, calls = fill_module.save_checkpoint, []

    def failing(*args):
        calls.append(1)
        original(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fill_module, "save_checkpoint", failing)
        distill("diffdfkd", tmp_path / "broken", extra)
    assert 0 < len(shards(tmp_path / "broken")) < len(whole) == 4
    distill("diffdfkd", tmp_path / "broken", extra)
    assert shards(tmp_path / "broken") == whole
    distill("diffdfkd", tmp_path / "broken", extra)  # done: skipped
    distill("diffdfkd", tmp_path / "plain", f"{extra} --adv 0")
    assert shards(tmp_path / "plain") != whole


def test_what_the_student_sees_does_not_reach_the_generated_images(generative, distill, finished, tmp_path):
    """--mix is a flag of stage distill. It must not change the training of the --adv student in stage generate."""
    extra = f"--diffusion_model {generative['patch_prior']} {COMPETING}"
    distill("diffdfkd", tmp_path, f"{extra} --mix cutmix")
    assert shards(tmp_path) == shards(finished("diffdfkd", extra))


@pytest.mark.parametrize("change", ["--adv_lr .2", "--adv_T 3", "--adv_batch_size 5"])
def test_the_competitor_s_flags_change_the_images_and_bind_the_bank(change, generative, distill, copied, tmp_path):
    extra = f"--diffusion_model {generative['patch_prior']} {COMPETING}"
    plain = copied("diffdfkd", extra)
    distill("diffdfkd", tmp_path / "changed", f"{extra} {change}")
    assert shards(tmp_path / "changed") != shards(plain)
    with pytest.raises(UserError, match=change.split()[0][2:]):
        distill("diffdfkd", plain, f"{extra} {change}")


def test_published_settings_and_what_the_student_sees(generative, distill, tmp_path):
    """One class per batch and ancestral steps; resized crops and the cap on images per class affect only the student."""
    extra = f"--diffusion_model {generative['patch_prior']} --images_per_class 3 --scheduler ancestral --batch_classes one"
    distill("diffdfkd", tmp_path / "run", f"{extra} --lca_every 0 --epochs 1 --student_crop resized")
    labels = ImageBank(tmp_path / "run" / "bank", Manifest("digits", 10, 16)).read("generate")["labels"]
    assert all(len(set(labels[k : k + 3].tolist())) == 1 for k in range(0, 30, 3))
    flags = f"--init_bank {tmp_path / 'run'} --epochs 1 --student_crop resized --student_images_per_class"
    distill("diffdfkd", tmp_path / "capped", f"{flags} 2")
    result = json.loads((tmp_path / "capped" / "result.json").read_text())
    assert result["bank_images"] == 20 and result["settings"]["student_crop"] == "resized"
    assert len(training_images(tmp_path / "capped")[1]) == 20
    with pytest.raises(UserError, match="--student_images_per_class 0 found, a whole number from 1 on wanted"):
        distill("diffdfkd", tmp_path / "none", f"{flags} 0")


def test_the_first_images_of_each_class():
    labels = torch.tensor([2, 0, 2, 2, 1, 0, 0, 2])
    assert first_per_class(labels, 2).tolist() == [True, True, True, False, True, True, False, False]


def test_an_unguided_bank_serves_another_student(generative, distill, tmp_path):
    """A run with the flags of the unguided baseline and full-size PNG files, then a second run on its bank, other losses."""
    extra = f"--diffusion_model {generative['stable_diffusion']} --oh 0 --bn 0 --adv 0 --lca_every 0 --epochs 1"
    distill("diffdfkd", tmp_path / "a", f"{extra} --stages generate --export_png {tmp_path / 'png'}")
    assert len(list((tmp_path / "png").rglob("*.png"))) == 10
    distill("diffdfkd", tmp_path / "b", f"--init_bank {tmp_path / 'a'} --msarc 1 --mix cutmix --student wrn16_1 --epochs 1")
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert result["external_prior"] == "stable_diffusion" and result["bank_images"] == 10
    assert "msarc" in (tmp_path / "b" / "metrics.jsonl").read_text()


def test_a_changed_flag_is_named_and_memory_flags_may_change(generative, distill, tmp_path):
    extra = f"--diffusion_model {generative['patch_prior']} --stages generate"
    distill("diffdfkd", tmp_path, extra)
    distill("diffdfkd", tmp_path, f"{extra} --guidance_micro_batch 1 --gradient_checkpointing")
    with pytest.raises(UserError, match="oh"):
        distill("diffdfkd", tmp_path, f"{extra} --oh 2")


def test_nan_keeps_what_was_made(generative, distill, tmp_path):
    extra = f"--diffusion_model {generative['patch_prior']} --stages generate --images_per_class 2"
    distill("diffdfkd", tmp_path, extra)
    (tmp_path / "bank" / "generate-000003.safetensors").unlink()
    record = json.loads((tmp_path / "stages.json").read_text())
    record["generate"]["status"] = "incomplete"
    (tmp_path / "stages.json").write_text(json.dumps(record))
    before = shards(tmp_path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datafree.diffusion.priors.PatchPrior.predict", lambda self, z, *rest: z * float("nan"))
        with pytest.raises(UserError, match="latents became NaN .* are kept"):
            distill("diffdfkd", tmp_path, extra)
    assert shards(tmp_path) == before and len(before) == 3


BAD = {
    "--lca_every -1": "--lca_every -1 found, a whole number from 0 on wanted",
    "--images_per_class 0": "--images_per_class 0 found",
    "--scheduler euler": "one of own, ddim",
    "--diffusion_model {dit} --class_map 1,2": "--class_map has 2 ids",
    "--diffusion_model {dit} --class_map 1,2,3,4,5,6,7,8,9,10": "has the class ids 0 to 9, but one of the dataset's 10 classes is mapped to id 10",
    "--diffusion_model {stable_diffusion} --oh 0 --prompt picture": "has a prompt without {label} and --oh is 0",
    "--diffusion_model nobody/nothing": "there is no such directory, and no such model could be downloaded from the hub",
    "--diffusion_model README.md": "--diffusion_model README.md",
    "--diffusion_model {dit} --num_inference_steps 5000": "--num_inference_steps 5000",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments, generative, distill, tmp_path):
    with pytest.raises(UserError) as caught:
        distill("diffdfkd", tmp_path, arguments.format(**generative))
    assert BAD[arguments] in str(caught.value) and "\n" not in str(caught.value)


def test_the_embedded_prior_is_for_the_dataset_that_it_fits(generative, tmp_path):
    def task(classes, size, names):
        return make_task(num_classes=classes, image_size=size, class_names=names)

    digits, embedded = tuple("0123456789"), Path(generative["patch_prior"])
    assert default_prior(task(10, 16, digits), embedded) == str(embedded)
    for other in (task(10, 32, digits), task(10, 16, tuple("abcdefghij")), task(10, 16, None)):
        assert default_prior(other, embedded) == DEFAULT_MODEL
    assert default_prior(task(10, 16, digits), tmp_path / "missing") == DEFAULT_MODEL
