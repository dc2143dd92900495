"""Augmenters: the pixel prior, and small random versions of the pretrained models. CPU, no network connection."""

import io
import math
from pathlib import Path

import pytest
import torch

from datafree.diffusion import patch_unet
from datafree.diffusion.denoising import EMA_POWER, EMA_WIDTH, Denoising
from datafree.diffusion.guidance import Guidance
from datafree.diffusion.pixel import PixelAugmenter, PriorAugmenter
from datafree.diffusion.priors import PatchPrior
from datafree.diffusion.variation import ImageToImage, ImageVariation, denoising_steps, resize, seeded_noise
from datafree.teacher_metrics import TeacherMetrics
from engine.data.image_bank import to_uint8
from engine.runtime.errors import UserError
from models.classifier import frozen
from tests.conftest import make_classifier

NAMES = ("ant", "bee", "cat", "dog")
KINDS = ("image_variation", "stable_diffusion", "sdxl", "turbo")


@pytest.fixture(scope="module")
def folders(miniature):
    return {kind: miniature(kind) for kind in (*KINDS, "clip")}


@pytest.fixture(scope="module")
def pretrained(folders):
    common = dict(class_names=NAMES, num_inference_steps=4)
    return {
        "image_variation": ImageVariation(folders["image_variation"], num_inference_steps=3),
        "stable_diffusion": ImageToImage(folders["stable_diffusion"], **common),
        "sdxl": ImageToImage(folders["sdxl"], **common),
        "turbo": ImageToImage(folders["turbo"], class_names=NAMES, num_inference_steps=2, guidance_scale=0),
    }


def bank(count=64, size=16, classes=4):
    """Images (N, 3, H, W) uint8 and labels (N,): a bright bar whose height gives the class, slightly shifted and dimmed."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    images = torch.zeros(count, 3, size, size)
    for image, label in zip(images, labels):
        top = int(label) * size // classes + int(torch.randint(2, (), generator=generator))
        image[:, top : top + 2] = 150 + 100 * torch.rand((), generator=generator)
    return images.to(torch.uint8), labels


def tiny_prior(**changes):
    settings = dict(channels=(16, 16), fit_passes=40, fit_batch_size=16, fit_lr=4e-3, num_inference_steps=6)
    return PixelAugmenter(4, 16, **settings | changes)


def fitted(prior, rounds, images, labels, first=0):
    """Trains for ``rounds`` rounds, each seeded by its position as in the stage, and returns the last round's log."""
    for round in range(first, first + rounds):
        torch.manual_seed(100 + round)
        log = prior.fit(images, labels)
    return log


@pytest.fixture(scope="module")
def trained():
    """A small prior trained on the bank, its loss after 5 and after 40 rounds, and source images with labels."""
    images, labels = bank()
    prior = tiny_prior()
    first = fitted(prior, 5, images, labels)
    last = fitted(prior, 35, images, labels, first=5)
    return prior, float(first["loss"]), float(last["loss"]), images[:7].float() / 255, labels[:7]


def one_by_one(augmenter, images, labels, seeds, batch_size):
    parts = zip(images.split(batch_size), labels.split(batch_size), torch.tensor(seeds).split(batch_size))
    return torch.cat([augmenter.augment(x, y, s.tolist()) for x, y, s in parts])


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# The pixel prior


def test_noise_and_velocity_invert_each_other():
    clean, noise, t = torch.rand(5, 3, 4, 4) * 2 - 1, torch.randn(5, 3, 4, 4), torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0])
    x_t, v = patch_unet.add_noise(clean, noise, t), patch_unet.velocity(clean, noise, t)
    phi = patch_unet.angle(t)
    assert torch.allclose(phi.cos() * x_t - phi.sin() * v, clean, atol=1e-5)
    half = patch_unet.add_noise(torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1), torch.tensor([0.5]))
    assert torch.allclose(half, torch.full_like(half, math.sqrt(2)))


def test_fit_reduces_the_loss(trained):
    _, first, last, _, _ = trained
    assert last < 0.75 * first


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_pixel_variants_do_not_depend_on_the_batch(trained, guidance_scale, monkeypatch):
    prior, _, _, images, labels = trained
    monkeypatch.setattr(prior.prior, "guidance_scale", guidance_scale)
    seeds = list(range(7))
    whole = prior.augment(images, labels, seeds)
    assert whole.shape == images.shape and whole.dtype == torch.float32 and 0 <= whole.min() and whole.max() <= 1
    for batch_size in (1, 4):
        parts = one_by_one(prior, images, labels, seeds, batch_size)
        assert (parts - whole).abs().max() < 1e-5
        assert ((parts * 255).round() == (whole * 255).round()).float().mean() > 0.999
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert (prior.augment(images[order], labels[order], order.tolist()) - whole[order]).abs().max() < 1e-5


