"""Stage generate by one process and by several, stopped and resumed, with a trivial sampler."""

import queue
import threading

import pytest
import torch
from torch.nn import functional as F

from datafree.base import ImageBatch
from engine.data.image_bank import ImageBank, Manifest
from engine.loops.fill import fill
from engine.loops.makers import GuidedMaker, Order
from engine.runtime.errors import UserError
from engine.runtime.processes import Processes
from engine.runtime.run import Run
from engine.runtime.stage_record import StageRecord

ORDER = Order(images=46, num_classes=10, round_size=16, batch_size=5, seed=3)


class Scribbler:
    """A sampler whose images depend on all that real ones may depend on: seeds, the batch, repeats and learned state."""

    made = 0

    def __init__(self, learns_from=1000, stop_after=None):
        self.learns_from, self.stop_after, self.level = learns_from, stop_after, torch.zeros(())
        self.trains_student = learns_from < 1000

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

    def student_is_due(self, images):
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
    """A thread that acts as one of several processes, with a queue to the main process and one from it."""

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
    """Classes are equally frequent, the count of a class goes on over batches, and rounds may shorten a batch."""
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
    for stop in (2, 5, 9):  # one stop within each round
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
            args=(
                None,
                None,
                None,
                "generate",
                ORDER.rounds,
                lambda: GuidedMaker(Scribbler(learns_from), ORDER),
                Thread(rank, queues),
            ),
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
    with pytest.raises(UserError, match="lacks the shard of round 0, although 3 rounds were made; .* --redo generate"):
        filled(tmp_path, learns_from=16)


def test_full_size_files_are_whole_and_apart_from_the_bank(tmp_path):
    from PIL import Image

    order = Order(12, 10, 16, 5, 0, export=tmp_path / "png")
    bank = filled(tmp_path / "run", order)
    files = sorted((tmp_path / "png").rglob("*.png"), key=lambda f: f.name)
    assert [f.stem for f in files] == [f"{p:07d}" for p in range(12)]
    assert [int(f.parent.name) for f in files] == bank["labels"].tolist()
    assert Image.open(files[0]).size == (16, 16) and bank["images"].shape == (12, 3, 8, 8)
