"""DeepInversion and ADI: the losses against loops in plain Python, and properties of the inversion."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datafree.adi import ADI, ADIConfig, ADISynthesizer, competition_loss
from datafree.base import LowestLoss, balanced_labels
from datafree.deepinv import DeepInversion, DeepInversionConfig, DeepInversionSynthesizer, jitter, l2_norm, total_variation
from engine.runtime.errors import UserError
from models.classifier import Classifier, frozen
from tests.conftest import CPU, make_task

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
OFF = {"bn": 0.0, "oh": 0.0, "tv": 0.0, "l2": 0.0}


def task(flip=False):
    return make_task(num_classes=4, flip=flip)


def classifier(seed, batch_norm=True):
    """A small network for 16 px images of four classes, with BN statistics that are not the initial ones."""
    torch.manual_seed(seed)
    norms = [nn.BatchNorm2d(c) if batch_norm else nn.Identity() for c in (5, 7)]
    for norm in norms if batch_norm else []:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    layers = nn.Conv2d(3, 5, 3), norms[0], nn.ReLU(), nn.Conv2d(5, 7, 3, 2), norms[1], nn.ReLU()
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))
    return frozen(Classifier(network, 4, 16, MEAN.flatten().tolist(), STD.flatten().tolist(), name=f"network{seed}"))


def network_of(wrapped, images):
    """Inputs of both BN layers, features and logits of a ``classifier``, computed layer by layer."""
    net, x = wrapped.network, (images - MEAN) / STD
    first = F.conv2d(x, net[0].weight, net[0].bias)
    second = F.conv2d(
        F.batch_norm(first, net[1].running_mean, net[1].running_var, net[1].weight, net[1].bias).relu(),
        net[3].weight,
        net[3].bias,
        stride=2,
    )
    last = F.batch_norm(second, net[4].running_mean, net[4].running_var, net[4].weight, net[4].bias).relu()
    features = last.mean((2, 3))
    return first, second, features, features @ net[8].weight.T + net[8].bias


def statistics_loss(wrapped, images):
    """L_bn of images (B, 3, 16, 16) for a ``classifier``, summed layer by layer."""
    distance = 0
    for inputs, layer in zip(network_of(wrapped, images), (wrapped.network[1], wrapped.network[4])):
        mean = inputs.mean((0, 2, 3))
        var = (inputs - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        distance = distance + (mean - layer.running_mean).norm() + (var - layer.running_var).norm()
    return distance


def inversion_loss(teacher, images, labels):
    """L_bn and the one-hot loss."""
    logits = network_of(teacher, images)[3]
    return statistics_loss(teacher, images), -logits.log_softmax(1)[range(len(labels)), labels].mean()


def naive_js(student, teacher, low=0.01, high=0.99):
    """1/2 [KL(m || p) + KL(m || q)] at temperature 3, one probability at a time."""
    total = 0.0
    for s, t in zip(np.asarray(student, dtype=float) / 3, np.asarray(teacher, dtype=float) / 3):
        for p, q in zip(np.exp(s) / np.exp(s).sum(), np.exp(t) / np.exp(t).sum()):
            m, p, q = (min(max(x, low), high) for x in ((p + q) / 2, p, q))
            total += 0.5 * (m * np.log(m / p) + m * np.log(m / q))
    return total / len(student)


def test_competition_is_one_minus_js():
    torch.manual_seed(0)
    student, teacher = 6 * torch.randn(9, 10), 6 * torch.randn(9, 10)
    assert float(competition_loss(student, teacher)) == pytest.approx(1 - naive_js(student, teacher), abs=1e-5)
    assert naive_js(student, teacher) != pytest.approx(naive_js(student, teacher, 0, 1), rel=1e-2), "the clamp bites here"
    assert float(competition_loss(teacher, teacher)) == 1.0
    assert competition_loss(student, teacher) == competition_loss(teacher, student)


def test_the_gradient_of_the_competition_is_the_published_ones():
    """The gradient equals finite differences of ``naive_js``; that of the reversed divergence KL(p || m) is much shorter."""
    torch.manual_seed(0)
    student, teacher = (
        (4 * torch.randn(5, 10, dtype=torch.double)).requires_grad_(),
        6 * torch.randn(5, 10, dtype=torch.double),
    )
    found = torch.autograd.grad(competition_loss(student, teacher), student)[0]
    expected, step = torch.zeros(5, 10), 1e-3  # the loss is computed in float32, the loop in double
    for i in range(5):
        for c in range(10):
            ends = []
            for sign in (1, -1):
                moved = student.detach().clone()
                moved[i, c] += sign * step
                ends.append(-naive_js(moved, teacher))
            expected[i, c] = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-3)
    p, q = ((x / 3).softmax(1).clamp(0.01, 0.99) for x in (student, teacher))
    m = (p + q) / 2
    other = torch.autograd.grad((p * (p / m).log() + q * (q / m).log()).sum() / 10, student)[0]
    assert other.norm() < 0.6 * found.norm()


def test_the_clamp_bounds_the_competition():
    student, teacher = torch.tensor([[0.0, 0.0, 90.0]], requires_grad=True), torch.tensor([[90.0, 0.0, 0.0]])
    loss = competition_loss(student, teacher)
    by_hand = np.log(0.5 / np.sqrt(0.99 * 0.01))  # two classes contribute half each, the third class 0
    assert loss.item() == pytest.approx(1 - by_hand, abs=1e-6) and by_hand < 1.62
    loss.backward()
    assert student.grad.abs().max() < 1e-6, "nothing to gain beyond 99 %"
    milder = torch.tensor([[0.0, 0.0, 3.0]], requires_grad=True)
    competition_loss(milder, teacher).backward()
    assert milder.grad[0, 2] < 0 < milder.grad[0, 0], "descent makes the student surer of its mistake"


def test_total_variation_against_loops():
    x = torch.randn(2, 3, 4, 5)
    expected = 0.0
    for rows, columns in ((0, 1), (1, 0), (1, 1), (1, -1)):
        differences = [
            abs(float(x[b, c, i, j] - x[b, c, i + rows, j + columns]))
            for b in range(2)
            for c in range(3)
            for i in range(4 - rows)
            for j in range(5)
            if 0 <= j + columns < 5
        ]
        expected += sum(differences) / len(differences)
    assert float(total_variation(x)) == pytest.approx(expected, rel=1e-5)
    assert total_variation(torch.ones(1, 3, 4, 4)) == 0


def test_l2_is_of_one_image():
    x = torch.zeros(2, 3, 2, 2)
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[1, 2, 0, 1] = 3.0, 4.0, 1.0
    assert float(l2_norm(x)) == pytest.approx((5 + 1) / 2)
    assert float(l2_norm(x.repeat(4, 1, 1, 1))) == pytest.approx(3), "does not grow with the batch"


@pytest.mark.parametrize("flip", [False, True])
def test_jitter_is_a_bounded_roll_of_the_whole_batch(flip):
    torch.manual_seed(0)
    images = torch.arange(2 * 3 * 16 * 24.0).view(2, 3, 16, 24)
    candidates = {}
    for down in range(-2, 3):
        for right in range(-3, 4):
            candidates[down, right, False] = images.roll((down, right), (2, 3))
            if flip:
                candidates[down, right, True] = candidates[down, right, False].flip(3)
    seen = []
    for _ in range(600):
        moved = jitter(images, flip)
        seen += [key for key, expected in candidates.items() if torch.equal(moved, expected)]
    assert len(seen) == 600, "every draw is exactly one of the allowed moves"
    assert set(seen) == set(candidates)


@pytest.mark.parametrize("losses", [(5.0, 3.0, 4.0), (3.0, 5.0, 4.0), (5.0, 4.0, 3.0)])
def test_lowest_loss_keeps_a_copy(losses):
    best, images = LowestLoss(), torch.zeros(2, 3)
    for step, loss in enumerate(losses):
        images.fill_(step)
        best.update(images, {"loss": torch.tensor(loss), "loss_oh": torch.tensor(10.0 * step)})
        images.fill_(-1.0)  # as an optimizer that continues to change the same tensor
    lowest = losses.index(3.0)
    assert best.images.eq(lowest).all()
    assert best.scalars() == {"loss_synthesis": torch.tensor(3.0), "loss_oh": torch.tensor(10.0 * lowest)}


@pytest.mark.parametrize("last", [float("nan"), float("inf")])
def test_a_synthesis_that_diverges_is_seen(last):
    """A run stops at a loss that is not finite, so the images of the first step do not pass as inverted ones."""
    best = LowestLoss()
    for loss in (3.0, last):
        best.update(torch.zeros(2, 3), {"loss": torch.tensor(loss)})
    assert best.scalars()["loss_synthesis"].isnan()


class Scripted(DeepInversionSynthesizer):
    """A synthesizer whose loss at step k is the k-th of ``values`` for any pixels; the gradient increases all pixels."""

    def losses(self, pixels, jittered, labels, student):
        self.seen.append(pixels.detach().clone())
        push = -pixels.sum()
        return {"loss": push - push.detach() + self.values[len(self.seen) - 1]}


def test_the_best_step_is_the_one_kept():
    config = DeepInversionConfig(g_steps=4, synthesis_batch_size=3, bn=0.0)
    teacher = classifier(0)
    synthesizer = Scripted(config, teacher, task())
    synthesizer.seen, synthesizer.values = [], [4.0, 2.0, 1.0, 3.0]
    batch = synthesizer.synthesize(None)
    shown = [(x * teacher.std + teacher.mean).clamp(0, 1) for x in synthesizer.seen]
    assert torch.equal(batch.images, shown[2]) and batch.scalars["loss_synthesis"] == 1.0
    assert not torch.equal(shown[2], shown[3]) and not torch.equal(shown[2], shown[1])


def test_a_step_is_as_long_as_the_learning_rate_in_normalized_space():
    config = DeepInversionConfig(g_steps=2, synthesis_batch_size=3, bn=0.0, lr_g=0.1)
    synthesizer = Scripted(config, classifier(0), task())
    synthesizer.seen, synthesizer.values = [], [1.0, 1.0]
    synthesizer.synthesize(None)
    first, second = synthesizer.seen
    white = ((1 - synthesizer.teacher.mean) / synthesizer.teacher.std).expand_as(first)
    assert torch.allclose(second, torch.minimum(first + 0.1, white), atol=1e-5)
    assert (second == white).any() and (second < white).any()


def synthesized(config, teacher, student, **settings):
    return ADISynthesizer(config, teacher, student, task(**settings)).synthesize(student)


def test_pixels_stay_in_range_at_any_rate():
    teacher, seen = classifier(0), []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    config = ADIConfig(g_steps=5, synthesis_batch_size=6, lr_g=5.0)
    batch = synthesized(config, teacher, classifier(1), flip=True)
    assert batch.images.min() >= 0 and batch.images.max() <= 1 and torch.bincount(batch.labels).min() >= 1
    assert len(seen) == 5 and all(x.min() > -1e-6 and x.max() < 1 + 1e-6 for x in seen)
    assert (seen[-1] < 1e-6).any() and (seen[-1] > 1 - 1e-6).any(), "the clip was needed"


def test_deepinversion_never_asks_the_student():
    def student(images):
        raise AssertionError("asked")

    config = DeepInversionConfig(g_steps=2, synthesis_batch_size=4)
    batch = DeepInversionSynthesizer(config, classifier(0), task()).synthesize(student)
    assert set(batch.scalars) == {"loss_synthesis", "loss_oh", "loss_bn", "loss_tv"}


def test_the_loss_is_the_weighted_sum():
    teacher, student = classifier(0), classifier(1)
    config = ADIConfig(g_steps=1, synthesis_batch_size=4, bn=3.0, oh=5.0, tv=7.0, l2=11.0, adv=13.0, student_bn=17.0)
    scalars = synthesized(config, teacher, student).scalars
    weights = {"loss_bn": 3, "loss_oh": 5, "loss_tv": 7, "loss_l2": 11, "loss_adv": 13, "loss_student_bn": -3 * 17}
    assert float(scalars["loss_synthesis"]) == pytest.approx(
        sum(weight * float(scalars[name]) for name, weight in weights.items()), rel=1e-4
    )


def by_hand(config, teacher, student, pixels, moved, labels):
    """Named losses of normalized pixels; ``moved`` are the same pixels after jitter."""
    images = moved * STD + MEAN
    bn, oh = inversion_loss(teacher, images, labels)
    steps = (
        ((..., slice(1, None)), (..., slice(None, -1))),
        ((..., slice(1, None), slice(None)), (..., slice(None, -1), slice(None))),
    )
    tv = sum((pixels[after] - pixels[before]).abs().mean() for after, before in steps)
    tv = (
        tv
        + (pixels[..., 1:, 1:] - pixels[..., :-1, :-1]).abs().mean()
        + (pixels[..., 1:, :-1] - pixels[..., :-1, 1:]).abs().mean()
    )
    l2 = sum(image.square().sum().sqrt() for image in pixels) / len(pixels)
    p, q = ((network_of(network, images)[3] / 3).softmax(1) for network in (student, teacher))
    m, p, q = (x.clamp(0.01, 0.99) for x in ((p + q) / 2, p, q))
    adv = 1 - ((m * (m / p).log()).sum(1) + (m * (m / q).log()).sum(1)).mean() / 2
    left = statistics_loss(student, images)
    loss = config.oh * oh + config.tv * tv + config.l2 * l2 + config.adv * adv + config.bn * (bn - config.student_bn * left)
    return {
        "loss_bn": bn,
        "loss_oh": oh,
        "loss_tv": tv,
        "loss_l2": l2,
        "loss_adv": adv,
        "loss_student_bn": left,
        "loss": loss,
    }


FULL = ADIConfig(g_steps=3, synthesis_batch_size=8, bn=3.0, oh=5.0, tv=7.0, l2=0.1, adv=13.0, student_bn=0.2, lr_g=0.1)


def test_every_loss_and_its_gradient():
    teacher, student, labels = classifier(0), classifier(1), torch.arange(8) % 4
    synthesizer, pixels = ADISynthesizer(FULL, teacher, student, task()), torch.randn(8, 3, 16, 16, requires_grad=True)
    moved = pixels.roll((1, -2), (2, 3)).flip(3)
    losses, expected = (
        synthesizer.losses(pixels, moved, labels, student),
        by_hand(FULL, teacher, student, pixels, moved, labels),
    )
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
        found, wanted = (torch.autograd.grad(x, pixels, retain_graph=True)[0] for x in (losses[name], value))
        assert (found - wanted).norm() < 1e-3 * wanted.norm(), name


def test_a_whole_synthesis_step():
    """Three steps of Adam on pixels in the teacher's normalized space, each clipped; the lowest loss is kept."""
    teacher, student = classifier(0), classifier(1)
    torch.manual_seed(4)
    batch = ADISynthesizer(FULL, teacher, student, task(flip=True)).synthesize(student)
    torch.manual_seed(4)
    balanced_labels(8, 4, CPU)  # draws the same random numbers as the synthesizer
    black, white = -MEAN / STD, (1 - MEAN) / STD
    pixels = torch.randn(8, 3, 16, 16).clamp(black, white).requires_grad_()
    optimizer, seen = torch.optim.Adam([pixels], lr=0.1, betas=(0.5, 0.99)), []
    for _ in range(3):
        loss = by_hand(FULL, teacher, student, pixels, jitter(pixels, True), batch.labels)["loss"]
        seen.append((loss.item(), (pixels.detach() * STD + MEAN).clamp(0, 1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(black, white)
    lowest = min(seen, key=lambda pair: pair[0])
    assert float(batch.scalars["loss_synthesis"]) == pytest.approx(lowest[0], rel=1e-4) and lowest[0] < seen[0][0]
    assert (batch.images - lowest[1]).abs().mean() < 1e-5 < (seen[0][1] - lowest[1]).abs().mean()


def test_images_leave_the_students_statistics():
    """With student_bn 1 the difference between the teacher's and the student's L_bn falls."""
    teacher, student = classifier(0), classifier(1)
    differences = []
    for steps in (1, 12):
        config = ADIConfig(g_steps=steps, synthesis_batch_size=8, adv=0.0, student_bn=1.0, **OFF | {"bn": 1.0})
        torch.manual_seed(0)
        images = synthesized(config, teacher, student).images
        differences.append(float(statistics_loss(teacher, images) - statistics_loss(student, images)))
    assert differences[1] < differences[0] - 0.5


def test_images_divide_student_and_teacher():
    teacher, student = classifier(0), classifier(1)
    divergences = []
    for steps in (1, 40):
        config = ADIConfig(g_steps=steps, synthesis_batch_size=8, adv=1.0, student_bn=0.0, **OFF)
        torch.manual_seed(0)
        images = synthesized(config, teacher, student).images
        divergences.append(naive_js(student(images).tolist(), teacher(images).tolist()))
    assert divergences[1] > 1.2 * divergences[0]


def test_the_students_statistics_are_asked_for_within_the_bn_term_alone():
    config = ADIConfig(g_steps=1, synthesis_batch_size=4, adv=0.0, bn=0.0)
    assert "loss_student_bn" not in synthesized(config, classifier(0), classifier(1)).scalars


def test_bad_input():
    teacher = classifier(0)
    with pytest.raises(UserError, match="network3 has no BatchNorm layer.*--student_bn 0"):
        ADI(ADIConfig(), teacher, classifier(3, batch_norm=False), task())
    ADI(ADIConfig(student_bn=0.0), teacher, classifier(3, batch_norm=False), task())
    for method in (DeepInversion, ADI):
        with pytest.raises(UserError, match="--g_steps 0"):
            method(method.Config(g_steps=0), teacher, teacher, task())