def test_pixel_variants_follow_seed_source_and_guidance(trained, monkeypatch):
    prior, _, _, images, labels = trained
    same = [3] * 7
    first = prior.augment(images, labels, same)
    assert torch.equal(first, prior.augment(images, labels, same))
    assert (first - prior.augment(images, labels, [4] * 7)).abs().mean() > 1e-3
    assert (first - images).abs().mean() > 1e-3
    assert (first[0] - first[1]).abs().mean() > 1e-3
    monkeypatch.setattr(prior.prior, "guidance_scale", 3.0)
    assert (first - prior.augment(images, labels, same)).abs().mean() > 1e-4


def test_pixel_variants_are_sdedit_by_ddim(trained):
    prior, _, _, images, labels = trained
    times, noise = torch.linspace(0.5, 0, prior.steps + 1), seeded_noise(list(range(7)), (3, 16, 16))
    x = patch_unet.add_noise(images * 2 - 1, noise, times[:1])
    for t, after in zip(times, times[1:]):
        phi = patch_unet.angle(t)
        with torch.no_grad():
            clean = (phi.cos() * x - phi.sin() * prior.training.ema(x, t.expand(7), labels)).clamp(-1, 1)
        x = patch_unet.add_noise(clean, (x - phi.cos() * clean) / phi.sin(), after)
    assert (prior.augment(images, labels, list(range(7))) - (x / 2 + 0.5)).abs().max() < 1e-4


@pytest.mark.parametrize("weights", [{"oh": 3.0}, {"oh": 0.0, "bn": 1.0}], ids=str)
def test_the_teacher_guides_a_variant(trained, weights):
    """Guidance lowers the cross-entropy for the source's label, or L_bn; only with L_bn do variants depend on the batch."""
    prior, _, _, images, labels = trained
    torch.manual_seed(0)
    teacher = frozen(make_classifier(num_classes=4))
    metrics, seeds = TeacherMetrics(teacher, torch.device("cpu")), list(range(7))
    guided = PriorAugmenter(prior.prior, 4, 0.9, 10, Guidance(teacher, 16, **weights))
    plain = PriorAugmenter(prior.prior, 4, 0.9, 10)
    before, after = (metrics.figures(to_uint8(a.augment(images, labels, seeds)), labels) for a in (plain, guided))
    name = "loss_oh" if weights["oh"] else "loss_bn"
    assert after[name] < before[name]
    difference = (one_by_one(guided, images, labels, seeds, 3) - guided.augment(images, labels, seeds)).abs().max()
    assert difference < 1e-4 if weights["oh"] else difference > 1e-3


def test_a_prior_of_a_file_varies_images_of_any_size_and_number_of_classes(miniature):
    file = Path(miniature("patch_prior"))
    images, labels = torch.rand(3, 3, 24, 24), torch.tensor([0, 2, 1])
    for classes, expected in ((10, "same"), (3, "none")):
        prior = PatchPrior.load(file, "cpu", torch.float32, num_classes=classes)
        augmenter = PriorAugmenter(prior, classes, 0.5, 4)
        whole = augmenter.augment(images, labels, [1, 2, 1])
        assert prior.classes == expected and augmenter.external_prior == "patch_prior" and augmenter.fit_rounds == 0
        assert whole.shape == images.shape and 0 <= whole.min() and whole.max() <= 1
        assert (one_by_one(augmenter, images, labels, [1, 2, 1], 1) - whole).abs().max() < 1e-5


def test_more_strength_goes_further_from_the_source(trained):
    prior, _, _, images, labels = trained
    distances = []
    for strength in (0.2, 0.5, 0.9):
        other = tiny_prior(strength=strength)
        other.training.ema.load_state_dict(prior.training.ema.state_dict())
        distances.append(float((other.augment(images, labels, list(range(7))) - images).square().mean()))
    assert distances == sorted(distances) and distances[2] > 2 * distances[0]


