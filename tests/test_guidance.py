"""Generative priors, sampling, teacher guidance and latent CutMix, on random miniatures. CPU, no network."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from datafree.base import Task
from datafree.bn_statistics import BNStatistics, bn_loss
from datafree.diffusion import pixel
from datafree.diffusion.generative import PIPELINES, load_prior
from datafree.diffusion.generator import Competitor, GuidedGenerator
from datafree.diffusion.guidance import BACKPROP, Guidance, lca_steps, memory_errors
from datafree.diffusion.latent_cutmix import LARGEST_SHARE, draw_cutmix, seams
from datafree.diffusion.prior import seeded_generators, seeded_noise
from datafree.diffusion.sampling import RULES, Trajectory, cosine_trajectory, own_rule, scheduler_trajectory
from engine.errors import UserError
from models.classifier import Classifier, frozen
from models.load import build_network
from tests import tiny_pipelines

NAMES = tuple("abcdefghij")
KINDS = ("stable_diffusion", "sdxl", "turbo", "dit", "pixel_unet", "patch_prior")
LABELS, SEEDS = torch.tensor([3, 1, 4, 1, 5]), [11, 5, 11, 7, 2]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("priors")
    names = {kind: kind + (".safetensors" if kind == "patch_prior" else "") for kind in KINDS}
    return {kind: getattr(tiny_pipelines, kind)(root / name) for kind, name in names.items()}


@pytest.fixture(scope="module")
def priors(paths):
    scale = {"turbo": 0.0}
    return {k: load_prior(p, num_classes=10, class_names=NAMES, guidance_scale=scale.get(k, 3.0)) for k, p in paths.items()}


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return frozen(Classifier(build_network("resnet8", 10), 10, 16, (0.3,) * 3, (0.3,) * 3))


@pytest.fixture(scope="module")
def task():
    return Task(10, 16, torch.device("cpu"), lambda images: images, None, NAMES)


def drawn(generator, batch_size=5, order=None):
    """Images of all labels and seeds, ``batch_size`` at a time."""
    index = torch.arange(len(LABELS)) if order is None else order
    parts = [generator.generate(LABELS[i], [SEEDS[j] for j in i], [0] * len(i)).images for i in index.split(batch_size)]
    return torch.cat(parts)[index.argsort()]


@torch.no_grad()
def surer(student):
    """A teacher's copy that is of its opinion everywhere, so that the mask lets all images pass, but not as sure."""
    student.network.fc.weight.mul_(3)
    student.network.fc.bias.mul_(3)


# Sampling


def trajectories():
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    yield cosine_trajectory(6, "cpu")
    for prediction in ("epsilon", "v_prediction", "sample"):
        yield scheduler_trajectory(DDIMScheduler(prediction_type=prediction), 6, "cpu")
    yield scheduler_trajectory(EulerDiscreteScheduler(timestep_spacing="trailing"), 6, "cpu")


def test_levels_end_clean_and_keep_the_variance():
    for trajectory in trajectories():
        assert len(trajectory) == 6 and len(trajectory.alphas) == len(trajectory.sigmas) == 7
        assert trajectory.alphas[-1] == 1 and trajectory.sigmas[-1] == 0
        assert all(a < b for a, b in zip(trajectory.alphas, trajectory.alphas[1:]))
        assert all(math.isclose(a * a + s * s, 1, abs_tol=1e-6) for a, s in zip(trajectory.alphas, trajectory.sigmas))


@pytest.mark.parametrize("rule", RULES[:2])
def test_a_perfect_prediction_leads_to_the_clean_latent(rule):
    clean, noise = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1, torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for trajectory in trajectories():
        latents = trajectory.alphas[0] * clean + trajectory.sigmas[0] * noise
        previous = None
        for k in range(6):
            alpha, sigma = trajectory.alphas[k], trajectory.sigmas[k]
            outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}
            output = outputs[trajectory.prediction]
            assert torch.allclose(trajectory.clean(latents, k, output), clean, atol=1e-6)
            latents, previous = trajectory.step(rule, latents, k, clean, previous), clean
            assert torch.allclose(latents, trajectory.alphas[k + 1] * clean + trajectory.sigmas[k + 1] * noise, atol=1e-6)


