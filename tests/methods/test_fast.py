"""Fast: meta gradients, the average of BN statistics and the first-layer reset, against computations by hand."""

import copy
import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datafree.base import balanced_labels
from datafree.fast import Fast, FastConfig, FastSynthesizer, Inversion, blend, with_gradient
from datafree.losses import adversarial_loss
from engine.runtime.errors import UserError
from tests.conftest import CPU, make_task

TASK = make_task()
SMALL = FastConfig(g_steps=3, synthesis_batch_size=6, nz=4, reset_l0=0)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10)
    )
    return network.eval().requires_grad_(False)


@pytest.fixture
def student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)).eval().requires_grad_(False)


class TwoParameters(nn.Module):
    """Gray images sigmoid(slope * z + offset)."""

    def __init__(self):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.2))

    def forward(self, z):
        return torch.sigmoid(self.slope * z[:, :1, None, None] + self.offset).expand(-1, 3, 16, 16)


def one_round_by_hand(config, teacher, meta, seed):
    """The first-order gradient of the summed losses of all steps with respect to theta_0, and theta_0 - theta_K."""
    torch.manual_seed(seed)
    z = torch.randn(config.synthesis_batch_size, config.nz)
    labels = balanced_labels(len(z), 10, CPU)
    zero = torch.stack([meta.slope, meta.offset]).detach().requires_grad_()
    theta, z, total = zero + 0, z.requires_grad_(), 0
    for _ in range(config.g_steps):
        images = torch.sigmoid(theta[0] * z[:, :1, None, None] + theta[1]).expand(-1, 3, 16, 16)
        loss = F.cross_entropy(teacher(images), labels)
        total = total + loss
        inner, inner_z = torch.autograd.grad(loss, (theta, z), retain_graph=True)
        theta, z = theta - config.lr_g * inner.detach(), (z - config.lr_z * inner_z).detach().requires_grad_()
    return torch.autograd.grad(total, zero)[0], zero.detach() - theta.detach()


@pytest.mark.parametrize("is_maml", [1, 0])
def test_the_meta_gradient_is_that_of_autograd(is_maml, teacher, monkeypatch):
    """Checked with SGD in the inner and the outer loop, where Reptile's gradient is lr_g times FOMAML's."""
    monkeypatch.setattr(torch.optim, "Adam", lambda params, lr=1.0, betas=None, fused=None: torch.optim.SGD(params, lr))
    config = small(is_maml=is_maml, bn=0.0, oh=1.0, lr_g=0.5, lr_z=0.3)
    synthesizer = FastSynthesizer(config, teacher, TASK, warm_up=True)
    synthesizer.generator = meta = TwoParameters()
    synthesizer.adapted = synthesizer.generate = copy.deepcopy(meta)
    synthesizer.meta_optimizer = torch.optim.SGD(meta.parameters(), lr=1.0)
    before = torch.stack([meta.slope, meta.offset]).detach()
    fomaml, reptile = one_round_by_hand(config, teacher, meta, 5)
    torch.manual_seed(5)
    synthesizer.synthesize(None)
    moved = before - torch.stack([meta.slope, meta.offset]).detach()
    assert torch.allclose(moved, fomaml if is_maml else reptile, rtol=1e-4, atol=1e-7)
    assert moved.abs().min() > 1e-4


def by_hand(config, teacher, student, images, labels, average):
    """Named losses with ``adv`` 2, computed by hand, and the new average of the BN statistics."""
    x = F.conv2d(images, teacher[0].weight, teacher[0].bias, stride=2)
    stats = [x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)]
    blended = [(1 - config.bn_mmt) * new + config.bn_mmt * old for new, old in zip(stats, average)] if average else stats
    bn = (blended[0] - teacher[1].running_mean).norm() + (blended[1] - teacher[1].running_var).norm()
    t, s = teacher(images), student(images)
    kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    adv, oh = -(kl * (t.argmax(1) == s.argmax(1))).mean(), -t.log_softmax(1)[range(len(labels)), labels].mean()
    loss = config.bn * bn + config.oh * oh + 2 * adv
    return {"loss_bn": bn, "loss_oh": oh, "loss_adv": adv, "loss": loss}, [x.detach() for x in blended]


