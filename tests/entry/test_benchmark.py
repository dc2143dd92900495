"""The benchmark runs, its two loops do the same work, and its counts agree with closed forms."""

import copy

import pytest
import torch
from torch import nn

from datafree.benchmark import __main__ as benchmark
from datafree.benchmark import loops, measuring
from datafree.benchmark.measuring import Ceilings, Measured
from datafree.generators import Generator, reset
from engine.data.image_bank import ImageBank, Manifest
from engine.runtime.errors import UserError
from engine.runtime.precision import Precision
from models.classifier import frozen
from tests.conftest import build_classifier, dataset_info

CPU = torch.device("cpu")
TINY = "--dataset digits --batch_size 8 --bank 16 --workers 0 --seconds 0.01 --repeats 2 --gpu -1 --compile no"


@pytest.fixture
def run(monkeypatch, capsys):
    def go(flags):
        monkeypatch.setattr("sys.argv", ["benchmark", *TINY.split(), *flags.split()])
        monkeypatch.setattr(benchmark, "ceilings", lambda device, dtype, seconds: Ceilings(1e12, "float32", 1e10))
        benchmark.main()
        return capsys.readouterr()

    return go


def test_it_prints_a_table_a_pair_and_rewrites_the_file(run, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "GROWING", (16, 32))
    page = tmp_path / "page.md"
    page.write_text("<!-- table:benchmark -->\n<!-- /table:benchmark -->\n")
    out, err = run(f"--pairs resnet8:resnet8,resnet8:wrn16_1 --into {page}")
    assert out.count("| inversion step |") == out.count("| bank sampling |") == 2 and "resnet8 -> wrn16_1, 16 px" in out
    assert "ceilings: 1 TFLOP/s (float32), 10 GB/s" in out and "amp no, not compiled" in out and "| 320, mapped |" in out
    assert out.strip() in page.read_text()
    assert "export" not in err and "benchmark:" in err


def test_loops_can_be_chosen(run, monkeypatch):
    monkeypatch.setattr(benchmark, "GROWING", (16,))
    assert "resnet" not in run("--loops growth").out
    out = run("--pairs resnet8:resnet8 --loops sample").out
    assert "| bank sampling |" in out and "teacher forward" not in out and "images in the bank" not in out


@pytest.mark.parametrize("flags", ["--pairs resnet8", "--pairs a:b:c", "--loops sampel", "--bank 3", "--repeats 0"])
def test_wrong_flags_are_refused(flags):
    with pytest.raises(UserError):
        benchmark.parse(flags.split())


def test_the_plain_generator_is_the_same_map():
    torch.manual_seed(0)
    ours = reset(Generator(8, 16)).eval()
    plain = loops._apart(Generator(8, 16)).eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values())))
    z = torch.randn(2, 8)
    assert torch.allclose(ours(z), plain(z), atol=1e-5)