def test_steps_are_those_of_the_library():
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    torch.manual_seed(0)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def model(latents, t):
        return torch.tanh(latents * 0.7 + float(t) / 3000)

    def library(scheduler, latents):
        scheduler.set_timesteps(8)
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            latents = scheduler.step(model(scheduler.scale_model_input(latents, t), t), t, latents).prev_sample
        return latents

    def ours(scheduler, rule, latents):
        trajectory, previous = scheduler_trajectory(scheduler, 8, "cpu"), None
        for k, t in enumerate(trajectory.times):
            clean = trajectory.clean(latents, k, model(latents, t))
            latents, previous = trajectory.step(rule, latents, k, clean, previous), clean
        return latents

    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    ddim = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    assert torch.allclose(library(ddim, noise), ours(ddim, "ddim", noise), atol=1e-4)
    dpm = DPMSolverMultistepScheduler(**betas, timestep_spacing="trailing", final_sigmas_type="zero")
    assert torch.allclose(library(dpm, noise), ours(dpm, "dpmsolver++", noise), atol=1e-3)
    # Euler's steps are in another scale: its noise has the standard deviation sigma / alpha, ours 1.
    euler = EulerDiscreteScheduler(**betas, timestep_spacing="trailing")
    start = scheduler_trajectory(euler, 8, "cpu").sigmas[0]
    assert torch.allclose(library(euler, noise), ours(euler, "ddim", noise * start), atol=1e-3)


def test_an_ancestral_step_keeps_the_variance():
    clean, noise, fresh = torch.zeros(1, 1, 300, 300), *torch.randn(2, 1, 1, 300, 300, generator=seeded_generators([0])[0])
    for trajectory in trajectories():
        for k in range(1, 5):
            after = trajectory.step("ancestral", trajectory.sigmas[k] * noise, k, clean, noise=fresh)
            assert abs(float(after.std()) - trajectory.sigmas[k + 1]) < 0.01
            back = trajectory.renoise(trajectory.sigmas[k + 1] * noise, k + 1, fresh)
            assert abs(float(back.std()) - trajectory.sigmas[k]) < 0.01


def test_cosine_steps_are_those_of_the_pixel_prior():
    trajectory = cosine_trajectory(4, "cpu")
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for k, t in enumerate(trajectory.times[1:], 1):
        assert torch.allclose(trajectory.clean(x, k, v), pixel.clean_estimate(x, v, t), atol=1e-6)
        t_next = torch.tensor(1 - (k + 1) / 4)
        assert torch.allclose(trajectory.step("ddim", x, k, v), pixel.ddim_step(x, v, t, t_next), atol=1e-5)


def test_rules_of_known_schedulers():
    import diffusers

    expected = {
        "PNDMScheduler": "dpmsolver++", "DDIMScheduler": "ddim", "EulerDiscreteScheduler": "ddim",
        "DDPMScheduler": "ancestral", "EulerAncestralDiscreteScheduler": "ancestral",
        "DPMSolverMultistepScheduler": "dpmsolver++",
    }  # fmt: skip
    assert {name: own_rule(getattr(diffusers, name)()) for name in expected} == expected
    with pytest.raises(ValueError, match="FlowMatch"):
        scheduler_trajectory(diffusers.FlowMatchEulerDiscreteScheduler(), 4, "cpu")


# Priors


@pytest.mark.parametrize("kind", KINDS)
def test_classifier_free_guidance(priors, kind, monkeypatch):
    prior = priors[kind]
    z, time = seeded_noise([1, 2], prior.shape), prior.trajectory(4).times[1]
    condition = prior.condition(torch.tensor([0, 7]), [0, 0])
    outputs = []
    for scale in (0.0, 1.0, 2.0, 3.0):
        monkeypatch.setattr(prior, "guidance_scale", scale)
        outputs.append(prior.predict(z, time, condition))
    assert outputs[0].shape == z.shape and torch.equal(outputs[0], outputs[1])
    assert torch.allclose(outputs[3] - outputs[2], outputs[2] - outputs[1], atol=1e-4)
    assert prior.external_prior == kind