def test_every_loss_and_its_gradient(teacher, student):
    config, images, labels = small(bn=3.0, oh=0.5, bn_mmt=0.7), torch.rand(6, 3, 16, 16, requires_grad=True), torch.arange(6)
    student[1].bias.data[teacher(images)[0].argmax()] = 2.0  # makes teacher and student agree on some images
    average = [torch.randn(5), torch.rand(5)]
    inversion = Inversion(config, teacher, TASK, adv=2.0)
    inversion.average = [tuple(average)]
    losses, (expected, _) = (
        inversion.losses(images, labels, student),
        by_hand(config, teacher, student, images, labels, average),
    )
    assert set(losses) == set(expected) and expected["loss_adv"] < 0
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
        found, wanted = (torch.autograd.grad(x, images, retain_graph=True)[0] for x in (losses[name], value))
        assert (found - wanted).norm() < 1e-3 * wanted.norm(), name


@pytest.mark.parametrize("is_maml", [1, 0])
def test_two_whole_rounds(is_maml, teacher, student):
    """Adaptation and meta step with Adam, and the running average; Reptile's gradient is 67 times as long, as in the script.

    If a gradient is almost 0, Adam turns its rounding error into a whole step, hence the tolerance.
    """
    config = small(is_maml=is_maml, adv=2.0)
    # Teacher and student then agree on some images.
    student[1].bias.data[teacher(torch.full((1, 3, 16, 16), 0.5)).argmax()] = 1.0
    synthesizer = FastSynthesizer(config, teacher, TASK, warm_up=False)
    meta, start = copy.deepcopy(synthesizer.generator), copy.deepcopy(synthesizer.generator)
    outer, average = torch.optim.Adam(meta.parameters(), lr=3 * config.lr_g, betas=(0.5, 0.999)), None
    for round in range(2):
        torch.manual_seed(round)
        batch = synthesizer.synthesize(student)
        torch.manual_seed(round)
        z, adapted, seen = torch.randn(6, 4, requires_grad=True), copy.deepcopy(meta), []
        groups = [{"params": adapted.parameters(), "lr": config.lr_g}, {"params": [z], "lr": config.lr_z}]
        inner, sums = torch.optim.Adam(groups, betas=(0.5, 0.999)), [0 for _ in meta.parameters()]
        for _ in range(3):
            images = adapted(z)
            losses, blended = by_hand(config, teacher, student, images, batch.labels, average)
            inner.zero_grad()
            losses["loss"].backward()
            sums = [total + p.grad for total, p in zip(sums, adapted.parameters())]
            inner.step()
            seen.append((losses["loss"].item(), images.detach()))
        average = blended
        for p, new, total in zip(meta.parameters(), adapted.parameters(), sums):
            p.grad = total if is_maml else 67 * (p.detach() - new.detach())
        outer.step()
        lowest = min(seen, key=lambda pair: pair[0])
        assert batch.scalars["loss_synthesis"].item() == pytest.approx(lowest[0], rel=1e-3) and losses["loss_adv"] < 0
        assert (batch.images - lowest[1]).abs().mean() < 2e-2 * (seen[0][1] - seen[-1][1]).abs().mean()
        found, expected, before = (
            torch.cat([p.detach().flatten() for p in g.parameters()]) for g in (synthesizer.generator, meta, start)
        )
        assert (found - expected).abs().mean() < 3e-2 * (expected - before).abs().mean()


def test_with_gradient():
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    wanted = [torch.randn(3), torch.randn(2, 2)]
    with_gradient(parameters, wanted).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, wanted))


def test_the_meta_learning_rate_is_g_steps_times_lr_g(teacher):
    saved = FastSynthesizer(small(lr_g=1.0), teacher, TASK, warm_up=True).state_dict()
    synthesizer = FastSynthesizer(small(lr_g=2e-3), teacher, TASK, warm_up=False)
    for _ in range(2):
        (group,) = synthesizer.meta_optimizer.param_groups
        assert group["lr"] == pytest.approx(6e-3) and group["betas"] == (0.5, 0.999)
        synthesizer.load_state_dict(saved)


def test_blended_statistics_by_hand():
    batch = [(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]))]
    average = [(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]))]
    ((mean, var),) = blend(batch, average, 0.75)
    assert torch.allclose(mean, torch.tensor([2.5, 0.5])) and torch.allclose(var, torch.tensor([1.0, 3.5]))
    assert blend(batch, [], 0.75) is batch


