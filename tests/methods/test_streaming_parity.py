"""DAFL, ZSKT, DFAD, DFQ and KD against independent versions of their formulas: losses, gradients and synthesis steps."""

import copy

import pytest
import torch
from tqdm import tqdm

from datafree import dafl, dfad, dfq, zskt
from datafree.kd import KDObjective
from engine.loops.distill import Distillation, Schedule
from models.classifier import Output
from tests.conftest import make_classifier, make_task

TASK = make_task()
METHODS = {"DAFL": dafl, "ZSKT": zskt, "DFAD": dfad, "DFQ": dfq}


def log_probabilities(logits):
    return logits - logits.exp().sum(1, keepdim=True).log()


def certain(t):
    return -log_probabilities(t).max(1).values.mean()


def balance(t):
    mean = log_probabilities(t).exp().mean(0)
    return (mean * mean.log()).sum()


def divergence(s, t):
    return (log_probabilities(t).exp() * (log_probabilities(t) - log_probabilities(s))).sum(1).mean()


def statistics(teacher, images):
    """The teacher's logits and features, and the distance of the batch's BN statistics from the running statistics."""
    seen = []
    layers = [m for m in teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [m.register_forward_hook(lambda m, args, _: seen.append((m, args[0]))) for m in layers]
    out = teacher(images, return_features=True)
    for hook in hooks:
        hook.remove()
    distance = 0
    for layer, x in seen:
        mean = x.mean((0, 2, 3))
        var = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
        distance = distance + ((mean - layer.running_mean) ** 2).sum().sqrt() + ((var - layer.running_var) ** 2).sum().sqrt()
    return out.logits, out.features, distance


def generator_loss(name, teacher, student, images):
    """Generator loss of the published code, with the weights of the published scripts."""
    t, features, distance = statistics(teacher, images)
    if name == "DAFL":
        return certain(t) - 0.001 * features.abs().mean() + 20 * balance(t)
    s = student(images)
    if name == "ZSKT":
        return -divergence(s, t)
    if name == "DFAD":
        return -(s - t).abs().mean()
    return -divergence(s, t) + distance + certain(t) + 20 * balance(t)


@pytest.fixture(scope="module")
def networks():
    """Teacher and student whose logits differ clearly from image to image."""
    torch.manual_seed(0)
    pair = [make_classifier(name).eval() for name in ("resnet8", "wrn16_1")]
    for network in pair:
        network.network.fc.weight.data.mul_(20)
    return [network.requires_grad_(False) for network in pair]


def synthesizer(name, teacher, **changes):
    config = getattr(METHODS[name], f"{name}Config")(nz=8, synthesis_batch_size=12, **changes)
    torch.manual_seed(3)
    return getattr(METHODS[name], f"{name}Synthesizer")(config, teacher, TASK)


@pytest.mark.parametrize("name", METHODS)
def test_the_generator_s_loss_and_its_gradient(name, networks):
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    images = (images * torch.linspace(0, 1, 6).view(6, 1, 1, 1)).requires_grad_()
    found = synthesizer(name, networks[0]).losses(images, networks[1])["loss"]
    wanted = generator_loss(name, *networks, images)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    found, wanted = (torch.autograd.grad(loss, images)[0] for loss in (found, wanted))
    assert wanted.norm() > 0 and (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", METHODS)
def test_a_whole_synthesis_of_two_steps(name, networks):
    """By hand: noise, generator in training mode, loss, and Adam with betas .5 and .999 (Kingma & Ba 2014, algorithm 1)."""
    ours = synthesizer(name, networks[0], g_steps=2, lr_g=1e-3)
    generator, probe = copy.deepcopy(ours.generator), torch.randn(32, 8)
    untrained = generator(probe).detach()
    torch.manual_seed(5)
    made = ours.synthesize(networks[1])

    torch.manual_seed(5)
    parameters = list(generator.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in (1, 2):
        images = generator(torch.randn(12, 8))
        gradients = torch.autograd.grad(generator_loss(name, *networks, images), parameters)
        for p, g, m, v in zip(parameters, gradients, first, second):
            m.mul_(0.5).add_(0.5 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.data -= 1e-3 * (m / (1 - 0.5**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert (made.images - images).abs().max() < 2e-4
    with torch.no_grad():
        moved = (generator(probe) - untrained).abs().max()
        assert (ours.generator(probe) - generator(probe)).abs().max() < 0.02 * moved and moved > 1e-2


def test_the_student_s_temperature_is_that_of_the_published_tables():
    assert [getattr(METHODS[name], f"{name}Config")().T for name in METHODS] == [1, 1, 1, 1]


def outputs(**maps):
    generator = torch.Generator().manual_seed(2)
    s, t = 3 * torch.randn(2, 5, 4, generator=generator, dtype=torch.double)
    return s.requires_grad_(), t, [Output(x, x, None, maps.get(k, {})) for k, x in (("s", s), ("t", t))]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_distillation(temperature):
    """The gradient of KL is T (softmax(s / T) - softmax(t / T)) / B, that of cross-entropy (softmax(s) - onehot(y)) / B."""
    s, t, (student, teacher) = outputs()
    labels = torch.tensor([0, 1, 2, 3, 0])
    loss = KDObjective(temperature, 0.5)(teacher, student, labels)["loss"]
    (found,) = torch.autograd.grad(loss, s)
    q, p = (log_probabilities(x.detach() / temperature).exp() for x in (s, t))
    wanted = temperature * (q - p) / 5 + 0.5 * (log_probabilities(s.detach()).exp() - torch.eye(4)[labels]) / 5
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_gradient_of_dfad_is_a_sign():
    s, t, (student, teacher) = outputs()
    (found,) = torch.autograd.grad(dfad.LogitMatching(1.0)(teacher, student, None)["loss"], s)
    assert torch.allclose(found, (s.detach() - t).sign() / 20, atol=1e-7)


def test_the_gradient_of_attention_matching():
    """Against finite differences of the mean squared difference of two unit vectors."""
    torch.manual_seed(0)
    mine, theirs = torch.rand(2, 3, 2, 2, dtype=torch.double), torch.rand(2, 5, 2, 2, dtype=torch.double)

    def unit(maps):
        active = (maps**2).mean(1).flatten(1)
        return active / (active**2).sum(1, keepdim=True).sqrt()

    def wanted(maps):
        return float(((unit(maps) - unit(theirs)) ** 2).mean())

    probe = mine.clone().requires_grad_()
    s, t, (student, teacher) = outputs(s={(2, 2): probe}, t={(2, 2): theirs})
    loss = zskt.BeliefMatching(1.0, 250.0)(teacher, student, None)["attention"]
    assert loss.item() == pytest.approx(wanted(mine), rel=1e-5)
    (found,) = torch.autograd.grad(loss, probe)
    direction, h = torch.randn_like(mine), 1e-5
    slope = (wanted(mine + h * direction) - wanted(mine - h * direction)) / (2 * h)
    assert float((found * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_the_student_takes_one_step_of_sgd_towards_the_teacher(networks):
    """ZSKT's student step by hand: KL at T 1, attention loss, weight decay in the gradient, first step of momentum."""
    student = copy.deepcopy(networks[1]).requires_grad_(True)
    teacher = networks[0]
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    by_hand = copy.deepcopy(student).train()
    told, said = (network(images, return_features=True) for network in (teacher, by_hand))
    loss = divergence(said.logits, told.logits)
    for size, theirs in told.feature_maps.items():
        maps = [(x**2).mean(1).flatten(1) for x in (said.feature_maps[size], theirs)]
        a, b = (m / (m**2).sum(1, keepdim=True).sqrt() for m in maps)
        loss = loss + 250 * ((a - b) ** 2).mean()
    gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
    wanted = [p - 0.1 * (g + 1e-4 * p) for p, g in zip(by_hand.parameters(), gradients)]

    schedule = Schedule(1, 1, 1, 8, 0.1, 0.9, 1e-4, 0)
    pieces = zskt.ZSKT(zskt.ZSKTConfig(nz=8), teacher, student, TASK)
    distillation = Distillation(teacher, student, pieces.objective(), pieces.synthesizer(), schedule, TASK.precision)
    distillation.student_steps(iter([(images, torch.full((8,), -1))]), 0, tqdm(disable=True))
    for p, w in zip(student.parameters(), wanted):
        assert torch.allclose(p, w, rtol=1e-3, atol=1e-5)