@pytest.mark.parametrize("kind", ["stable_diffusion", "sdxl"])
def test_unguided_latents_are_those_of_the_library_s_pipeline(priors, kind):
    """Prompts, sizes, classifier-free guidance and steps, all at once, but for the last noise that the library leaves in."""
    prior, steps = priors[kind], 5
    trajectory, condition = prior.trajectory(steps), prior.condition(torch.tensor([2]), [0])
    latents = start = seeded_noise([3], prior.shape)
    if kind == "sdxl":
        start = start / trajectory.sigmas[0]  # Euler's scale
    theirs = prior.pipeline(
        prompt=condition, guidance_scale=3.0, num_inference_steps=steps, latents=start, output_type="latent"
    ).images
    for k, time in enumerate(trajectory.times):
        clean = trajectory.clean(latents, k, prior.predict(latents, time, condition))
        latents = trajectory.step("ddim", latents, k, clean)
    assert condition == ["a photo of a c"] and (latents - theirs).norm() < 0.03 * theirs.norm()


def test_templates_take_turns_and_are_encoded_once(paths):
    prior = load_prior(
        paths["stable_diffusion"], num_classes=10, class_names=NAMES, prompts=("a {label}", "one {label}", "thing")
    )
    prompts = prior.condition(torch.tensor([0, 1, 0, 0]), [0, 0, 1, 2])
    assert prompts == ["a a", "a b", "one a", "thing"]
    z = seeded_noise([1] * 4, prior.shape)
    prior.predict(z, prior.trajectory(2).times[0], prompts)
    assert set(prior.encoded) == set(prompts)
    first = prior.encoded["a a"]
    prior.predict(z, prior.trajectory(2).times[0], prompts)
    assert prior.encoded["a a"] is first


def test_class_map(paths):
    prior = load_prior(paths["dit"], num_classes=2, class_map=(7, 3))
    assert prior.condition(torch.tensor([0, 1, 1]), [0] * 3).tolist() == [7, 3, 3]
    assert prior._with_null(prior.condition(torch.tensor([1]), [0])).tolist() == [10, 3]


def test_another_resolution_and_half_precision(paths, teacher, task):
    prior = load_prior(paths["sdxl"], num_classes=10, class_names=NAMES, resolution=16, dtype=torch.bfloat16)
    prior.checkpoint_gradients()
    batch = GuidedGenerator(prior, Guidance(teacher, 16, bn=0.1), task, steps=2).generate(LABELS, SEEDS, [0] * 5)
    assert prior.shape == (4, 8, 8) and batch.full.shape == (5, 3, 16, 16)
    assert batch.full.dtype == torch.float32 and batch.full.isfinite().all()


def test_grey_pixels_become_three_channels(tmp_path, teacher, task):
    path = tiny_pipelines.pixel_unet(tmp_path / "grey", channels=1)
    images = drawn(GuidedGenerator(load_prior(path, num_classes=10), Guidance(teacher, 16), task, steps=2))
    assert images.shape == (5, 3, 16, 16) and torch.equal(images[:, 0], images[:, 2])


# Guidance


