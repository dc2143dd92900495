"""NAYER's synthesis against an independent version of the paper's formulas: terms, gradients and one whole batch."""

import copy

import pytest
import torch

from datafree.nayer import NAYERConfig, NAYERSynthesizer
from tests.conftest import make_classifier, make_task

TASK = make_task()
CONFIG = NAYERConfig(g_steps=2, synthesis_batch_size=14, nz=6, label_dim=12, g_loops=2, g_life=5, lr_g=4e-3)


@pytest.fixture(scope="module")
def networks():
    """A teacher, and a student that agrees with it on some images."""
    torch.manual_seed(0)
    teacher = make_classifier().eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    torch.manual_seed(7)
    student.network.fc.weight.add_(0.5 * torch.randn_like(student.network.fc.weight))
    return teacher, student


def moments(x):
    mean = x.mean((0, 2, 3))
    return mean, ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))


def terms(teacher, student, images, labels, average, momentum=0.9):
    """The terms bn, oh and adv with the weights of the published scripts, and the next running average."""
    seen, layers = [], [m for m in teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0]))) for m in layers]
    t = teacher(images)
    for hook in hooks:
        hook.remove()
    distance, blended = 0, []
    for k, (layer, x) in enumerate(seen):
        mean, var = moments(x)
        if average:
            mean, var = momentum * average[k][0] + (1 - momentum) * mean, momentum * average[k][1] + (1 - momentum) * var
        blended.append((mean.detach(), var.detach()))
        distance = distance + (mean - layer.running_mean).norm() + (var - layer.running_var).norm()
    rows = torch.arange(len(t))
    entropy = (t.logsumexp(1) - t[rows, labels]).mean()
    s = student(images)
    p = t.softmax(1)
    divergence = (p * (t - t.logsumexp(1, True) - s + s.logsumexp(1, True))).sum(1)
    adv = -(divergence * (s.argmax(1) == t.argmax(1))).sum() / len(t)
    return [10 * distance, 0.5 * entropy, 1.33 * adv], blended


def test_terms_and_gradients(networks):
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 6).view(6, 1, 1, 1)
    agree = networks[0](images).argmax(1) == networks[1](images).argmax(1)
    assert 0 < agree.sum() < 6
    labels, average = torch.arange(6), []
    ours = NAYERSynthesizer(CONFIG, networks[0], TASK, warm_up=False).inversion
    for brighter in (1.0, 0.8):  # only the second batch has an average of earlier statistics
        x = (images * brighter).requires_grad_()
        found = ours.losses(x, labels, networks[1])
        wanted, average = terms(*networks, x, labels, average)
        for name, weight, term in zip(("loss_bn", "loss_oh", "loss_adv"), (10, 0.5, 1.33), wanted):
            assert weight * found[name].item() == pytest.approx(term.item(), rel=1e-4), name
            gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (weight * found[name], term)]
            assert gradients[1].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm(), name
        assert found["loss"].item() == pytest.approx(sum(wanted).item(), rel=1e-4)
        ours.average = average


def test_a_whole_batch_by_hand(networks):
    """Two steps with BN of label codes, a noisy layer per ten images, generator, loss and Adam; the better is kept."""
    teacher, student = networks
    ours = NAYERSynthesizer(CONFIG, teacher, TASK, warm_up=False)
    ours.synthesize(student)  # sets up generator, average and codes
    generator, norm, average = copy.deepcopy(ours.generator), copy.deepcopy(ours.norm), ours.inversion.average
    torch.manual_seed(5)
    made = ours.batch(student)

    torch.manual_seed(5)
    labels = torch.cat([torch.arange(10), torch.randperm(10)[:4]])
    layers = torch.randn(2, 12, 6).requires_grad_()
    parameters = [*generator.parameters(), norm.weight, norm.bias, layers]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    kept = []
    for step in (1, 2):
        codes = ours.codes[labels]
        var, mean = torch.var_mean(codes, 0, correction=0)
        codes = (codes - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias
        noise = torch.stack([code @ layers[i // 10] for i, code in enumerate(codes)])
        images = generator(noise)
        parts, after = terms(teacher, student, images, labels, average)
        kept.append((sum(parts).item(), images.detach()))
        gradients = torch.autograd.grad(sum(parts), parameters)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second):
                m.mul_(0.5).add_(0.5 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p -= 4e-3 * (m / (1 - 0.5**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    loss, images = min(kept, key=lambda pair: pair[0])
    assert torch.equal(made.labels, labels) and made.scalars["loss_synthesis"].item() == pytest.approx(loss, rel=1e-3)
    assert (made.images - images).abs().max() < 1e-3 < (kept[0][1] - kept[1][1]).abs().max()
    for found, wanted in zip(ours.inversion.average, after):
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, wanted))