def test_the_compiler_is_given_four_functions_and_what_it_gives_runs(tmp_path):
    info, calls = dataset_info("digits"), []

    def compiler(function, calls_to_come, name, **_):
        return lambda *inputs, **named: (calls.append(name), function(*inputs, **named))[1]

    teacher, student = (build_classifier("resnet8", info, CPU) for _ in range(2))
    before = copy.deepcopy(student.state_dict())
    bank = ImageBank(tmp_path / "bank", Manifest(info.name, info.num_classes, info.image_size))
    bank.append("synthesize", 0, torch.rand(8, 3, 16, 16), torch.zeros(8, dtype=torch.long))
    ours = loops.Ours(info, frozen(teacher), student, bank.read("synthesize"), 4, Precision("no", CPU), compiler)
    ours.sample()
    assert calls == []
    ours.distillation()
    assert calls == ["teacher", "student step"]
    ours.inversion()
    assert calls[2:] == ["generator", "synthesis losses"]
    ours.teacher_forward()
    assert calls[4:] == ["teacher"]
    calls.clear()
    for known, blocks in ((1.0, 0), (0.5, 8)):  # 36 of 72 views are cached after nine blocks of four
        step = ours.cached_steps(known)
        assert calls == ["teacher"] * 9
        step()
        assert calls == ["teacher"] * (9 + blocks) + ["student step"] * 16 and ours.loop.logit_cache is None
        calls.clear()
    calls.clear()
    all_views, one_view = ours.small_run(None), ours.small_run(1)  # twelve images of nine views, 384 lookups
    assert 0.6 < all_views < 0.8 and one_view > 0.95 and calls.count("student step") == 2 * 96
    assert any(not torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_operations_of_a_step_are_those_of_its_products_and_convolutions():
    linear, convolution = nn.Linear(5, 7), nn.Conv2d(3, 4, 3, padding=1)
    rows, images = torch.randn(11, 5), torch.randn(2, 3, 8, 8, requires_grad=True)
    product, window = 2 * 11 * 5 * 7, 2 * (2 * 8 * 8) * 4 * 3 * 9
    assert measuring.flops(lambda: linear(rows)) == product
    assert measuring.flops(lambda: linear(rows).sum().backward()) == 2 * product  # no gradient for the rows
    assert measuring.flops(lambda: convolution(images).sum().backward()) == 3 * window


def test_a_row_is_medians_spread_and_the_share_of_the_ceiling():
    ours, plain = Measured([10.0, 30.0, 20.0], 5), Measured([10.0, 10.0, 10.0])
    row = benchmark.line("inversion", ours, plain, 10**9, Ceilings(40e9, "", 1e10))
    assert row["ratio"] == "2.00 (1.00 to 3.00)" and row["ours, of the ceiling"] == "50 % (arithmetic)"
    assert row["ours, peak MiB"] == "5" and row["plain, peak MiB"] == ""
    row = benchmark.line("sample", ours, plain, 10**8, Ceilings(1.0, "", 1e10))
    assert row["ours, of the ceiling"] == "20 % (copy)"


def test_runs_are_measured_where_asked_for(run):
    out = run("--pairs resnet8:resnet8 --loops logit_cache,run").out
    for known in ("50", "90", "100"):
        assert f"| distillation step, {known} % of the teacher's logits cached |" in out
    assert "| distillation steps of a run, 16 views, " in out and "run" not in benchmark.parse([]).loops


def test_slow_steps_are_measured_once(monkeypatch):
    """The clock advances one second a step, and 0.1 seconds of steps are to be measured."""
    now, bar = [0.0], type("Bar", (), {"done": 0, "update": lambda self, n=1: setattr(self, "done", self.done + n)})()
    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])
    steps = {kind: lambda: now.__setitem__(0, now[0] + 1) for kind in ("ours", "plain")}
    measured = measuring.in_turns(steps, 8, 0.1, 3, CPU, bar)
    assert [m.rates for m in measured.values()] == [[8.0], [8.0]] and bar.done == 3
    assert now[0] == 4  # two steps of each kind


def test_ceilings_are_of_the_order_of_the_machine():
    measured = measuring.ceilings(CPU, torch.float32, seconds=0.01, scale=64)
    assert measured.or_higher(Ceilings(1.0, "slow", 1e15)) == Ceilings(measured.arithmetic, measured.kind, 1e15)
    assert 1e7 < measured.arithmetic < 1e16 and 1e6 < measured.memory < 1e14 and "float32" in measured.kind


@pytest.mark.skipif(not measuring.reset_peak(CPU), reason="this system cannot reset the peak of a process")
def test_the_peak_of_memory_is_that_since_the_reset():
    torch.ones(64 * 2**18)  # 64 MiB, freed before the reset
    assert measuring.reset_peak(CPU)
    before = measuring.peak(CPU)
    torch.ones(32 * 2**18)
    assert 24 < measuring.peak(CPU) - before < 56