@pytest.mark.parametrize("kind", ["stable_diffusion", "pixel_unet", "patch_prior"])
@pytest.mark.parametrize("backprop", BACKPROP)
def test_gradient_is_that_of_finite_differences(paths, kind, backprop, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # all of it in float64
    prior = load_prior(paths[kind], num_classes=10, class_names=NAMES, guidance_scale=2.0, dtype=torch.float64)
    teacher = frozen(Classifier(build_network("resnet8", 10), 10, 16, (0.3,) * 3, (0.3,) * 3).double())
    student = Classifier(build_network("resnet8", 10), 10, 16, (0.3,) * 3, (0.3,) * 3).double().eval()
    student.load_state_dict(teacher.state_dict())
    surer(student)
    guidance = Guidance(teacher, 16, bn=0.5, oh=1.0, adv=0.7, backprop=backprop, student=student)
    trajectory, k = prior.trajectory(5), 2
    z = seeded_noise([1, 2], prior.shape).double()
    targets = F.one_hot(torch.tensor([3, 8]), 10).double()
    condition = prior.condition(torch.tensor([3, 8]), [0, 0])
    output, gradient = guidance.gradient(prior, trajectory, z, k, condition, targets)
    assert torch.equal(output, prior.predict(z, trajectory.times[k], condition)) and gradient.shape == z.shape

    def loss(latents):
        used = prior.predict(latents, trajectory.times[k], condition) if backprop == "unet" else output
        return guidance.loss(guidance.view(prior, trajectory, latents, k, used), targets)

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


@pytest.mark.parametrize("backprop", BACKPROP)
@pytest.mark.parametrize("terms", [{"oh": 1.0}, {"oh": 0.0, "bn": 1.0}, {"oh": 0.0, "adv": 1.0}], ids=str)
def test_every_term_changes_the_image(priors, teacher, task, backprop, terms):
    prior, settings = priors["patch_prior"], dict(steps=4)
    torch.manual_seed(3)
    student = Classifier(build_network("resnet8", 10), 10, 16, (0.3,) * 3, (0.3,) * 3).eval()
    student.load_state_dict(teacher.state_dict())
    surer(student)
    guidance = Guidance(teacher, 16, **terms, backprop=backprop, student=student)
    guided = drawn(GuidedGenerator(prior, guidance, task, **settings))
    unguided = drawn(GuidedGenerator(prior, Guidance(teacher, 16, oh=0.0), task, **settings))
    assert (guided - unguided).abs().max() > 1e-4


def test_the_one_hot_term_makes_the_teacher_surer(priors, teacher, task):
    prior = priors["patch_prior"]
    losses = []
    for lr in (0.0, 1.0, 5.0):
        images = drawn(GuidedGenerator(prior, Guidance(teacher, 16, lr=lr), task, steps=10))
        losses.append(float(F.cross_entropy(teacher(images), LABELS)))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_depend_on_the_batch(priors, teacher, task, kind):
    generator = GuidedGenerator(priors[kind], Guidance(teacher, 16), task, steps=3)
    whole = drawn(generator)
    assert whole.shape == (5, 3, 16, 16) and whole.dtype == torch.float32 and 0 <= whole.min() and whole.max() <= 1
    assert torch.equal(whole, drawn(generator))
    # ancestral steps of an untrained model, 0.006 of a signal to begin with, amplify the last bit of a convolution
    tolerance = 2e-3 if kind == "pixel_unet" else 2e-5
    assert (drawn(generator, 2) - whole).abs().max() < tolerance
    assert (drawn(generator, 3, torch.tensor([4, 2, 0, 3, 1])) - whole).abs().max() < tolerance
    assert (whole[1] - whole[3]).abs().max() > 1e-3  # one class, two seeds


@pytest.mark.parametrize("backprop", BACKPROP)
def test_micro_batches_change_nothing_but_rounding(priors, teacher, task, backprop):
    def images(micro_batch):
        guidance = Guidance(teacher, 16, bn=1.0, backprop=backprop, micro_batch=micro_batch)
        return drawn(GuidedGenerator(priors["patch_prior"], guidance, task, steps=4, lca=[2]))

    assert (images(2) - images(0)).abs().max() < 1e-4


def test_checkpointed_gradients_are_the_same(paths, teacher, task):
    def images(checkpoint):
        prior = load_prior(paths["stable_diffusion"], num_classes=10, class_names=NAMES)
        if checkpoint:
            prior.checkpoint_gradients()
            assert prior.network.is_gradient_checkpointing and prior.vae.is_gradient_checkpointing
        return drawn(GuidedGenerator(prior, Guidance(teacher, 16, bn=1.0), task, steps=2))

    assert (images(True) - images(False)).abs().max() < 1e-5


def test_weights_get_no_gradients_and_do_not_change(priors, teacher, task):
    prior = priors["stable_diffusion"]
    before = [p.clone() for m in (prior.network, prior.vae, teacher) for p in m.state_dict().values()]
    drawn(GuidedGenerator(prior, Guidance(teacher, 16, bn=1.0), task, steps=2))
    after = [p for m in (prior.network, prior.vae, teacher) for p in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not any(p.grad is not None for m in (prior.network, prior.vae, teacher) for p in m.parameters())


# The student of the adversarial term


def test_the_student_learns_from_what_was_made_and_then_competes(priors, teacher, task):
    torch.manual_seed(4)
    fresh = Classifier(build_network("resnet8", 10), 10, 16, (0.3,) * 3, (0.3,) * 3)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}

    def build():
        guidance = Guidance(teacher, 16, oh=0.0, adv=1.0)
        competitor = Competitor(20, 3, temperature=30.0, batch_size=8, lr=0.05)
        return GuidedGenerator(priors["patch_prior"], guidance, task, fresh, steps=3, competitor=competitor)

    generator = build()
    assert not generator.wants_to_learn(0) and not generator.wants_to_learn(19) and generator.wants_to_learn(20)
    assert not generator.guidance.active
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
    generator = GuidedGenerator(priors["patch_prior"], Guidance(teacher, 16), task, steps=2)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        logits = teacher(images.float() / 255)
    figures = generator.measure(images, logits.argmax(1))
    assert figures["teacher_acc1"] == 100 and figures["loss_bn"] > 0
    assert figures["loss_oh"] == pytest.approx(float(F.cross_entropy(logits, logits.argmax(1))), rel=1e-4)
    assert generator.measure(images, (logits.argmax(1) + 1) % 10)["teacher_acc1"] == 0


# Latent CutMix


def test_cutmix_pastes_boxes_of_partners():
    mix = draw_cutmix(seeded_generators(list(range(40))), 16, 12)
    values = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 2, 16, 12)
    mixed = mix(values)
    assert bool((mix.partners != torch.arange(40)).all()) and 0 <= mix.partners.min() and mix.partners.max() < 40
    assert bool((mixed[mix.masks.expand_as(mixed)].view(-1) >= 0).all())
    for i in range(40):
        rows, columns = mix.masks[i, 0].any(1), mix.masks[i, 0].any(0)
        assert mix.masks[i, 0].sum() == rows.sum() * columns.sum() > 0  # a box
        assert set(mixed[i].unique().tolist()) == {float(i), float(mix.partners[i])}
        assert mix.shares[i] == pytest.approx(float((mixed[i] != i).float().mean())) and mix.shares[i] < LARGEST_SHARE + 0.1
    targets = mix.targets(F.one_hot(torch.arange(40)).float())
    assert torch.allclose(targets.sum(1), torch.ones(40))
    assert torch.allclose(targets[torch.arange(40), mix.partners], mix.shares)