def test_bn_loss_takes_the_average_of_earlier_rounds(teacher):
    """Loss and running average after each of three rounds of one step on fixed images."""
    inversion = Inversion(small(g_steps=1, bn=2.0, oh=0.0, bn_mmt=0.8), teacher, TASK, 0.0)
    labels = torch.arange(6)
    mean_after = var_after = None
    for _ in range(3):
        images = torch.rand(6, 3, 16, 16, requires_grad=True)
        var, mean = torch.var_mean(teacher[0](images.detach()), (0, 2, 3), correction=0)
        if mean_after is not None:
            mean, var = 0.2 * mean + 0.8 * mean_after, 0.2 * var + 0.8 * var_after
        expected = (mean - teacher[1].running_mean).norm() + (var - teacher[1].running_var).norm()
        batch = inversion.descend(lambda: images, torch.optim.SGD([images], 0.1), labels, None)
        assert torch.allclose(batch.scalars["loss_bn"], expected, rtol=1e-4)
        assert torch.allclose(batch.scalars["loss_synthesis"], 2 * expected, rtol=1e-4)
        mean_after, var_after = mean, var
        assert torch.allclose(inversion.average[0][0], mean, atol=1e-5)
        assert torch.allclose(inversion.average[0][1], var, rtol=1e-4, atol=1e-6)
        assert not inversion.average[0][0].requires_grad


