"""--recipe: the flags that it sets, the one-cycle learning rate, and the steps of Muon."""

import dataclasses
import json

import pytest
import torch

from datafree_kd import parse
from engine.loops.distill import Schedule
from engine.loops.muon import RATE, Muon, orthogonalized
from engine.runtime.errors import UserError
from engine.runtime.flags import stage_flags
from engine.runtime.precision import begin_momentum, load_optimizer
from registry import RECIPES
from tests.conftest import make_classifier, outcome


def flags(command: str) -> dict:
    groups = parse(command.split())[2]
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


@pytest.mark.parametrize("method", ["kd", "nayer", "csd"])
def test_fast_sets_what_it_says_and_nothing_else(method):
    published, fast = flags(f"--method {method}"), flags(f"--method {method} --recipe fast")
    assert {name: fast[name] for name in RECIPES["fast"]} == RECIPES["fast"]
    assert {name for name in fast if fast[name] != published[name]} <= {"recipe", *RECIPES["fast"]}
    assert published == flags(f"--method {method} --recipe published")


def test_a_flag_that_the_command_gives_wins():
    given = flags("--method nayer --recipe fast --optimizer sgd --lr .05 -b 64 --scale .01")
    assert (given["optimizer"], given["lr"], given["batch_size"], given["lr_schedule"]) == ("sgd", 0.05, 64, "one_cycle")
    assert given["epochs"] == 30


def test_help_shows_what_a_recipe_sets_and_an_unknown_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name} {value}" in shown for name, value in RECIPES["fast"].items())
    with pytest.raises(UserError, match="slow.*published"):
        parse("--method kd --recipe slow".split())


def test_its_flags_are_of_stage_distill_and_no_other():
    published, fast = (parse(f"--method nayer --recipe {recipe}".split())[2] for recipe in RECIPES)
    assert stage_flags("synthesize", *published) == stage_flags("synthesize", *fast)
    assert stage_flags("distill", *published) != stage_flags("distill", *fast)


def test_a_warm_up_beside_one_cycle_is_refused():
    with pytest.raises(UserError, match="--warmup_epochs 2 .* one_cycle"):
        parse("--method kd --recipe fast --warmup_epochs 2".split())[2][2].schedule()


def test_a_least_learning_rate_above_the_peak_is_refused():
    with pytest.raises(UserError, match=r"--lr_min 0.0002 found, at most --lr 0.0001 wanted"):
        parse("--method nayer --lr 1e-4".split())[2][2].schedule()


def test_one_cycle_goes_up_in_a_fifth_and_down_to_its_end():
    schedule = Schedule(4, 25, 25, 1, 0.2, 0.9, 0, 0, lr_min=0.04, lr_schedule="one_cycle")
    rates = [schedule.learning_rate(step) for step in (0, 9, 19, 20, 60, 100)]
    assert rates == pytest.approx([0.01, 0.1, 0.2, 0.2, 0.12, 0.04])
    shortest = Schedule(1, 1, 1, 1, 0.2, 0.9, 0, 0, lr_schedule="one_cycle")
    assert shortest.learning_rate(0) == 0.2


@pytest.mark.parametrize("shape", [(16, 27), (40, 16), (8, 8)])
def test_orthogonalized_keeps_the_singular_vectors_and_evens_the_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1, 1e3]).view(-1, 1, 1)
    found = orthogonalized(matrices)
    for matrix, result in zip(matrices, found):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ result @ v.T
        assert inside.diagonal()[s > 0.02 * s[0]].min() > 0.6 and inside.diagonal().max() < 1.3
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-2


def test_muon_is_sgd_but_for_the_filters():
    torch.manual_seed(0)
    network, reference = make_classifier().network, make_classifier().network
    reference.load_state_dict(network.state_dict())
    muon = Muon([*network.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-2)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    begin_momentum(muon)
    gradients = [[torch.randn_like(p) for p in network.parameters()] for _ in range(2)]
    filters = {name for name, p in network.named_parameters() if p.ndim == 4 and p.shape[1] > 3}
    assert filters and len(filters) < sum(1 for _ in network.parameters())
    expected = {name: p.detach().clone() for name, p in network.named_parameters()}
    average = {name: 0 for name in filters}
    for step in gradients:
        for a, b, gradient in zip(network.parameters(), reference.parameters(), step):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        muon.step()
        sgd.step()
        for name, gradient in zip(expected, step):
            if name in filters:
                average[name] = 0.9 * average[name] + 0.1 * gradient
                ahead = (0.9 * average[name] + 0.1 * gradient).flatten(1)
                wide = RATE * max(1, ahead.shape[0] / ahead.shape[1]) ** 0.5
                made = wide * orthogonalized(ahead[None])[0].view_as(gradient)
                expected[name] -= 0.1 * (made + 1e-2 * expected[name])
    for (name, a), b in zip(network.named_parameters(), reference.parameters()):
        torch.testing.assert_close(a, expected[name] if name in filters else b, rtol=1e-4, atol=1e-5)


def test_muon_takes_up_its_state_and_refuses_one_that_is_not_its_own():
    torch.manual_seed(0)
    network = make_classifier().network
    muon, again, plain = (make(network) for make in (by_muon, by_muon, by_sgd))
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    load_optimizer(again, muon.state_dict())
    remembered = [(muon.state[p], again.state[p]) for p in network.parameters()]
    assert all(a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a) for a, b in remembered)
    with pytest.raises(ValueError):
        load_optimizer(again, plain.state_dict())


def by_muon(network):
    muon = Muon([*network.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-2)
    begin_momentum(muon)
    return muon


def by_sgd(network):
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    begin_momentum(sgd)
    return sgd


@pytest.mark.parametrize("method", ["kd", "csd"])
def test_a_fast_run_goes_on_to_the_same_bits(method, distill, finished, tmp_path, interrupted):
    with interrupted("engine.loops.distill.save_checkpoint", 2):
        distill(method, tmp_path, "--recipe fast")
    distill(method, tmp_path, "--recipe fast")
    assert outcome(tmp_path) == outcome(finished(method, "--recipe fast"))
    with pytest.raises(UserError, match="optimizer|lr"):
        distill(method, tmp_path, "--recipe published")


def test_a_run_of_before_there_were_recipes_goes_on(copied, distill):
    folder = copied("kd")
    record = json.loads((folder / "stages.json").read_text())
    for name in ("optimizer", "lr_schedule"):
        assert record["distill"]["depends_on"].pop(name) is None
    (folder / "stages.json").write_text(json.dumps(record))
    distill("kd", folder)
    with pytest.raises(UserError, match="earlier version"):
        distill("kd", folder, "--optimizer muon")
