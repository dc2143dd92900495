"""Runs shared by several processes. Two processes over gloo, started once, do all the runs that the tests compare."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from engine.loops import distill as stage
from engine.runtime.errors import UserError
from engine.runtime.processes import Processes, join_processes
from engine.runtime.tensors import load_checkpoint
from tests.conftest import CPU, ROOT, TINY, TINY_TASK, dataset_info, make_classifier, make_task

TIMEOUT = 300  # seconds for all runs of the two processes
ROUNDS = "--init_rounds 3"  # odd, so that one process has nothing to do in the last round
GUIDED = "--images_per_class 2 --epochs 1 --adv 1000 --adv_from 1 --adv_steps 10"  # with a student that competes
CACHING = "--epochs 2 --kd_steps 20 --ep_steps 20"


class Stopped(Exception):
    """Ends a run in place of a kill."""


def run(method, folder, teacher, extra="", stop=False):
    """Does a run in this process; returns its Distillation, with the student's last batch of images as ``batch``.

    ``stop``: end the run before the second epoch.
    """
    import datafree_kd

    flags = f"--method {method} {TINY_TASK} --teacher_ckpt {teacher} {TINY[method]} --save_dir {folder} {extra}"
    made, distill, epoch = [], stage.distill, stage.distill_epoch

    def recorded(*args, **kwargs):
        synthesizer = args[2].synthesizer
        after_step = synthesizer.after_step

        def looking(student, images, labels):
            args[2].batch = images.clone()
            after_step(student, images, labels)

        made.append(args[2])
        with mock.patch.object(synthesizer, "after_step", looking):
            return distill(*args, **kwargs)

    def stopping(distillation, number, *args):
        if stop and number == 1:
            raise Stopped
        return epoch(distillation, number, *args)

    with (
        mock.patch("sys.argv", ["datafree_kd.py", *flags.split()]),
        mock.patch("engine.data.splits._train_split_forbidden", False),
        mock.patch.object(stage, "distill", recorded),
        mock.patch.object(stage, "distill_epoch", stopping),
    ):
        try:
            datafree_kd.main()
        except Stopped:
            assert stop
    return made[0]


def plain_step():
    """The step of a student without BatchNorm, a teacher, and a batch with labels, the same in every process."""
    from datafree.losses import KLDistillation
    from tests.plain_network import plain

    torch.manual_seed(0)
    student = make_classifier(plain(10), mean=0.5, std=0.5)
    teacher = make_classifier(plain(10), mean=0.5, std=0.5)
    return stage.StudentStep(student, KLDistillation(4.0)), teacher, torch.rand(8, 3, 16, 16), torch.arange(8)


def gradients(step, teacher, images, labels):
    with torch.no_grad():
        teacher_out = teacher(images, return_features=True)
    step(images, labels, teacher_out)["loss"].backward()
    return [p.grad for p in step.parameters()]


def trained_head(average_gradients, share):
    """CSD's rotation head after two student steps on a share of each batch."""
    from datafree.csd import CSDConfig, CSDSynthesizer

    student = plain_step()[0].student
    task = make_task(average_gradients=average_gradients)
    config = CSDConfig(nz=8, bn=0.0)
    maker = CSDSynthesizer(config, None, task, feature_dim=student.feature_dim, g_steps=1, images=6, csd=10.0)
    for images in torch.rand(2, 8, 3, 16, 16):
        maker.after_step(student, images[share], torch.arange(8)[share])
    return [p.detach() for p in maker.head.parameters()]


