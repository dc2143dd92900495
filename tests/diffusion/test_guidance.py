"""Teacher guidance, on small random models: its gradient, its terms and its images. CPU, no network connection."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from datafree.diffusion.guidance import BACKPROP, Guidance, memory_errors
from datafree.diffusion.guided_sampler import Competitor, GuidedSampler
from datafree.diffusion.priors import load_prior
from datafree.diffusion.variation import seeded_generators, seeded_noise
from datafree.losses import BNStatistics, bn_loss
from engine.runtime.errors import UserError
from models.classifier import frozen
from tests import tiny_pipelines
from tests.conftest import make_classifier, make_task

NAMES = tuple("abcdefghij")
KINDS = tiny_pipelines.GENERATIVE
LABELS, SEEDS = torch.tensor([3, 1, 4, 1, 5]), [11, 5, 11, 7, 2]


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return frozen(make_classifier())


@pytest.fixture(scope="module")
def competitor(teacher):
    """A student that agrees with the teacher on some images only."""
    student = copy.deepcopy(teacher)
    torch.manual_seed(7)
    with torch.no_grad():
        student.network.fc.weight.add_(0.5 * torch.randn_like(student.network.fc.weight))
    return student


@pytest.fixture(scope="module")
def task():
    return make_task(class_names=NAMES)


def terms(teacher, student, images, labels, bn, oh, adv, held=None):
    """The three weighted terms of L (``datafree.diffusion.guidance``), computed by the formulas of the paper.

    Args:
        held: teacher logits for L_adv; None: the teacher's logits of ``images``, without their gradient.
    """
    inputs, layers = [], [m for m in teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    t = teacher(images)
    for hook in hooks:
        hook.remove()
    distance = 0
    for x, layer in zip(inputs, layers):
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
        distance = distance + (mean - layer.running_mean).norm() + (var - layer.running_var).norm()
    entropy = (t.logsumexp(1) - t[torch.arange(len(t)), labels]).mean()
    s, t = student(images), t.detach() if held is None else held
    p = t.softmax(1)
    divergence = (p * (t - t.logsumexp(1, True) - s + s.logsumexp(1, True))).sum(1)
    agree = (s.argmax(1) == t.argmax(1)).to(divergence)
    return bn * distance, oh * entropy, -adv * (agree * divergence).sum() / len(images)


def drawn(generator, batch_size=5, order=None):
    """Images for all of ``LABELS`` and ``SEEDS``, sampled in batches of ``batch_size``."""
    index = torch.arange(len(LABELS)) if order is None else order
    parts = [generator.draw(LABELS[i], [SEEDS[j] for j in i], [0] * len(i)).images for i in index.split(batch_size)]
    return torch.cat(parts)[index.argsort()]


@torch.no_grad()
def surer(student):
    """Multiplies the logits of a teacher's copy by 3. It still agrees with the teacher on all images, but L_adv is not 0."""
    student.network.fc.weight.mul_(3)
    student.network.fc.bias.mul_(3)


def test_another_resolution_and_half_precision(generative, teacher, task):
    prior = load_prior(generative["sdxl"], num_classes=10, class_names=NAMES, resolution=16, dtype=torch.bfloat16)
    prior.checkpoint_gradients()
    batch = GuidedSampler(prior, Guidance(teacher, 16, bn=0.1), task, steps=2).draw(LABELS, SEEDS, [0] * 5)
    assert prior.shape == (4, 8, 8) and batch.full.shape == (5, 3, 16, 16)
    assert batch.full.dtype == torch.float32 and batch.full.isfinite().all()


def test_grey_pixels_become_three_channels(tmp_path, teacher, task):
    path = tiny_pipelines.pixel_unet(tmp_path / "grey", channels=1)
    images = drawn(GuidedSampler(load_prior(path, num_classes=10), Guidance(teacher, 16), task, steps=2))
    assert images.shape == (5, 3, 16, 16) and torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("kind", ["stable_diffusion", "pixel_unet", "patch_prior"])
