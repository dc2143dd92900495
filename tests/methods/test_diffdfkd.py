"""DiffDFKD: stage generate by one process and by several, stopped and resumed; the student's losses; whole runs."""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from datafree.base import ImageBatch
from datafree.diffdfkd import DEFAULT_MODEL, MapDistillation, default_model, mixed
from engine.data.bank import ImageBank, Manifest
from engine.loops import fill as fill_module
from engine.loops.fill import fill
from engine.loops.generate import GuidedMaker, Order
from engine.loops.stages import first_of_each
from engine.runtime.errors import UserError
from engine.runtime.processes import Processes
from engine.runtime.run import Run
from engine.runtime.stage_record import StageRecord
from models.classifier import frozen
from tests import tiny_pipelines
from tests.conftest import ROOT, TINY, TINY_TASK, make_classifier, make_task

ORDER = Order(images=46, num_classes=10, round_size=16, batch_size=5, seed=3)


# The stage, with a generator that costs nothing


class Scribbler:
    """Noise by the seed and the batch, moved by what was learned: everything that an image may depend on."""

    made = 0

    def __init__(self, learns_from=1000, stop_after=None):
        self.learns_from, self.stop_after, self.level = learns_from, stop_after, torch.zeros(())
        self.competes = learns_from < 1000

    def draw(self, labels, seeds, repeats):
        if self.stop_after is not None and Scribbler.made >= self.stop_after:
            raise KeyboardInterrupt
        Scribbler.made += 1
        noise = torch.stack([torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
        images = (noise + noise.mean() + self.level + sum(repeats) / 100).clamp(0, 1)
        batch = ImageBatch(images, labels)
        batch.full = F.interpolate(images, scale_factor=2)
        return batch

    def measure(self, images, labels):
        return {"teacher_acc1": 50.0, "loss_bn": float(images.float().mean())}

    def wants_to_learn(self, images):
        return images >= self.learns_from

    def fit(self, images, labels):
        self.level = self.level / 2 + images[:].float().mean() / 1000 + torch.rand(()) / 10
        return {"level": self.level}

    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state):
        self.level = state["level"]


def open_run(path):
    run = Run(path, {})
    return run, StageRecord(path / "stages.json", {"generate": {}}), ImageBank(path / "bank", Manifest("d", 10, 8))


def filled(path, order=ORDER, processes=Processes(), **settings):
    run, stages, bank = open_run(path)
    try:
        fill(run, stages, bank, "generate", order.rounds, lambda: GuidedMaker(Scribbler(**settings), order), processes)
    finally:
        run.close()
    return bank.read("generate")


def same(one, other):
    return torch.equal(one["images"][:], other["images"][:]) and torch.equal(one["labels"], other["labels"])


class Thread(Processes):
    """A process that is a thread, with a queue to the main one and one from it."""

    def __init__(self, rank, queues):
        super().__init__(rank, len(queues))
        object.__setattr__(self, "queues", queues)

    def gather(self, value):
        if not self.main:
            self.queues[self.rank][0].put(value)
            return []
        return [value, *(to_main.get() for to_main, _ in self.queues[1:])]

    def broadcast(self, value=None):
        if not self.main:
            return self.queues[self.rank][1].get()
        for _, from_main in self.queues[1:]:
            from_main.put(value)
        return value


def test_classes_are_balanced_in_every_order():
    labels = torch.cat([ORDER.labels(ORDER.positions(r)) for r in range(ORDER.rounds)])
    assert ORDER.rounds == 3 and len(labels) == 46
    assert all(sorted(labels[k : k + 10].tolist()) == list(range(10)) for k in range(0, 40, 10))
    assert len({tuple(labels[k : k + 10].tolist()) for k in range(0, 40, 10)}) > 1
    assert [len(b) for b in ORDER.batches(0)] == [5, 5, 5, 1] and [len(b) for b in ORDER.batches(2)] == [5, 5, 4]


@pytest.mark.parametrize("images, round_size, batch_size", [(60, 16, 4), (200, 32, 16), (50, 200, 16), (30, 7, 1)])
def test_one_class_a_batch(images, round_size, batch_size):
    """Every class equally often; a class's images are counted on; rounds and the last cycle cut batches short."""
    order = Order(images, 10, round_size, batch_size, seed=3, one_class=True)
    batches = [batch for round in range(order.rounds) for batch in order.batches(round)]
    assert [p for batch in batches for p in batch] == list(range(images)) and max(map(len, batches)) <= batch_size
    labels = [order.labels(batch).tolist() for batch in batches]
    assert all(len(set(batch)) == 1 for batch in labels)
    seen = dict.fromkeys(range(10), 0)
    for batch, classes in zip(batches, labels):
        assert order.repeats(batch) == list(range(seen[classes[0]], seen[classes[0]] + len(batch)))
        seen[classes[0]] += len(batch)
    assert set(seen.values()) == {images // 10}


def test_a_stopped_stage_of_one_class_a_batch_makes_the_same_bank(tmp_path):
    order = Order(60, 10, 16, 4, 3, one_class=True)
    whole = filled(tmp_path / "whole", order)
    Scribbler.made = 0
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "stopped", order, stop_after=6)
    assert same(filled(tmp_path / "stopped", order), whole) and whole["labels"].bincount().tolist() == [6] * 10


@pytest.mark.parametrize("learns_from", [1000, 16])
def test_a_stopped_stage_makes_the_same_bank(tmp_path, learns_from):
    whole = filled(tmp_path / "whole", learns_from=learns_from)
    assert torch.bincount(whole["labels"]).min() >= 4 and whole["images"].dtype == torch.uint8
    for stop in (2, 5, 9):  # within each of the rounds
        Scribbler.made = 0
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path / f"{stop}", learns_from=learns_from, stop_after=stop)
        assert same(filled(tmp_path / f"{stop}", learns_from=learns_from), whole)
        lines = Run(tmp_path / f"{stop}", {}).history("generate")
        assert [line["round"] for line in lines] == [0, 1, 2] and sum(line["images"] for line in lines) == 46