def test_a_box_is_drawn_from_the_image_s_own_stream():
    one, other = (draw_cutmix(seeded_generators(seeds), 8, 8) for seeds in ([1, 2, 3], [9, 2, 8]))
    assert torch.equal(one.masks[1], other.masks[1]) and one.partners[1] == other.partners[1]
    assert not torch.equal(one.masks, other.masks)


def test_seams_surround_the_box():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6, 2:6] = True
    seam = seams(mask)
    assert bool(seam[0, 0, 1, 3]) and bool(seam[0, 0, 2, 3]) and not bool(seam[0, 0, 3, 3]) and not bool(seam[0, 0, 0, 3])
    assert seam.sum() == 36 - 4


def test_lca_mixes_batches_only_and_repair_redraws_the_seam(priors, teacher, task):
    prior, guidance = priors["patch_prior"], Guidance(teacher, 16)

    def images(lca, repair=0, batch_size=5):
        return drawn(GuidedGenerator(prior, guidance, task, steps=5, lca=lca, lca_repair=repair), batch_size)

    plain, mixed = images([]), images([2, 3])
    assert (plain - mixed).abs().mean() > 1e-2 and torch.equal(mixed, images([2, 3]))
    assert (images([2, 3], batch_size=1) - plain).abs().max() < 1e-5  # nobody to mix with
    assert (images([2, 3], repair=2) - mixed).abs().mean() > 1e-3


