"""Generative priors, on small random models: conditions, classifier-free guidance, bad input. CPU, no network connection."""

import pytest
import torch

from datafree.diffusion.priors import PIPELINES, load_prior
from datafree.diffusion.variation import seeded_noise
from engine.runtime.errors import UserError
from tests import tiny_pipelines

NAMES = tuple("abcdefghij")
KINDS = tiny_pipelines.GENERATIVE


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
    """Prompts, sizes, classifier-free guidance and steps agree; the library only leaves some noise in the final latents."""
    prior, steps = priors[kind], 5
    trajectory, condition = prior.trajectory(steps), prior.condition(torch.tensor([2]), [0])
    latents = start = seeded_noise([3], prior.shape)
    if kind == "sdxl":
        start = start / trajectory.sigmas[0]  # the scale of latents in Euler schedulers
    theirs = prior.pipeline(
        prompt=condition, guidance_scale=3.0, num_inference_steps=steps, latents=start, output_type="latent"
    ).images
    for k, time in enumerate(trajectory.times):
        clean = trajectory.clean(latents, k, prior.predict(latents, time, condition))
        latents = trajectory.step("ddim", latents, k, clean)
    assert condition == ["a photo of a c"] and (latents - theirs).norm() < 0.03 * theirs.norm()


def test_templates_take_turns_and_are_encoded_once(generative):
    prior = load_prior(
        generative["stable_diffusion"], num_classes=10, class_names=NAMES, prompts=("a {label}", "one {label}", "thing")
    )
    prompts = prior.condition(torch.tensor([0, 1, 0, 0]), [0, 0, 1, 2])
    assert prompts == ["a a", "a b", "one a", "thing"]
    z = seeded_noise([1] * 4, prior.shape)
    prior.predict(z, prior.trajectory(2).times[0], prompts)
    assert set(prior.encoded) == set(prompts)
    first = prior.encoded["a a"]
    prior.predict(z, prior.trajectory(2).times[0], prompts)
    assert prior.encoded["a a"] is first


def test_class_map(generative):
    prior = load_prior(generative["dit"], num_classes=2, class_map=(7, 3))
    assert prior.condition(torch.tensor([0, 1, 1]), [0] * 3).tolist() == [7, 3, 3]
    assert prior._with_null(prior.condition(torch.tensor([1]), [0])).tolist() == [10, 3]


def test_a_prior_s_own_classes_take_turns_or_it_is_told_none(generative):
    """A prior of ten classes for a dataset of five uses no class by default; with "own" each label uses all ten in turn.

    The turns of the labels begin at different classes.
    """
    labels = torch.arange(5).repeat(10)
    turns = [k // 5 for k in range(50)]
    prior = load_prior(generative["patch_prior"], num_classes=5, guidance_scale=2.0, classes="own")
    condition = prior.condition(labels, turns)
    assert prior.classes == "own" and prior.guidance_scale == 2
    assert condition[:5].tolist() == [0, 2, 4, 6, 8]
    assert all(condition[labels == label].sort().values.tolist() == list(range(10)) for label in range(5))
    prior = load_prior(generative["patch_prior"], num_classes=5, guidance_scale=2.0)
    assert prior.condition(labels, turns).tolist() == [10] * 50 and prior.guidance_scale == 1
    assert load_prior(generative["patch_prior"], num_classes=10).classes == "same"
    assert load_prior(generative["patch_prior"], num_classes=5, class_map=(5, 4, 3, 2, 1)).condition(
        labels[:2], [0] * 2
    ).tolist() == [5, 4]
    own = load_prior(generative["pixel_unet"], num_classes=5, null_class=0, classes="own")
    assert sorted(own.condition(labels, turns).unique().tolist()) == list(range(1, 11))
    assert load_prior(generative["dit"], num_classes=5).classes == "same"


BAD = {
    "map and own classes": (
        dict(kind="dit", num_classes=2, class_map=(1, 2), classes="own"),
        "--class_map and --prior_classes own contradict each other",
    ),
    "no class without null": (dict(kind="pixel_unet", num_classes=5, classes="none"), "has no null class, .* --null_class"),
    "wrong kind": (dict(kind="image_variation"), "is a StableDiffusionImageVariationPipeline, StableDiffusion"),
    "too many classes": (
        dict(kind="dit", num_classes=12),
        "dit has the class ids 0 to 9, but one of the dataset's 12 classes is mapped to id 10; .* --class_map",
    ),
    "short map": (dict(kind="dit", class_map=(1, 2)), "--class_map has 2 ids, 10 wanted"),
    "wrong map": (dict(kind="dit", num_classes=2, class_map=(1, 99)), "id 99"),
    "no names": (dict(kind="stable_diffusion", class_names=None), "--prompt .* needs class names"),
    "no null class": (dict(kind="pixel_unet", num_classes=5), "without a null class, .* --guidance_scale 1"),
    "wrong null class": (dict(kind="pixel_unet", num_classes=5, null_class=30), "--null_class 30"),
    "fixed size": (dict(kind="dit", resolution=64), "--resolution 64 found, but dit draws only images of 32 px"),
    "odd size": (
        dict(kind="sdxl", resolution=30),
        "--resolution 30 found, a multiple of 8 wanted; sdxl was trained at 32 px",
    ),
    "own size": (dict(kind="patch_prior", resolution=32), "--resolution 32"),
    "missing file": (dict(model="no/such.safetensors"), "no/such.safetensors does not exist"),
    "unreachable": (dict(model="some/model"), "there is no such directory, .* 'hf download some/model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_priors_are_one_line(case, generative, tmp_path):
    settings, pattern = BAD[case]
    settings = {"num_classes": 10, "class_names": NAMES} | settings
    kind, model = settings.pop("kind", None), settings.pop("model", None)
    if kind == "image_variation":
        model = tiny_pipelines.image_variation(tmp_path / kind)
    with pytest.raises(UserError, match=pattern) as caught:
        load_prior(model or generative[kind], **settings)
    assert "\n" not in str(caught.value)


def test_an_unconditional_model_is_refused(tmp_path):
    path = tiny_pipelines.pixel_unet(tmp_path / "plain", classes=None)
    with pytest.raises(UserError, match="is not class-conditional"):
        load_prior(path, num_classes=10)
    assert "DDPMPipeline" in PIPELINES


def test_too_many_steps(priors):
    with pytest.raises(UserError, match="--num_inference_steps 2000"):
        priors["dit"].trajectory(2000)