def work(rank, port, folder, teacher):
    """Does the work of one of the two processes and saves its results."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    processes = join_processes()
    step, plain_teacher, images, labels = plain_step()
    share = slice(rank, None, 2)
    seen = {
        "gradients": gradients(processes.parallel(step), plain_teacher, images[share], labels[share]),
        "head": trained_head(processes.average_gradients, share),
        "mean": processes.mean({"a": torch.tensor(float(rank)), "b": torch.tensor(2.0)}),
        "tensor": processes.broadcast_tensor(torch.arange(5) if rank == 0 else None, torch.device("cpu")),
    }
    done = {
        "dda": run("dda", folder / "dda", teacher, ROUNDS),
        "diffdfkd": run("diffdfkd", folder / "diffdfkd", teacher, GUIDED),
        "zskt": run("zskt", folder / "zskt", teacher),
        "broken": run("zskt", folder / "broken", teacher, stop=True),
        "again": run("zskt", folder / "broken", teacher),
        "fewer": run("csd", folder / "fewer", teacher, stop=True),
        "more": run("csd", folder / "more", teacher),
        "uncached": run("fast", folder / "uncached", teacher, f"{CACHING} --logit_cache no"),
        "cached": run("fast", folder / "cached", teacher, f"{CACHING} --logit_cache 1"),
    }
    for name, distillation in done.items():
        seen[name] = [p.detach() for p in distillation.step.parameters()]
        seen[name + " batch"] = distillation.batch
        if (shared := distillation.synthesizer.shared) is not None:
            seen[name + " shared"] = [p.detach() for p in shared.parameters()]
    torch.save(seen, folder / f"seen{rank}.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher_file):
    """Folder of runs by one process (``one``; half of ``more``), then by two (``work``), then by one again (``fewer``)."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run("dda", folder / "one", teacher_file, ROUNDS)
    run("diffdfkd", folder / "guided", teacher_file, GUIDED)
    run("csd", folder / "more", teacher_file, stop=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    started = [context.Process(target=work, args=(rank, port, folder, teacher_file)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0, 0]
    run("csd", folder / "fewer", teacher_file)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return [load_checkpoint(folder / f"seen{rank}.pth") for rank in range(2)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def result(path: Path):
    return json.loads((path / "result.json").read_text())


def shards(path: Path, pattern: str):
    return {f.name: f.read_bytes() for f in sorted(path.glob(pattern))}


def test_two_processes_make_the_images_of_one(folder):
    """Compares the initial bank, and the variants by the diffusion prior that is trained on it."""
    for pattern, count in (("bank/synthesize-*", 3), ("variants/augment-*", 1)):
        assert shards(folder / "dda", pattern) == shards(folder / "one", pattern)
        assert len(shards(folder / "dda", pattern)) == count


def test_two_processes_draw_the_images_of_one(folder):
    """Images are guided by a student that is trained on the images of earlier rounds."""
    found = shards(folder / "diffdfkd", "bank/*.safetensors")
    assert found == shards(folder / "guided", "bank/*.safetensors") and len(found) == 4
    assert result(folder / "diffdfkd")["bank_images"] == 20


def test_one_result_with_the_counts_of_one_process(folder):
    one, two = result(folder / "one"), result(folder / "dda")
    names = [name for name in one if "images" in name or "variants" in name or name in ("student_steps", "omega")]
    assert {n: one[n] for n in names} == {n: two[n] for n in names}
    assert (one["processes"], two["processes"]) == (1, 2)
    lines = [json.loads(line) for line in (folder / "dda" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["stage"] == "distill"] == [0, 1]
    assert all(v == v and abs(v) < 1e6 for line in lines for v in line.values() if isinstance(v, float))
    texts = [re.sub(r"^\S+ \S+ ", "", line) for line in (folder / "dda" / "log.txt").read_text().splitlines()]
    assert len(texts) == len(set(texts)) and sum("distill: acc1" in text for text in texts) == 1


@pytest.mark.parametrize("method", ["zskt", "dda", "fewer", "more"])
def test_the_processes_train_one_student(method, seen):
    """The processes also end with the same rotation head or generator."""
    for name in (method, f"{method} shared"):
        assert same(seen[0][name], seen[1][name]) and all(p.isfinite().all() for p in seen[0][name])


def test_answers_that_are_kept_are_shared(seen, folder):
    """Each process computes half of the new teacher logits, and the student equals that of a run without a cache."""
    for found in seen:
        assert same(found["cached"], found["uncached"])
    assert "came from the cache" in (folder / "cached" / "log.txt").read_text()


@pytest.mark.parametrize("method", ["zskt", "dda"])
def test_no_image_is_seen_twice(method, seen):
    """Processes make new images from different random streams, and share the images of a bank."""
    batch = torch.cat([found[f"{method} batch"] for found in seen])
    assert len(batch) == 8 and len(batch.flatten(1).unique(dim=0)) == 8


def test_two_processes_go_on_to_the_same_bits(folder, seen):
    assert same(seen[0]["again"], seen[0]["zskt"]) and same(seen[0]["again shared"], seen[0]["zskt shared"])
    assert not same(seen[0]["broken"], seen[0]["zskt"])
    lines = [(folder / name / "metrics.jsonl").read_text() for name in ("zskt", "broken")]
    assert lines[0] == lines[1]


def test_gradients_are_those_of_the_whole_batch(seen):
    expected = gradients(*plain_step())
    assert all(g.abs().max() > 0 for g in expected)
    for found in (seen[0]["gradients"], seen[1]["gradients"]):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_the_rotation_head_learns_from_the_whole_batch(seen):
    expected = trained_head(lambda parameters: None, slice(None))
    half = trained_head(lambda parameters: None, slice(0, None, 2))
    for found in (seen[0]["head"], seen[1]["head"]):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert not any(torch.allclose(a, b, atol=1e-5) for a, b in zip(half, expected))


def test_what_travels(seen):
    for found in seen:
        assert {name: float(v) for name, v in found["mean"].items()} == {"a": 0.5, "b": 2.0}
        assert found["tensor"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["fewer", "more"])
def test_another_number_of_processes_goes_on(name, folder):
    found = result(folder / name)
    assert found["processes"] == {"fewer": 1, "more": 2}[name] and found["student_steps"] == 6
    assert found["bank_images"] == 24 and len(shards(folder / name, "bank/*.safetensors")) == 4
    assert "resumed after round 1 of 2" in (folder / name / "log.txt").read_text()
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["round"]) for line in lines] == [
        ("synthesize", 0),
        ("synthesize", 1),
        ("distill", 0),
        ("distill", 1),
    ]


def test_shares_are_a_whole_batch():
    """Shares of a bank and of the training images make up a whole batch; shares of new images have the right size."""
    from datafree.kd import RealImages
    from datafree.noise import NoiseImages
    from engine.data.splits import load_split
    from engine.data.transfer_set import TransferSet

    transfer = TransferSet(20, 4, CPU)
    transfer.add(torch.zeros(20, 3, 4, 4, dtype=torch.uint8), torch.arange(20))
    split = load_split(dataset_info("digits"), "test", CPU)
    task = make_task(training_split=lambda: split)
    real = RealImages(task)
    for batches in (lambda **share: transfer.batches(12, lambda x: x, **share), lambda **share: real.batches(12, **share)):
        whole, *parts = (batches(seed=5, **share) for share in ({}, {"rank": 0, "count": 2}, {"rank": 1, "count": 2}))
        for _ in range(3):
            labels, (first, second) = next(whole)[1], (next(part)[1] for part in parts)
            assert torch.equal(torch.stack([first, second], 1).flatten(), labels)
    assert len(next(NoiseImages(task, "uniform").batches(12, seed=0, rank=1, count=3))[0]) == 4


def test_a_batch_that_cannot_be_shared_ends_all_with_one_line(teacher_file, tmp_path):
    with pytest.raises(UserError, match="--batch_size 7 .* multiple of 2, for example 8"):
        Processes(0, 2).check_divides(7)
    flags = f"{TINY_TASK} --teacher_ckpt {teacher_file} {TINY['csd']} --save_dir {tmp_path / 'run'} --batch_size 7"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "datafree_kd.py", "--method", "csd", *flags.split()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0 and re.search(r"exitcode +: 2 ", done.stderr), done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: --batch_size 7 cannot be divided equally among 2 processes; give a multiple of 2, for example 8"
    ]
    assert not (tmp_path / "run").exists()
