"""Every method on the debug task: finite losses, reproducible and resumable runs, and clear errors."""

import json

import pytest
import torch

import registry
from engine.runtime.errors import UserError, resolve
from engine.runtime.tensors import load_checkpoint, weights_digest
from tests.conftest import CPU, TINY, build_classifier, build_network, dataset_info, load_teacher, make_task, outcome

METHODS = sorted(registry.METHODS)
RESULT_FIELDS = {
    "method", "dataset", "teacher", "student", "seed", "external_prior", "teacher_acc1", "acc1_last", "acc1_best", "acc1_mean",
    "student_steps", "images", "synthesis_seconds", "seconds", "settings", "peak_memory_mib", "versions", "command", "commit",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_student(method, finished, teacher_file):
    folder = finished(method)
    result = json.loads((folder / "result.json").read_text())
    assert RESULT_FIELDS <= set(result) and result["method"] == method
    external = {"kd": "real training images", "one_image": "the image natural_32.png", "diffdfkd": "glyphs_digits_16"}
    assert result["external_prior"] == external.get(method, "none")
    assert result["student_steps"] == 6 and result["images"] > 0
    assert 0 <= result["synthesis_seconds"] < result["seconds"]["distill"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [v for line in lines for v in line.values() if isinstance(v, float)]
    assert numbers and all(v == v and abs(v) < 1e6 for v in numbers)
    assert result["teacher_digest"] == weights_digest(load_checkpoint(teacher_file)["state_dict"])
    picture = "bank" if method == "diffdfkd" else "images"
    for name in ("args.json", "log.txt", "stages.json", "student.pth", f"pictures/{picture}.png"):
        assert (folder / name).exists(), name


@pytest.mark.parametrize("method", METHODS)
def test_another_seed_makes_another_student(method, distill, tmp_path, finished):
    distill(method, tmp_path, "--seed 1")
    assert outcome(tmp_path)[1] != outcome(finished(method))[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_student_changes_and_the_teacher_does_not(method, teacher_file):
    """Does one round and three student steps with the same objects as a run."""
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


@pytest.mark.parametrize(
    "place, call",
    [("data.image_bank.save_tensors", 2), ("data.image_bank.save_tensors", 3), ("loops.makers.save_checkpoint", 1)],
)
def test_stopped_anywhere_it_goes_on_to_the_same_bits(place, call, distill, tmp_path, interrupted, finished):
    """Stops at the n-th write of a shard or a checkpoint, then runs the same command again."""
    with interrupted(f"engine.{place}", call):
        distill("dda", tmp_path)
    distill("dda", tmp_path)
    assert outcome(tmp_path) == outcome(finished("dda"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_after_its_first_epoch(method, distill, tmp_path, interrupted, finished):
    """Stops before the checkpoint of the second epoch, then runs the same command again; the result is bit-equal."""
    with interrupted("engine.loops.distill.save_checkpoint", 2):
        distill(method, tmp_path)
    distill(method, tmp_path)
    assert outcome(tmp_path) == outcome(finished(method))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_one_graph_a_step(method, distill, common, monkeypatch, tmp_path):
    """torch.compile must trace one whole graph, without generating code, and the losses must equal the uncompiled run's.

    Networks have three layers, because tracing time grows with the layers. Residual networks are traced in other tests.
    """
    spec, compile = "tests.plain_network:plain(batch_norm=True)", torch.compile

    def save(file):
        torch.manual_seed(0)
        torch.save(build_network(spec, 10).state_dict(), file)

    flags = f"--teacher {spec} --student {spec} --teacher_ckpt {common('three_layers.pth', save)} --epochs 1"
    distill(method, tmp_path / "plain", flags)

    def whole_graph(function, dynamic, options):
        return compile(function, dynamic=dynamic, fullgraph=True, backend="eager")

    monkeypatch.setattr("torch.compile", whole_graph)
    torch._dynamo.reset()
    distill(method, tmp_path / "compiled", f"{flags} --compile yes")
    plain, compiled = (tmp_path / name for name in ("plain", "compiled"))
    log = (compiled / "log.txt").read_text()
    assert "compile: the student step" in log and "uncompiled" not in log, log
    assert "compile" not in (plain / "log.txt").read_text()
    # Only synthesis of the first round: training on eight images a step soon amplifies rounding errors by thousands.
    expected, found = (json.loads((path / "metrics.jsonl").read_text().splitlines()[0]) for path in (plain, compiled))
    for name in [name for name in expected if name.startswith("loss_")]:
        assert found[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-4), name


def test_images_that_stay_in_their_shards_make_the_same_student(distill, tmp_path, monkeypatch, finished):
    """Without free memory, the bank, the kept variants and the images of the rounds stay in their shards."""
    expected = outcome(finished("dda"))
    monkeypatch.setattr("engine.data.image_bank.memory_limit", lambda device: 0)
    distill("dda", tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert outcome(tmp_path) == expected and "MB, memory-mapped" in log and "peak memory" in log.splitlines()[-1]


@pytest.mark.parametrize("method", [m for m in METHODS if "bn" in resolve(registry.METHODS[m]).Config.__dataclass_fields__])
def test_a_teacher_without_batch_norm(method, distill, tmp_path):
    """The error is one line and names methods without BN statistics; with --bn 0 the method runs."""
    from tests.plain_network import plain

    torch.manual_seed(0)
    torch.save(plain(10).state_dict(), tmp_path / "plain.pth")
    flags = f"--teacher tests.plain_network:plain --teacher_ckpt {tmp_path / 'plain.pth'} --epochs 1"
    with pytest.raises(UserError, match="no BatchNorm layer.*give --bn 0, or a method that works without: .*zskt"):
        distill(method, tmp_path / "run", f"{flags} --bn 1")
    distill(method, tmp_path / "run", f"{flags} --bn 0")
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_counts_below_one_are_one_line(method, distill, tmp_path):
    """Zero epochs, synthesis steps or images are refused."""
    with pytest.raises(UserError, match="--epochs 0 found, a whole number from 1 on wanted"):
        distill(method, tmp_path, "--epochs 0")
    for name in {"g_steps", "synthesis_batch_size"} & set(resolve(registry.METHODS[method]).Config.__dataclass_fields__):
        with pytest.raises(UserError, match=f"--{name} 0 found, a whole number from [12] (on|to \\d+) wanted"):
            distill(method, tmp_path, f"--{name} 0")