def test_when_latents_are_mixed():
    assert lca_steps(20, None) == [4, 8, 12, 16] and lca_steps(50, 20) == [20, 40] and lca_steps(20, 0) == []
    assert lca_steps(4, None) == [1, 2, 3] and lca_steps(1, None) == []


# Bad input


BAD = {
    "wrong kind": (dict(kind="image_variation"), "holds a StableDiffusionImageVariationPipeline; wanted: StableDiffusion"),
    "too many classes": (dict(kind="dit", num_classes=12), "dit knows 10 classes, id 10 is none of them .* --class_map"),
    "short map": (dict(kind="dit", class_map=(1, 2)), "--class_map has 2 ids for the 10 classes"),
    "wrong map": (dict(kind="dit", num_classes=2, class_map=(1, 99)), "id 99"),
    "no names": (dict(kind="stable_diffusion", class_names=None), "--prompt .* wants class names"),
    "no null class": (dict(kind="pixel_unet", num_classes=5), "without a null class, .* --guidance_scale 1"),
    "wrong null class": (dict(kind="pixel_unet", num_classes=5, null_class=30), "--null_class 30"),
    "fixed size": (dict(kind="dit", resolution=64), "--resolution 64: dit draws 32 px only"),
    "odd size": (dict(kind="sdxl", resolution=30), "--resolution 30 is no multiple of 8; sdxl was made for 32"),
    "own size": (dict(kind="patch_prior", resolution=32), "--resolution 32"),
    "missing file": (dict(model="no/such.safetensors"), "no/such.safetensors does not exist"),
    "unreachable": (dict(model="some/model"), "neither a directory here .* 'hf download some/model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_priors_are_one_line(case, paths, tmp_path):
    settings, pattern = BAD[case]
    settings = {"num_classes": 10, "class_names": NAMES} | settings
    kind, model = settings.pop("kind", None), settings.pop("model", None)
    if kind == "image_variation":
        model = tiny_pipelines.image_variation(tmp_path / kind)
    with pytest.raises(UserError, match=pattern) as caught:
        load_prior(model or paths[kind], **settings)
    assert "\n" not in str(caught.value)


def test_an_unconditional_model_is_refused(tmp_path):
    path = tiny_pipelines.pixel_unet(tmp_path / "plain", classes=None)
    with pytest.raises(UserError, match="a class-conditional model is wanted"):
        load_prior(path, num_classes=10)
    assert "DDPMPipeline" in PIPELINES


def test_nan_latents_name_the_step(priors, teacher, task):
    generator = GuidedGenerator(priors["patch_prior"], Guidance(teacher, 16, lr=math.inf), task, steps=3)
    with pytest.raises(UserError, match="denoising step 1 of 3; .* are kept: give --diffusion_dtype fp32 or a lower"):
        drawn(generator)


def test_too_many_steps(priors):
    with pytest.raises(UserError, match="--num_inference_steps 2000"):
        priors["dit"].trajectory(2000)


def test_out_of_memory_names_the_flags():
    pattern = "--gradient_checkpointing, --guidance_backprop decoder, --diffusion_dtype .* --resolution .* --diffusion_batch"
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(UserError, match=pattern), memory_errors():
            raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        raise RuntimeError("shapes differ")


def test_a_trajectory_of_one_step():
    assert len(Trajectory(torch.tensor([999]), (0.1, 1.0), (0.995, 0.0), "epsilon")) == 1
