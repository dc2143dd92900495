"""Loss scales of fp16: one for each optimizer, saved with optimizers that outlive a round. Simulated on the CPU."""

import json
import shutil

import pytest
import torch

from engine.runtime.errors import UserError
from engine.runtime.precision import Precision, begin_momentum, choose_amp
from engine.runtime.tensors import load_checkpoint, weights_digest

CPU = torch.device("cpu")


def scaled(self, amp, device):
    """Replaces Precision.__init__: float32 networks, and a loss scale that overflows at about every second step."""
    self.amp, self.dtype, self.device = amp, None, device
    self.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**126, growth_interval=1)


@pytest.fixture
def overflowing(monkeypatch):
    monkeypatch.setattr(Precision, "__init__", scaled)


def steps(precision, count):
    """Value of a weight after ``count`` steps of plain SGD on the loss 8 w, from 0."""
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(count):
        precision.minimize(8 * weight, optimizer)
    return weight.item()


def test_without_fp16_there_is_no_state():
    precision = Precision("no", CPU)
    assert steps(precision, 2) == -16 and precision.state_dict() == {} == precision.fresh().state_dict()
    precision.load_state_dict({"scale": 4.0})  # state of an image bank made with fp16
    assert steps(precision, 2) == -16
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        Precision("fp16", CPU)


def test_a_scale_is_one_optimizers_and_goes_on(overflowing):
    one = Precision("fp16", CPU)
    two = one.fresh()
    assert steps(one, 4) > -32  # some steps overflowed and were skipped
    assert one.state_dict() != two.state_dict() and two.state_dict()["scale"] == 2.0**126
    again = two.fresh()
    again.load_state_dict(one.state_dict())
    assert again.state_dict() == one.state_dict() and steps(again, 5) == steps(one, 5)


def outcome(folder):
    synthesizer = load_checkpoint(folder / "distill.pth")["synthesizer"]
    scales = {name: part for name, part in synthesizer.items() if name.endswith("precision")}
    shards = {f.name: f.read_bytes() for f in folder.rglob("*.safetensors")}
    return shards, weights_digest(load_checkpoint(folder / "student.pth")["state_dict"]), scales


@pytest.mark.parametrize("method, count", [("dafl", 1), ("fast", 2), ("nayer", 1), ("csd", 0), ("cmi", 0), ("deepinv", 0)])
def test_a_run_in_fp16_goes_on_to_the_same_bits(method, count, distill, tmp_path, monkeypatch, interrupted, overflowing):
    distill(method, tmp_path / "whole")
    whole = outcome(tmp_path / "whole")
    with interrupted("engine.loops.distill.save_checkpoint", 2):
        distill(method, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "forgetful")
    distill(method, tmp_path / "run")
    found = outcome(tmp_path / "run")
    assert found == whole
    assert len(found[2]) == count and all(scale["scale"] != 2.0**126 for scale in found[2].values())
    if count:  # without the saved scale the result differs
        monkeypatch.setattr(Precision, "load_state_dict", lambda self, state: None)
        distill(method, tmp_path / "forgetful")
        assert outcome(tmp_path / "forgetful") != whole


HARDWARE = {
    ("AMD EPYC", "avx512_bf16"): "bf16",
    ("Intel Xeon", "avx512_bf16"): "no",  # slower than float32
    ("Intel Xeon", "avx512_bf16", "amx_bf16"): "bf16",
    ("Intel Xeon", "avx512_f"): "no",
}


@pytest.mark.parametrize("hardware", HARDWARE, ids="-".join)
def test_auto_is_the_faster_precision(hardware, monkeypatch):
    name, *able = hardware
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name} | dict.fromkeys(able, True))
    assert choose_amp("auto", CPU) == HARDWARE[hardware]
    assert choose_amp("auto", CPU, "no") == "no" and choose_amp("auto", CPU, "bf16") == "bf16"  # a resumed run
    assert choose_amp("no", CPU, "bf16") == "no"
    for found in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: found)
        assert choose_amp("auto", torch.device("cuda")) == ("bf16" if found else "no")


def recorded(folder):
    """The set of precisions in args.json and in the records of all stages."""
    stages = json.loads((folder / "stages.json").read_text())
    return {
        json.loads((folder / "args.json").read_text())["args"]["amp"],
        *(e["depends_on"]["amp"] for e in stages.values()),
    }


def test_a_run_keeps_on_another_machine_what_it_began_with(distill, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    distill("csd", tmp_path / "run", "--stages synthesize --amp auto")
    assert recorded(tmp_path / "run") == {"bf16"}
    with pytest.raises(UserError, match="--amp bf16, now no"):
        distill("csd", tmp_path / "run", "--amp no")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    distill("csd", tmp_path / "run", "--amp auto")
    assert recorded(tmp_path / "run") == {"bf16"}
    distill("csd", tmp_path / "other", "--stages synthesize --amp auto")
    assert recorded(tmp_path / "other") == {"no"}


def test_so_does_a_training_on_real_data(command, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    flags = f"--model resnet8 --dataset digits --batch_size 64 --gpu -1 --save_dir {folder} --output {tmp_path}/weights.pth"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    command("train_scratch", f"{flags} --epochs 1")
    assert recorded(folder) == {"bf16"}
    with pytest.raises(UserError, match="--amp bf16, now no"):
        command("train_scratch", f"{flags} --epochs 1 --amp no")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    command("train_scratch", f"{flags} --epochs 1")
    assert recorded(folder) == {"bf16"}
    command("train_scratch", f"{flags} --epochs 1 --redo")
    assert recorded(folder) == {"no"}


@pytest.mark.parametrize("fused", [True, False])
def test_momentum_begins_at_zero_though_the_first_step_is_skipped(fused):
    """The first loss scale is too high, and the momentum is in memory that held other values."""
    precision = Precision("no", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9, fused=fused)
    begin_momentum(optimizer)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        precision.minimize(weight.sum() * float("inf"), optimizer)
        assert torch.equal(weight.detach(), torch.ones(3))
        precision.minimize(weight.sum(), optimizer)
        precision.minimize(weight.sum(), optimizer)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.allclose(weight.detach(), torch.full((3,), 1 - 0.5 - 0.5 * 1.9))