def test_the_average_moves_once_a_round(teacher, student):
    synthesizer = FastSynthesizer(small(g_steps=4), teacher, TASK, warm_up=True)
    synthesizer.synthesize(student)
    seen = []
    losses = synthesizer.inversion.measure

    def watched(*args):
        seen.append(synthesizer.inversion.average[0][0])
        return losses(*args)

    synthesizer.inversion.measure = watched
    synthesizer.synthesize(student)
    assert len(seen) == 4 and all(average is seen[0] for average in seen)
    assert synthesizer.inversion.average[0][0] is not seen[0]


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_the_images_of_lowest_loss_are_kept_as_a_copy(wanted, teacher):
    """A copy is needed since the optimizer changes the image's tensor. The augmented view of the teacher is not kept."""
    halved = dataclasses.replace(TASK, random_view=lambda images: images / 2)
    inversion = Inversion(small(g_steps=3, bn=0.0), teacher, halved, 0.0)
    pixels = torch.rand(2, 3, 16, 16, requires_grad=True)
    seen = []

    def losses(images, labels, student):
        value = abs(len(seen) - wanted)
        seen.append(pixels.detach().clone())
        return {"loss": value + images.sum() - images.sum().detach()}

    inversion.measure = losses
    batch = inversion.descend(lambda: pixels, torch.optim.SGD([pixels], 0.1), torch.zeros(2, dtype=torch.long), None)
    assert torch.equal(batch.images, seen[wanted]) and batch.scalars["loss_synthesis"] == 0
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def changed(network, before):
    return {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("reset_l0, warm_up", [(1, False), (0, False), (1, True)])
def test_the_first_layer_is_reset_once(reset_l0, warm_up, teacher, student):
    """At learning rate 0 only a reset changes the meta generator."""
    config = small(g_steps=1, lr_g=0.0, reset_l0=reset_l0, reset_l0_round=2)
    synthesizer = FastSynthesizer(config, teacher, TASK, warm_up=warm_up)
    found = []
    for _ in range(5):
        before = weights(synthesizer.generator)
        nn.init.ones_(before["project.bias"])
        with torch.no_grad():
            synthesizer.generator.project.bias.fill_(1.0)  # makes a reset to 0 visible
        synthesizer.synthesize(student)
        found.append(changed(synthesizer.generator, before))
    once = {"project.weight", "project.bias"} if reset_l0 and not warm_up else set()
    assert found == [set(), set(), once, set(), set()]


def test_rounds_are_counted_from_the_end_of_warm_up(teacher, student):
    warm = FastSynthesizer(small(g_steps=1), teacher, TASK, warm_up=True)
    for _ in range(3):
        warm.synthesize(student)
    main = FastSynthesizer(small(g_steps=1), teacher, TASK, warm_up=False)
    main.load_state_dict(warm.state_dict())
    assert (warm.rounds, main.rounds) == (3, 0)
    main.synthesize(student)
    again = FastSynthesizer(small(g_steps=1), teacher, TASK, warm_up=False)
    again.load_state_dict(main.state_dict())
    assert again.rounds == 1


def test_the_adapted_generator_is_a_copy(teacher, student):
    synthesizer = FastSynthesizer(SMALL, teacher, TASK, warm_up=True)
    before = weights(synthesizer.generator)
    adapted = [p.data_ptr() for p in synthesizer.adapted.parameters()]
    synthesizer.synthesize(student)
    assert not {p.data_ptr() for p in synthesizer.generator.parameters()} & set(adapted)
    assert [p.data_ptr() for p in synthesizer.adapted.parameters()] == adapted, "allocated once"
    assert changed(synthesizer.generator, before) == set(before)
    assert changed(synthesizer.adapted, weights(synthesizer.generator)) == set(before)


def test_adaptation_begins_at_the_meta_generator(teacher, student):
    synthesizer = FastSynthesizer(small(lr_g=0.0), teacher, TASK, warm_up=True)
    with torch.no_grad():
        for p in synthesizer.generator.parameters():
            p.add_(0.5)
    synthesizer.synthesize(student)
    assert not changed(synthesizer.adapted, weights(synthesizer.generator))


def test_warm_up_does_not_ask_the_student(teacher, student):
    def unasked(images):
        raise AssertionError("the student was asked")

    warm = FastSynthesizer(SMALL, teacher, TASK, warm_up=True).synthesize(unasked)
    assert "loss_adv" not in warm.scalars
    with pytest.raises(AssertionError, match="asked"):
        FastSynthesizer(SMALL, teacher, TASK, warm_up=False).synthesize(unasked)


def test_the_synthesis_loss_is_the_weighted_sum(teacher, student):
    inversion = Inversion(small(bn=3.0, oh=0.5), teacher, TASK, adv=2.0)
    images, labels = torch.rand(40, 3, 16, 16), torch.arange(40) % 10
    student[1].bias.data.zero_()
    student[1].bias.data[teacher(images[:1]).argmax()] = 0.3  # makes teacher and student agree on some images only
    losses = inversion.losses(images, labels, student)
    t, s = teacher(images), student(images)
    agree = t.argmax(1) == s.argmax(1)
    assert 0 < agree.sum() < 40
    kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    assert torch.allclose(losses["loss_adv"], -(kl * agree).mean(), atol=1e-6)
    assert torch.allclose(losses["loss_adv"], adversarial_loss(s, t, agreeing_only=True))
    total = 3 * losses["loss_bn"] + 0.5 * F.cross_entropy(t, labels) + 2 * losses["loss_adv"]
    assert torch.allclose(losses["loss"], total, rtol=1e-5)


@pytest.mark.parametrize("is_maml", [1, 0])
def test_the_state_goes_on_bit_for_bit(is_maml, teacher, student):
    config = small(is_maml=is_maml, reset_l0=1, reset_l0_round=3)
    first = FastSynthesizer(config, teacher, TASK, warm_up=False)
    for _ in range(2):
        first.synthesize(student)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = FastSynthesizer(config, teacher, TASK, warm_up=False)
    second.load_state_dict(torch.load(file, weights_only=True))
    for round in range(3):
        batches = []
        for synthesizer in (first, second):
            torch.manual_seed(round)
            batches.append(synthesizer.synthesize(student))
        assert torch.equal(batches[0].images, batches[1].images) and torch.equal(batches[0].labels, batches[1].labels)
        assert not changed(second.generator, weights(first.generator))


def test_without_bn_statistics(student):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)).requires_grad_(False)
    batch = FastSynthesizer(small(bn=0.0), teacher, TASK, warm_up=False).synthesize(student)
    assert "loss_bn" not in batch.scalars and batch.images.shape == (6, 3, 16, 16)


BAD = {
    "g_steps": (0, "--g_steps 0 found, a whole number from 1 on wanted"),
    "synthesis_batch_size": (0, "--synthesis_batch_size 0"),
    "reset_l0_round": (-1, "--reset_l0_round -1"),
    "bn_mmt": (1.0, "--bn_mmt 1.0 found, a number from 0, below 1 wanted"),
    "is_maml": (2, "--is_maml 2 found, a whole number from 0 to 1 wanted"),
    "reset_l0": (-1, "--reset_l0 -1 found"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags(name, teacher, student):
    value, message = BAD[name]
    with pytest.raises(UserError, match=message):
        Fast(small(**{name: value}), teacher, student, TASK)


def test_the_state_of_another_method_or_size_is_one_line(teacher):
    synthesizer = FastSynthesizer(SMALL, teacher, TASK, warm_up=False)
    other = FastSynthesizer(small(nz=5), teacher, TASK, warm_up=True).state_dict()
    for state in ({"steps": 3}, other):
        with pytest.raises(UserError, match="another --method or for networks of other sizes") as caught:
            synthesizer.load_state_dict(state)
        assert "\n" not in str(caught.value)
