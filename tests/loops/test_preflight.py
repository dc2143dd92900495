"""Messages of a run before and after its first steps: a suspicious teacher, long runs on a CPU, the time left."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import registry
from datafree_kd import parse
from engine.data.image_bank import ImageBank, Manifest
from engine.data.transfer_set import TransferSet
from engine.loops import pace
from engine.loops.fill import Maker, Part, fill
from engine.loops.preflight import long_for_a_cpu, suspicious
from engine.runtime.run import Run
from engine.runtime.stage_record import StageRecord
from tests.conftest import CPU, TINY, dataset_info

STAGES = ("synthesize", "generate", "augment", "distill")


def test_twice_chance_is_suspicious():
    assert [suspicious(n) for n in (2, 3, 10, 100)] == pytest.approx([75, 200 / 3, 20, 2])


def line(method, extra="", stages=STAGES):
    """The message about the length of a method's run on a CPU, and the flags of the run."""
    name, cls, groups = parse(["--method", method, *extra.split()])
    flags = {k: v for group in groups for k, v in dataclasses.asdict(group).items()}
    marks = {"synthesize": "init_rounds", "generate": "images_per_class", "distill": "epochs"}
    stages = [stage for stage in stages if marks.get(stage) in flags]
    return long_for_a_cpu(flags, groups[2].schedule(), dataset_info("digits"), stages), flags


@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_published_lengths_on_a_cpu_are_said_and_tiny_ones_are_not(method):
    text, flags = line(method)
    assert text.startswith("no GPU: ") and "\n" not in text
    named = [word.removeprefix("--") for word in text.split() if word.startswith("--")]
    assert named == ["minutes", "scale"] and set(named) <= set(flags)
    assert line(method, "--scale 1e-3")[0] == "" == line(method, "--minutes 600")[0]
    assert line(method, f"{TINY[method]} --epochs 2 --kd_steps 3 --ep_steps 3")[0] == ""


def test_the_steps_of_a_run_are_counted():
    assert "200000 student steps and 220000 synthesis steps" in line("csd")[0]  # 100 x 2000; 400 x 500 + 100 x 200
    assert "120000 student steps and 24000 synthesis steps" in line("nayer")[0]  # 300 x 400; 20 x 10 x 30 + 300 x 2 x 30
    assert "0 student steps and 200000 synthesis steps" in line("csd", stages=["synthesize"])[0]


def test_a_duration_in_words():
    words = [pace.duration(seconds) for seconds in (61, 3599, 3600 * 3 + 1200, 86400 * 2 + 3600 * 5)]
    assert words == ["1 min", "1 h 0 min", "3 h 20 min", "2 d 5 h"]
    said = []
    pace.log_time_left(said.append, "left", 60)
    assert not said
    pace.log_time_left(said.append, "left", 600)
    assert said == ["left: about 10 min"]


@pytest.mark.parametrize("kd_steps", [1000, 5])
def test_student_steps_tell_what_is_left(kd_steps, monkeypatch):
    """A student step takes 2 s, a round of synthesis 10 s; measured in one long round or in several short ones."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace, "clock", lambda device: clock.now)
    synthesis = SimpleNamespace(seconds=7.0, read=lambda: synthesis.seconds)  # time of an earlier command
    schedule = SimpleNamespace(kd_steps=kd_steps, rounds=8000 // kd_steps)
    distillation = SimpleNamespace(synthesis_clock=synthesis, schedule=schedule, precision=SimpleNamespace(device=CPU))
    said, start = [], schedule.rounds // 4
    steps = pace.StepPace(said.append, distillation, start)
    for number in range(60):
        if number % kd_steps == 0:
            clock.now, synthesis.seconds = clock.now + 10, synthesis.seconds + 10
        clock.now += 2
        steps.step()
    rounds = schedule.rounds - start - (5 if kd_steps == 5 else 1)
    left = pace.duration(2 * (6000 - 23) + 10 * rounds)
    assert len(said) == 1 and said[0].endswith(f"about {left}") and "stage distill" in said[0]


def test_a_round_of_a_bank_tells_what_is_left(tmp_path, monkeypatch):
    """The first of four rounds takes 100 s. Nothing is reported if less than a minute is left."""
    import engine.loops.fill as module

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    class Slow(Maker):
        seconds = 100.0

        def make(self, round, share, show):
            clock.now += self.seconds
            return {
                0: Part({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(2, dtype=torch.long)})
            }

    for name, seconds in (("slow", 100.0), ("quick", 10.0)):
        Slow.seconds = seconds
        run = Run(tmp_path / name, {})
        record = StageRecord(tmp_path / name / "stages.json", {"synthesize": {}})
        fill(run, record, ImageBank(tmp_path / name / "bank", Manifest("d", 10, 4)), "synthesize", 4, Slow)
        run.close()
        log = (tmp_path / name / "log.txt").read_text()
        assert log.count("time left in stage synthesize: about 5 min") == (name == "slow") == log.count("time left")


@pytest.mark.parametrize("mapped", [False, True])
def test_spaced_images_are_the_stored_ones(mapped, monkeypatch):
    monkeypatch.setattr("engine.data.image_bank.memory_limit", lambda device: 0 if mapped else 10**9)
    transfer = TransferSet(20, 4, CPU)
    transfer.add(
        (torch.arange(11)[:, None, None, None] * 5).expand(-1, 3, 4, 4).to(torch.uint8).contiguous(), torch.zeros(11)
    )
    assert transfer.mapped == mapped
    found = torch.cat(list(transfer.evenly_spaced(6, 4)))
    assert torch.equal(found[:, 0, 0, 0], torch.tensor([0, 2, 4, 6, 8, 10]) * 5 / 255)
    assert len(torch.cat(list(transfer.evenly_spaced(1000)))) == 11