def test_a_resumed_prior_is_the_unbroken_one_bit_for_bit():
    images, labels = bank()
    unbroken = tiny_prior(flip=True)
    fitted(unbroken, 2, images, labels)
    state = saved_and_loaded(unbroken.state_dict())
    torch.rand(7)  # earlier random draws must not change anything, the initial weights included
    resumed = tiny_prior(flip=True)
    initial = (prior.training.network.parameters() for prior in (resumed, tiny_prior()))
    assert all(torch.equal(a, b) for a, b in zip(*initial))
    resumed.load_state_dict(state)
    logs = [fitted(prior, 2, images, labels, first=2) for prior in (unbroken, resumed)]
    assert logs[0] == logs[1] and resumed.training.step == unbroken.training.step == 4 * 4
    for kind in ("unet", "ema"):
        ours, theirs = unbroken.state_dict()[kind], resumed.state_dict()[kind]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_learning_rate_warms_up_and_ends_near_zero():
    images, labels = bank(count=40)
    prior = tiny_prior(channels=(8, 8), fit_lr=0.01, fit_passes=10, fit_batch_size=4)
    rates = [fitted(prior, 1, images, labels, first=k)["lr"] for k in range(10)]
    assert prior.training.step == 100 and rates == sorted(rates, reverse=True)
    assert 0.009 < rates[0] <= 0.01 and rates[-1] < 1e-5
    assert prior._learning_rate(0) == pytest.approx(0.001)


def test_a_pass_shows_every_image_once(monkeypatch):
    images, labels = bank(count=10)
    prior, seen = tiny_prior(fit_batch_size=4), []
    monkeypatch.setattr(prior.training, "fit", lambda images, labels, batches: seen.extend(batches) or 0.0)
    prior.fit(images, labels)
    assert [len(part) for part in seen] == [4, 4, 2] and torch.cat(seen).sort().values.tolist() == list(range(10))


def test_the_average_reaches_over_the_same_share_of_any_training():
    """If a weight equals the number of its step, its average has the mean and the width of the power function."""
    images, labels = bank(count=4)
    prior = tiny_prior(channels=(8, 8))
    training = Denoising(prior.training.network, 4, lambda step: 0.0)
    weight, average = (next(network.parameters()) for network in (training.network, training.ema))
    g, count = EMA_POWER, 400
    decays = [(1 - 1 / step) ** (g + 1) for step in range(1, count + 1)]
    shares = [(1 - decay) * math.prod(decays[k + 1 :]) for k, decay in enumerate(decays)]
    mean = sum(share * (k + 1) for k, share in enumerate(shares))
    width = math.sqrt(sum(share * (k + 1 - mean) ** 2 for k, share in enumerate(shares)))
    assert sum(shares) == pytest.approx(1) and width / count == pytest.approx(EMA_WIDTH, rel=0.01)
    for step in range(1, 41):
        weight.data.fill_(step)
        training.fit(images, labels, [torch.arange(1)])
    assert average.flatten()[0] / 40 == pytest.approx((g + 1) / (g + 2), rel=0.02)


def test_diverged_training_names_the_step_and_the_flag():
    images, labels = bank()
    prior = tiny_prior()
    with torch.no_grad():
        prior.training.network.unet.conv_in.weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"diverged \(loss NaN at step 0\); lower --fit_lr"):
        prior.fit(images, labels)


def test_null_label_is_drawn(monkeypatch):
    images, labels = bank(size=16)
    seen = []
    prior = tiny_prior()
    monkeypatch.setattr(prior.training.network, "forward", lambda x_t, t, labels: seen.append((t, labels)) or x_t)
    torch.manual_seed(0)
    prior.training.loss(images[:1].expand(400, -1, -1, -1), labels[:1].expand(400))
    times, drawn = seen[0]
    assert 0.05 < (drawn == prior.training.null_label).float().mean() < 0.16
    assert torch.allclose(times.sort().values.diff(), torch.full((399,), 1 / 400), atol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    for size in (8, 16, 28, 32, 64):
        PixelAugmenter(2, size, channels=(8, 8))
    with pytest.raises(UserError, match="30 px do not fit"):
        PixelAugmenter(2, 30, channels=(8, 8, 8))
    with pytest.raises(UserError, match="--strength 0.1 with --num_inference_steps 5 .* --num_inference_steps 10"):
        tiny_prior(strength=0.1, num_inference_steps=5)


# Pretrained models


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 32])
def test_pretrained_variants_do_not_depend_on_the_batch(pretrained, kind, size):
    augmenter = pretrained[kind]
    torch.manual_seed(0)
    images, labels, seeds = torch.rand(3, 3, size, size), torch.tensor([0, 3, 1]), [11, 5, 11]
    whole = augmenter.augment(images, labels, seeds)
    assert whole.shape == images.shape and whole.dtype == torch.float32 and 0 <= whole.min() and whole.max() <= 1
    assert (whole - images).abs().mean() > 1e-2
    assert torch.equal(whole, augmenter.augment(images, labels, seeds))
    assert (one_by_one(augmenter, images, labels, seeds, 1) - whole).abs().max() < 1e-5
    assert (augmenter.augment(images.flip(0), labels.flip(0), seeds[::-1]).flip(0) - whole).abs().max() < 1e-5
    assert (augmenter.augment(images, labels, [1, 2, 3]) - whole).abs().mean() > 1e-3
    assert augmenter.external_prior == kind and augmenter.fit_rounds == 0 and augmenter.state_dict() == {}