@pytest.mark.parametrize("count, learns_from", [(2, 1000), (3, 16)])
def test_several_processes_make_the_bank_of_one(tmp_path, count, learns_from):
    whole = filled(tmp_path / "one", learns_from=learns_from)
    queues = [(queue.Queue(), queue.Queue()) for _ in range(count)]
    others = [
        threading.Thread(
            target=fill,
            args=(None, None, None, "generate", ORDER.rounds, lambda: GuidedMaker(Scribbler(learns_from), ORDER), Thread(rank, queues)),
        )
        for rank in range(1, count)
    ]
    for thread in others:
        thread.start()
    shared = filled(tmp_path / "shared", processes=Thread(0, queues), learns_from=learns_from)
    for thread in others:
        thread.join(20)
    assert same(shared, whole) and not any(thread.is_alive() for thread in others)


def test_a_lost_shard_is_named(tmp_path):
    filled(tmp_path, learns_from=16)
    (tmp_path / "bank" / "generate-000000.safetensors").unlink()
    with pytest.raises(UserError, match="misses round 0 of 3; .* --redo generate"):
        filled(tmp_path, learns_from=16)


def test_full_size_files_are_whole_and_apart_from_the_bank(tmp_path):
    from PIL import Image

    order = Order(12, 10, 16, 5, 0, export=tmp_path / "png")
    bank = filled(tmp_path / "run", order)
    files = sorted((tmp_path / "png").rglob("*.png"), key=lambda f: f.name)
    assert [f.stem for f in files] == [f"{p:07d}" for p in range(12)]
    assert [int(f.parent.name) for f in files] == bank["labels"].tolist()
    assert Image.open(files[0]).size == (16, 16) and bank["images"].shape == (12, 3, 8, 8)


# The student's side


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
        assert 0.2 < share < 0.5  # half, less what the border cuts off
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
    # disjoint maps of length 1 are sqrt 2 apart
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


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny_pipelines.generative(tmp_path_factory.mktemp("priors"))