@pytest.mark.parametrize("backprop", BACKPROP)
def test_gradient_is_that_of_finite_differences(generative, kind, backprop, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # everything stays in float64
    prior = load_prior(generative[kind], num_classes=10, class_names=NAMES, guidance_scale=2.0, dtype=torch.float64)
    teacher = frozen(make_classifier().double())
    student = make_classifier().double().eval()
    student.load_state_dict(teacher.state_dict())
    surer(student)
    guidance = Guidance(teacher, 16, bn=0.5, oh=1.0, adv=0.7, backprop=backprop, student=student)
    trajectory, k = prior.trajectory(5), 2
    z = seeded_noise([1, 2], prior.shape).double()
    targets = F.one_hot(torch.tensor([3, 8]), 10).double()
    condition = prior.condition(torch.tensor([3, 8]), [0, 0])
    output, gradient = guidance.gradient(prior, trajectory, z, k, condition, targets)
    assert torch.equal(output, prior.predict(z, trajectory.times[k], condition)) and gradient.shape == z.shape

    def view(latents):
        used = prior.predict(latents, trajectory.times[k], condition) if backprop == "unet" else output
        return guidance.view(prior, trajectory, latents, k, used)

    with torch.no_grad():
        held = teacher(view(z))  # constant in L_adv

    def loss(latents):
        return 2 * sum(terms(teacher, student, view(latents), torch.tensor([3, 8]), 0.5, 1.0, 0.7, held))

    torch.manual_seed(2)
    with torch.no_grad():
        for _ in range(3):
            direction, step = F.normalize(torch.randn_like(z).flatten(), dim=0).view_as(z), 1e-5
            slope = (loss(z + step * direction) - loss(z - step * direction)) / (2 * step)
            assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4, abs=1e-6)


def test_the_two_ways_differ(priors, teacher):
    prior = priors["patch_prior"]
    trajectory, z = prior.trajectory(5), seeded_noise([1], prior.shape)
    arguments = prior, trajectory, z, 3, prior.condition(torch.tensor([1]), [0]), F.one_hot(torch.tensor([1]), 10).float()
    unet, decoder = (Guidance(teacher, 16, backprop=way).gradient(*arguments)[1] for way in BACKPROP)
    assert (unet - decoder).norm() > 1e-3 * unet.norm() > 0


def test_the_loss_is_the_sum_of_its_terms(teacher):
    images = torch.rand(4, 3, 16, 16, generator=seeded_generators([0])[0])
    targets = F.one_hot(LABELS[:4], 10).float()
    statistics = BNStatistics(teacher)
    with statistics.collect() as stats, torch.no_grad():
        logits = teacher(images)
        distance = bn_loss(stats, statistics.running)
    assert torch.allclose(Guidance(teacher, 16).loss(images, targets), F.cross_entropy(logits, LABELS[:4], reduction="sum"))
    assert torch.allclose(Guidance(teacher, 16, bn=2.0, oh=0.0).loss(images, targets), 4 * 2 * distance)
    same = Guidance(teacher, 16, oh=0.0, adv=1.0, student=teacher).loss(images, targets)
    assert same.abs() < 1e-5
    assert Guidance(teacher, 16, oh=0.0, adv=1.0).loss(images, targets) == 0


@pytest.mark.parametrize("weights", [(0.5, 0, 0), (0, 2.0, 0), (0, 0, 3.0), (0.5, 2.0, 3.0)], ids=str)
def test_terms_and_their_gradients_are_those_of_the_formulas(teacher, competitor, weights):
    """The student agrees with the teacher on some images only; the teacher's logits are a constant in L_adv."""
    images = torch.rand(6, 3, 16, 16, generator=seeded_generators([0])[0]) * torch.linspace(0, 1, 6).view(6, 1, 1, 1)
    images.requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    agree = teacher(images).argmax(1) == competitor(images).argmax(1)
    assert 0 < agree.sum() < 6
    bn, oh, adv = weights
    loss = Guidance(teacher, 16, bn=bn, oh=oh, adv=adv, student=competitor).loss(images, F.one_hot(labels, 10).float())
    expected = 6 * sum(terms(teacher, competitor, images, labels, *weights))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    found, wanted = (torch.autograd.grad(value, images)[0] for value in (loss, expected))
    assert wanted.abs().max() > 0 and (found - wanted).norm() < 1e-4 * wanted.norm()