def test_variation_prepares_the_source_as_its_model_card_asks(pretrained, monkeypatch):
    augmenter, seen = pretrained["image_variation"], {}

    class Output:
        images = torch.zeros(1, 3, 32, 32)

    class Recorder:
        device, image_encoder = torch.device("cpu"), augmenter.pipeline.image_encoder

        def __call__(self, **arguments):
            seen.update(arguments)
            return Output

    monkeypatch.setattr(augmenter, "pipeline", Recorder())
    image = torch.rand(1, 3, 64, 64)
    augmenter.augment(image, torch.tensor([0]), [0])
    plain = torch.nn.functional.interpolate(image, (28, 28), mode="bicubic", antialias=False)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert torch.allclose(seen["image"], (plain - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    assert seen["height"] == seen["width"] == 32


def test_prompts_carry_the_class(folders, pretrained):
    images, seeds = torch.rand(1, 3, 16, 16).expand(2, -1, -1, -1), [0, 0]
    variants = pretrained["stable_diffusion"].augment(images, torch.tensor([0, 1]), seeds)
    assert (variants[0] - variants[1]).abs().max() > 1e-6
    assert pretrained["stable_diffusion"]._prompt(2) == "a photo of a cat"
    plain = ImageToImage(folders["stable_diffusion"], prompt="a photo", num_inference_steps=2)
    variants = plain.augment(images, torch.tensor([0, 1]), seeds)
    assert (variants[0] - variants[1]).abs().max() < 1e-5
    with pytest.raises(UserError, match="--prompt .* needs class names"):
        ImageToImage(folders["stable_diffusion"])


def test_no_step_left_is_said_before_anything_is_loaded():
    with pytest.raises(UserError, match="--strength 0.3 with --num_inference_steps 2 .* --num_inference_steps 4"):
        ImageToImage("no/model", prompt="x", strength=0.3, num_inference_steps=2)
    with pytest.raises(UserError, match="--strength 1.5 found, a number above 0, at most 1 wanted"):
        denoising_steps(1.5, 10)
    assert denoising_steps(0.3, 10) == 3 and denoising_steps(1, 1) == 1


def test_half_precision_and_another_resolution(folders):
    prior = ImageToImage(folders["sdxl"], prompt="x", num_inference_steps=2, resolution=16, dtype=torch.bfloat16)
    variant = prior.augment(torch.rand(1, 3, 16, 16), torch.tensor([0]), [0])
    assert variant.dtype == torch.float32 and variant.isfinite().all()
    assert prior.pipeline.unet.dtype == torch.bfloat16 and prior.pipeline.watermark is None
    with pytest.raises(UserError, match="--resolution 30 found, a multiple of 8 wanted; .* was trained at 32 px"):
        ImageVariation(folders["image_variation"], resolution=30)


def test_resize_stays_in_range():
    assert resize(torch.eye(8).expand(1, 3, 8, 8), (32, 32)).aminmax() == (0, 1)


# Models that cannot be loaded


def test_wrong_and_incomplete_models(folders, tmp_path):
    with pytest.raises(UserError, match="is a StableDiffusionPipeline, StableDiffusionImageVariationPipeline wanted"):
        ImageVariation(folders["stable_diffusion"])
    with pytest.raises(UserError, match="is a StableDiffusionImageVariationPipeline, StableDiffusionPipeline or"):
        ImageToImage(folders["image_variation"], prompt="x")
    with pytest.raises(UserError, match="is not a complete model"):
        ImageVariation(folders["clip"])
    with pytest.raises(UserError, match="is not a complete model"):
        ImageVariation(str(tmp_path))


def test_seeded_noise_is_one_stream_a_seed():
    noise = seeded_noise([5, 6, 5], (3, 4, 4))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(seeded_noise([6], (3, 4, 4))[0], noise[1])