def shards(folder):
    return {f.name: f.read_bytes() for f in sorted((folder / "bank").glob("*.safetensors"))}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prior_makes_a_student(kind, paths, distill, tmp_path):
    extra = {"turbo": "--guidance_scale 0", "dit": "--guidance_backprop decoder", "sdxl": "--resolution 16"}.get(kind, "")
    distill("diffdfkd", tmp_path, f"--diffusion_model {paths[kind]} --epochs 1 --bn .1 {extra}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["external_prior"] == kind and result["bank_images"] == 10 and result["seconds"]["generate"] > 0
    columns = ImageBank(tmp_path / "bank", Manifest("digits", 10, 16)).read("generate")
    assert columns["images"].shape == (10, 3, 16, 16) and columns["labels"].bincount().tolist() == [1] * 10
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if line["stage"] == "generate"] == [6, 4]
    assert "teacher_acc1" in lines[0] and "loss_bn" in lines[0] and (tmp_path / "pictures" / "bank.png").exists()


def test_a_run_stopped_at_a_shard_goes_on_to_the_same_bits(paths, distill, tmp_path, monkeypatch):
    extra = f"--diffusion_model {paths['patch_prior']} --images_per_class 2 --stages generate --adv_from 1 --adv_steps 10"
    plain, extra = extra, f"{extra} --adv 1000"
    distill("diffdfkd", tmp_path / "whole", extra)
    original, calls = fill_module.save_checkpoint, []

    def failing(*args):
        calls.append(1)
        original(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fill_module, "save_checkpoint", failing)
        distill("diffdfkd", tmp_path / "broken", extra)
    assert 0 < len(shards(tmp_path / "broken")) < len(shards(tmp_path / "whole")) == 4
    distill("diffdfkd", tmp_path / "broken", extra)
    assert shards(tmp_path / "broken") == shards(tmp_path / "whole")
    distill("diffdfkd", tmp_path / "broken", extra)  # done: skipped
    distill("diffdfkd", tmp_path / "plain", plain)
    assert shards(tmp_path / "plain") != shards(tmp_path / "whole")


def test_what_the_student_sees_does_not_reach_the_generated_images(paths, distill, tmp_path):
    """Its mixing is a flag of stage distill: the student that competes while images are drawn must not feel it."""
    extra = f"--diffusion_model {paths['patch_prior']} --images_per_class 2 --stages generate"
    extra += " --adv 1000 --adv_from 1 --adv_steps 10"
    distill("diffdfkd", tmp_path / "plain", extra)
    distill("diffdfkd", tmp_path / "mixed", f"{extra} --mix cutmix")
    assert shards(tmp_path / "mixed") == shards(tmp_path / "plain") and len(shards(tmp_path / "plain")) == 4


@pytest.mark.parametrize("change", ["--adv_lr .2", "--adv_T 3", "--adv_batch_size 5"])
def test_the_competitor_s_flags_change_the_images_and_bind_the_bank(change, paths, distill, tmp_path):
    extra = f"--diffusion_model {paths['patch_prior']} --images_per_class 2 --stages generate"
    extra += " --adv 1000 --adv_from 1 --adv_steps 10"
    distill("diffdfkd", tmp_path / "plain", extra)
    distill("diffdfkd", tmp_path / "changed", f"{extra} {change}")
    assert shards(tmp_path / "changed") != shards(tmp_path / "plain")
    with pytest.raises(UserError, match=change.split()[0][2:]):
        distill("diffdfkd", tmp_path / "plain", f"{extra} {change}")


def test_published_settings_and_what_the_student_sees(paths, distill, tmp_path):
    """One class a batch, ancestral steps; resized crops and a cap on each class's images are the student's alone."""
    extra = f"--diffusion_model {paths['patch_prior']} --images_per_class 3 --scheduler ancestral --batch_classes one"
    distill("diffdfkd", tmp_path / "run", f"{extra} --lca_every 0 --epochs 1 --student_crop resized")
    labels = ImageBank(tmp_path / "run" / "bank", Manifest("digits", 10, 16)).read("generate")["labels"]
    assert all(len(set(labels[k : k + 3].tolist())) == 1 for k in range(0, 30, 3))
    flags = f"--init_bank {tmp_path / 'run'} --epochs 1 --student_crop resized --student_images_per_class"
    distill("diffdfkd", tmp_path / "capped", f"{flags} 2")
    result = json.loads((tmp_path / "capped" / "result.json").read_text())
    assert result["bank_images"] == 20 and result["settings"]["student_crop"] == "resized"
    with pytest.raises(UserError, match="--student_images_per_class 0 found, a whole number from 1 on wanted"):
        distill("diffdfkd", tmp_path / "none", f"{flags} 0")