def test_pixels_outside_the_range_are_clamped_and_do_not_pull(priors, teacher):
    """The teacher sees the clamped images; a clamped pixel has no gradient."""
    prior = priors["patch_prior"]
    trajectory, guidance = prior.trajectory(4), Guidance(teacher, 16, backprop="decoder")
    z, condition = 3 * seeded_noise([1], prior.shape), prior.condition(torch.tensor([1]), [0])
    output, gradient = guidance.gradient(prior, trajectory, z, 2, condition, F.one_hot(torch.tensor([1]), 10).float())
    free = prior.decode(trajectory.clean(z, 2, output))
    outside = (free < 0) | (free > 1)
    assert 0.1 < outside.float().mean() < 0.9 and torch.equal(
        guidance.view(prior, trajectory, z, 2, output), free.clamp(0, 1)
    )
    assert gradient[outside].abs().max() == 0 and (gradient[~outside] != 0).float().mean() > 0.9


def test_guided_denoising_by_hand(priors, teacher, competitor, task):
    """Three steps for a batch: z - lr * B * dL/dz through the network, then DDPM's posterior (Ho et al. 2020, eq. 7)."""
    prior, labels, seeds, lr = priors["patch_prior"], torch.tensor([3, 1, 4]), [11, 5, 2], 10.0
    weights = 0.1, 1.0, 2.0
    guidance = Guidance(teacher, 16, *weights, lr=lr, student=competitor)
    found = GuidedSampler(prior, guidance, task, steps=3, rule="ancestral").draw(labels, seeds, [0] * 3).images

    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    trajectory, condition = prior.trajectory(3), prior.condition(labels, [0] * 3)
    bars = [alpha**2 for alpha in trajectory.alphas]  # alpha bar of Ho et al.; the model predicts v

    def normal():
        return torch.stack([torch.randn(3, 16, 16, generator=stream) for stream in streams])

    z = normal()
    for bar, after, time in zip(bars, bars[1:], trajectory.times):
        z.requires_grad_()
        v = prior.predict(z, time, condition)
        images = (bar**0.5 * z - (1 - bar) ** 0.5 * v) / 2 + 0.5
        loss = sum(terms(teacher, competitor, images.clamp(0, 1), labels, *weights))
        z = (z - lr * 3 * torch.autograd.grad(loss, z)[0]).detach()
        clean = (bar**0.5 * z - (1 - bar) ** 0.5 * v.detach()).clamp(-1, 1)
        step = bar / after
        mean = (after**0.5 * (1 - step) * clean + step**0.5 * (1 - after) * z) / (1 - bar)
        z = mean + ((1 - after) / (1 - bar) * (1 - step)) ** 0.5 * normal()
    assert (found - (z / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-3
    plain = GuidedSampler(prior, Guidance(teacher, 16, oh=0), task, steps=3, rule="ancestral")
    assert (found - plain.draw(labels, seeds, [0] * 3).images).abs().max() > 0.1


def test_a_long_step_is_shortened_and_a_short_one_is_not(priors, teacher):
    prior = priors["patch_prior"]
    trajectory, z, condition = prior.trajectory(4), seeded_noise([1, 2], prior.shape), torch.tensor([1, 2])
    targets = F.one_hot(condition, 10).float()
    free, output = Guidance(teacher, 16, lr=5.0).steer(prior, trajectory, z, 2, condition, targets)
    lengths = (free - z).flatten(1).norm(dim=1)
    bound = float(lengths.mean())
    found, same = Guidance(teacher, 16, lr=5.0, max_step=bound).steer(prior, trajectory, z, 2, condition, targets)
    scale = (bound / lengths).clamp(max=1).view(2, 1, 1, 1)
    assert torch.equal(output, same) and scale.min() < 1 == scale.max()
    assert torch.allclose(found, z + scale * (free - z), atol=1e-5)
    still, _ = Guidance(teacher, 16, oh=0.0).steer(prior, trajectory, z, 2, condition, targets)
    assert torch.equal(still, z)


@pytest.mark.parametrize("backprop", BACKPROP)
@pytest.mark.parametrize("terms", [{"oh": 1.0}, {"oh": 0.0, "bn": 1.0}, {"oh": 0.0, "adv": 1.0}], ids=str)
def test_every_term_changes_the_image(priors, teacher, task, backprop, terms):
    prior, settings = priors["patch_prior"], dict(steps=4)
    torch.manual_seed(3)
    student = make_classifier().eval()
    student.load_state_dict(teacher.state_dict())
    surer(student)
    guidance = Guidance(teacher, 16, **terms, backprop=backprop, student=student)
    guided = drawn(GuidedSampler(prior, guidance, task, **settings))
    unguided = drawn(GuidedSampler(prior, Guidance(teacher, 16, oh=0.0), task, **settings))
    assert (guided - unguided).abs().max() > 1e-4


def test_the_one_hot_term_makes_the_teacher_surer(priors, teacher, task):
    prior = priors["patch_prior"]
    losses = []
    for lr in (0.0, 1.0, 5.0):
        images = drawn(GuidedSampler(prior, Guidance(teacher, 16, lr=lr), task, steps=10))
        losses.append(float(F.cross_entropy(teacher(images), LABELS)))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_depend_on_the_batch(priors, teacher, task, kind):
    generator = GuidedSampler(priors[kind], Guidance(teacher, 16), task, steps=3)
    whole = drawn(generator)
    assert whole.shape == (5, 3, 16, 16) and whole.dtype == torch.float32 and 0 <= whole.min() and whole.max() <= 1
    assert torch.equal(whole, drawn(generator))
    # Ancestral steps of an untrained model start at a signal level of 0.006 and amplify the rounding of a convolution.
    tolerance = 2e-3 if kind == "pixel_unet" else 2e-5
    assert (drawn(generator, 2) - whole).abs().max() < tolerance
    assert (drawn(generator, 3, torch.tensor([4, 2, 0, 3, 1])) - whole).abs().max() < tolerance
    assert (whole[1] - whole[3]).abs().max() > 1e-3  # one class, two seeds


@pytest.mark.parametrize("backprop", BACKPROP)
def test_micro_batches_change_nothing_but_rounding(priors, teacher, task, backprop):
    def images(micro_batch):
        guidance = Guidance(teacher, 16, bn=1.0, backprop=backprop, micro_batch=micro_batch)
        return drawn(GuidedSampler(priors["patch_prior"], guidance, task, steps=4, lca=[2]))

    assert (images(2) - images(0)).abs().max() < 1e-4


def test_checkpointed_gradients_are_the_same(generative, teacher, task):
    def images(checkpoint):
        prior = load_prior(generative["stable_diffusion"], num_classes=10, class_names=NAMES)
        if checkpoint:
            prior.checkpoint_gradients()
            assert prior.network.is_gradient_checkpointing and prior.vae.is_gradient_checkpointing
        return drawn(GuidedSampler(prior, Guidance(teacher, 16, bn=1.0), task, steps=2))

    assert (images(True) - images(False)).abs().max() < 1e-5


def test_weights_get_no_gradients_and_do_not_change(priors, teacher, task):
    prior = priors["stable_diffusion"]
    before = [p.clone() for m in (prior.network, prior.vae, teacher) for p in m.state_dict().values()]
    drawn(GuidedSampler(prior, Guidance(teacher, 16, bn=1.0), task, steps=2))
    after = [p for m in (prior.network, prior.vae, teacher) for p in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not any(p.grad is not None for m in (prior.network, prior.vae, teacher) for p in m.parameters())


def test_lca_mixes_batches_only_and_repair_redraws_the_seam(priors, teacher, task):
    prior, guidance = priors["patch_prior"], Guidance(teacher, 16)

    def images(lca, repair=0, batch_size=5):
        return drawn(GuidedSampler(prior, guidance, task, steps=5, lca=lca, lca_repair=repair), batch_size)

    plain, mixed = images([]), images([2, 3])
    assert (plain - mixed).abs().mean() > 1e-2 and torch.equal(mixed, images([2, 3]))
    # A batch of one is not mixed. By rounding, a pixel at the edge of the range may lie on either side of it.
    assert (images([2, 3], batch_size=1) - plain).abs().max() < 5e-3
    assert (images([2, 3], repair=2) - mixed).abs().mean() > 1e-3


# The student of the adversarial term


def test_the_student_learns_from_what_was_made_and_then_competes(priors, teacher, task):
    fresh = copy.deepcopy(teacher)
    surer(fresh)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}

    def build():
        guidance = Guidance(teacher, 16, oh=0.0, adv=1.0)
        competitor = Competitor(20, 3, temperature=30.0, batch_size=8, lr=0.05)
        return GuidedSampler(priors["patch_prior"], guidance, task, fresh, steps=3, competitor=competitor)

    generator = build()
    assert not generator.student_is_due(0) and not generator.student_is_due(19) and generator.student_is_due(20)
    assert not generator.guidance.active
    early = build()
    early.load_state_dict(generator.state_dict())  # a run resumed before the student is due has no student either
    assert not early.guidance.active
    images_u8 = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(5)
    assert generator.fit(images_u8, torch.zeros(20))["loss_student"] > 0
    assert generator.guidance.active and not generator.guidance.student.training
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    resumed = build()
    resumed.load_state_dict(copy.deepcopy(generator.state_dict()))
    assert torch.equal(drawn(generator), drawn(resumed)) and not torch.equal(drawn(generator), drawn(build()))
    for each in (generator, resumed):
        torch.manual_seed(6)
        each.fit(images_u8, torch.zeros(20))
    assert torch.equal(drawn(generator), drawn(resumed))


def test_measured_figures(priors, teacher, task):
    generator = GuidedSampler(priors["patch_prior"], Guidance(teacher, 16), task, steps=2)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        logits = teacher(images.float() / 255)
    figures = generator.measure(images, logits.argmax(1))
    assert figures["teacher_acc1"] == 100 and figures["loss_bn"] > 0
    assert figures["loss_oh"] == pytest.approx(float(F.cross_entropy(logits, logits.argmax(1))), rel=1e-4)
    assert generator.measure(images, (logits.argmax(1) + 1) % 10)["teacher_acc1"] == 0


@pytest.mark.parametrize("classes", ["own", "none"])
def test_images_that_nothing_was_told_the_class_of_carry_the_teacher_s_label(generative, teacher, task, classes):
    prior = load_prior(generative["patch_prior"], num_classes=10, classes=classes)
    images_u8 = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    unguided = GuidedSampler(prior, Guidance(teacher, 16, oh=0.0), task, steps=2)
    batch = unguided.draw(LABELS, SEEDS, [0] * 5)
    assert torch.equal(batch.labels, teacher(batch.images).argmax(1))
    assert set(unguided.measure(images_u8, torch.zeros(6, dtype=torch.long))) == {"loss_oh", "loss_bn"}
    guided = GuidedSampler(prior, Guidance(teacher, 16), task, steps=2)
    assert torch.equal(guided.draw(LABELS, SEEDS, [0] * 5).labels, LABELS)


# Bad input


def test_nan_latents_name_the_step(priors, teacher, task):
    generator = GuidedSampler(priors["patch_prior"], Guidance(teacher, 16, lr=math.inf), task, steps=3)
    with pytest.raises(UserError, match="denoising step 1 of 3; .* are kept: give --diffusion_dtype fp32 or a lower"):
        drawn(generator)


def test_out_of_memory_names_the_flags():
    pattern = "--gradient_checkpointing, --guidance_backprop decoder, --diffusion_dtype .* --resolution .* --diffusion_batch"
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(UserError, match=pattern), memory_errors():
            raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        raise RuntimeError("shapes differ")