def test_the_first_images_of_each_class():
    labels = torch.tensor([2, 0, 2, 2, 1, 0, 0, 2])
    assert first_of_each(labels, 2).tolist() == [True, True, True, False, True, True, False, False]


def test_two_real_processes_make_the_bank_of_one(paths, distill, teacher_file, tmp_path):
    extra = f"--diffusion_model {paths['patch_prior']} --images_per_class 2 --epochs 1"
    extra += " --adv 1000 --adv_from 1 --adv_steps 10"
    distill("diffdfkd", tmp_path / "one", extra)
    flags = f"{TINY_TASK} --teacher_ckpt {teacher_file} {TINY['diffdfkd']} --save_dir {tmp_path / 'two'} {extra}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "datafree_kd.py", "--method", "diffdfkd", *flags.split()],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "two") == shards(tmp_path / "one") and len(shards(tmp_path / "two")) == 4
    assert json.loads((tmp_path / "two" / "result.json").read_text())["bank_images"] == 20


def test_an_unguided_bank_serves_another_student(paths, distill, tmp_path):
    """The baseline's flags, full-size files, and a second run on the bank with the other losses."""
    extra = f"--diffusion_model {paths['stable_diffusion']} --oh 0 --bn 0 --adv 0 --lca_every 0 --epochs 1"
    distill("diffdfkd", tmp_path / "a", f"{extra} --stages generate --export_png {tmp_path / 'png'}")
    assert len(list((tmp_path / "png").rglob("*.png"))) == 10
    distill("diffdfkd", tmp_path / "b", f"--init_bank {tmp_path / 'a'} --msarc 1 --mix cutmix --student wrn16_1 --epochs 1")
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert result["external_prior"] == "stable_diffusion" and result["bank_images"] == 10
    assert "msarc" in (tmp_path / "b" / "metrics.jsonl").read_text()


def test_a_changed_flag_is_named_and_memory_flags_may_change(paths, distill, tmp_path):
    extra = f"--diffusion_model {paths['patch_prior']} --stages generate"
    distill("diffdfkd", tmp_path, extra)
    distill("diffdfkd", tmp_path, f"{extra} --guidance_micro_batch 1 --gradient_checkpointing")
    with pytest.raises(UserError, match="oh"):
        distill("diffdfkd", tmp_path, f"{extra} --oh 2")


def test_nan_keeps_what_was_made(paths, distill, tmp_path):
    extra = f"--diffusion_model {paths['patch_prior']} --stages generate --images_per_class 2"
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
    "--scheduler euler": "none of own, ddim",
    "--diffusion_model {dit} --class_map 1,2": "--class_map has 2 ids",
    "--diffusion_model {dit} --class_map 1,2,3,4,5,6,7,8,9,10": "knows 10 classes, id 10",
    "--diffusion_model {stable_diffusion} --oh 0 --prompt picture": "does not name the class and --oh is 0",
    "--diffusion_model nobody/nothing": "neither a directory here nor a model that could be had from the hub",
    "--diffusion_model README.md": "--diffusion_model README.md",
    "--diffusion_model {dit} --num_inference_steps 5000": "--num_inference_steps 5000",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments, paths, distill, tmp_path):
    with pytest.raises(UserError) as caught:
        distill("diffdfkd", tmp_path, arguments.format(**paths))
    assert BAD[arguments] in str(caught.value) and "\n" not in str(caught.value)


def test_the_embedded_prior_is_for_the_dataset_that_it_fits(paths, tmp_path):
    def task(classes, size, names):
        return make_task(num_classes=classes, image_size=size, class_names=names)

    digits, embedded = tuple("0123456789"), Path(paths["patch_prior"])
    assert default_model(task(10, 16, digits), embedded) == str(embedded)
    for other in (task(10, 32, digits), task(10, 16, tuple("abcdefghij")), task(10, 16, None)):
        assert default_model(other, embedded) == DEFAULT_MODEL
    assert default_model(task(10, 16, digits), tmp_path / "missing") == DEFAULT_MODEL
