"""NAYER: label embeddings, noisy layers and the lifetime of the generator. No network connection."""

import dataclasses
import io
import json
import shutil

import pytest
import torch
from torch import nn

from datafree.nayer import NAYER, NAYERConfig, NAYERSynthesizer, grouped_labels, noisy_layers, orthogonal_codes, text_codes
from engine.runtime.errors import UserError
from tests import tiny_pipelines
from tests.conftest import CPU, make_task

NAMES = ("zero", "one", "two", "three")
TASK = make_task(num_classes=4, class_names=NAMES)
SMALL = NAYERConfig(g_steps=2, synthesis_batch_size=10, nz=6, label_dim=8, g_loops=2, init_g_loops=3, g_life=2)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )
    return network.eval().requires_grad_(False)


@pytest.fixture
def student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).eval().requires_grad_(False)


@pytest.fixture
def text_model(tmp_path, miniature):
    """Folder of a small CLIP with its tokenizer; a test may change the folder."""
    folder = str(shutil.copytree(miniature("clip"), tmp_path / "tiny-clip"))
    tiny_pipelines._tokenizer().save_pretrained(folder)
    return folder


def watch(synthesizer):
    """Records every batch: images before the first step, labels, copies of the parameters at that time, the parameters."""
    seen, descend = [], synthesizer.inversion.descend

    def watched(generate, optimizer, labels, student):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append((generate().detach(), labels, [p.detach().clone() for p in parameters], parameters))
        return descend(generate, optimizer, labels, student)

    synthesizer.inversion.descend = watched
    return seen


def noisy(parameters):
    (weights,) = [p for p in parameters if p.ndim == 3]
    return weights


def test_orthogonal_codes_are_orthonormal():
    codes = orthogonal_codes(10, 512)
    assert codes.shape == (10, 512) and codes.dtype == torch.float32
    assert torch.allclose(codes @ codes.T, torch.eye(10), atol=1e-6)
    assert torch.allclose(orthogonal_codes(8, 8) @ orthogonal_codes(8, 8).T, torch.eye(8), atol=1e-6)


def test_more_classes_than_dimensions_have_different_unit_codes():
    codes = orthogonal_codes(100, 16)
    assert codes.shape == (100, 16) and torch.allclose(codes.norm(dim=1), torch.ones(100), atol=1e-6)
    assert (codes @ codes.T - torch.eye(100)).max() < 0.95


def test_orthogonal_codes_do_not_touch_the_global_stream():
    torch.manual_seed(9)
    codes = orthogonal_codes(5, 7)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert torch.equal(codes, orthogonal_codes(5, 7)) and torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("count, num_classes", [(10, 4), (8, 4), (3, 4), (400, 10)])
def test_labels_come_in_groups_of_different_classes(count, num_classes):
    labels = grouped_labels(count, num_classes, CPU)
    assert len(labels) == count
    assert all(len(set(group.tolist())) == len(group) for group in labels.split(num_classes))
    counts = torch.bincount(labels, minlength=num_classes)
    assert counts.max() - counts.min() <= 1


def test_noisy_layers_are_one_linear_layer_a_group():
    inputs, weights = torch.randn(10, 5), torch.randn(3, 5, 7)
    expected = torch.stack([inputs[i] @ weights[i // 4] for i in range(10)])
    assert torch.allclose(noisy_layers(inputs, weights, 4), expected, atol=1e-5)


def test_images_of_one_class_differ_by_their_noisy_layer_alone(teacher, student):
    synthesizer = NAYERSynthesizer(SMALL, teacher, TASK, warm_up=True)
    seen = watch(synthesizer)
    batch = synthesizer.synthesize(student)
    assert batch.images.shape == (30, 3, 16, 16) and 0 <= batch.images.min() and batch.images.max() <= 1
    for k, (images, labels, before, _) in enumerate(seen):
        assert noisy(before).shape == (3, 8, 6)  # ceil(10 / 4) layers
        assert torch.equal(batch.labels[10 * k : 10 * k + 10], labels)
        for label in range(4):
            same = images[labels == label]
            assert len(same) >= 2 and (same[0] - same[1]).abs().max() > 1e-3
            assert len(synthesizer.codes[labels[labels == label]].unique(dim=0)) == 1
    one = small(synthesis_batch_size=4)
    synthesizer = NAYERSynthesizer(one, teacher, TASK, warm_up=True)
    seen = watch(synthesizer)
    synthesizer.synthesize(student)
    assert all(noisy(before).shape[0] == 1 for _, _, before, _ in seen)


def test_every_batch_has_new_noisy_layers_which_are_trained(teacher, student):
    synthesizer = NAYERSynthesizer(small(label_dim=64, nz=64), teacher, TASK, warm_up=False)
    seen = watch(synthesizer)
    for _ in range(2):
        synthesizer.synthesize(student)
    assert len(seen) == 4
    starts = [noisy(before) for _, _, before, _ in seen]
    for start, (_, _, _, parameters) in zip(starts, seen):
        assert abs(start.mean()) < 0.05 and abs(start.std() - 1) < 0.05
        assert not torch.equal(noisy(parameters), start), "trained along with the generator"
    assert all(not torch.equal(a, b) for k, a in enumerate(starts) for b in starts[:k])


def test_the_generator_lives_for_g_life_rounds(teacher, student):
    """At learning rate 0 only a renewal changes the generator."""
    synthesizer = NAYERSynthesizer(small(lr_g=0.0, g_life=3), teacher, TASK, warm_up=False)
    seen, renewed = [], []
    for _ in range(7):
        before = synthesizer.generator.project.weight.detach().clone()
        synthesizer.synthesize(student)
        renewed.append(not torch.equal(synthesizer.generator.project.weight, before))
        if synthesizer.norm is not None:
            seen.append(synthesizer.norm.weight[0].item())
            with torch.no_grad():
                synthesizer.norm.weight.fill_(2.0)
    assert renewed == [True, False, False, True, False, False, True]
    assert seen == [1, 2, 2, 1, 2, 2, 1]


def test_rounds_of_g_life_are_counted_from_the_end_of_warm_up(teacher, student):
    warm, main = (NAYERSynthesizer(small(g_life=5), teacher, TASK, warm_up=w) for w in (True, False))
    warm.synthesize(student)
    main.load_state_dict(warm.state_dict())
    assert (warm.rounds, main.rounds) == (1, 0)


def test_images_per_round(teacher, student, distill, tmp_path):
    method = NAYER(SMALL, teacher, student, TASK)
    assert method.images_per_round == 20 == len(method.synthesizer().synthesize(student).images)
    assert len(method.initial_synthesizer().synthesize(student).images) == 30
    distill("nayer", tmp_path, "--g_loops 3")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["bank_images"] == 2 * 2 * 3 + 2 * 3 * 3 and result["external_prior"] == "none"


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_state_goes_on_bit_for_bit(warm_up, teacher, student):
    first = NAYERSynthesizer(small(g_life=5), teacher, TASK, warm_up=warm_up)
    for _ in range(2):
        first.synthesize(student)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = NAYERSynthesizer(small(g_life=5), teacher, TASK, warm_up=warm_up)
    second.load_state_dict(torch.load(file, weights_only=True))
    for round in range(2):
        batches = []
        for synthesizer in (first, second):
            torch.manual_seed(round)
            batches.append(synthesizer.synthesize(student))
        assert torch.equal(batches[0].images, batches[1].images) and torch.equal(batches[0].labels, batches[1].labels)


def test_warm_up_does_not_ask_the_student(teacher, student):
    assert "loss_adv" not in NAYERSynthesizer(SMALL, teacher, TASK, warm_up=True).synthesize(None).scalars
    assert "loss_adv" in NAYERSynthesizer(SMALL, teacher, TASK, warm_up=False).synthesize(student).scalars


def test_text_codes_are_those_of_clip(text_model):
    from transformers import CLIPModel, CLIPTokenizer

    codes = text_codes(NAMES, "an image of {label}", text_model, CPU)
    model, tokenizer = CLIPModel.from_pretrained(text_model).eval(), CLIPTokenizer.from_pretrained(text_model)
    for name, code in zip(NAMES, codes):
        with torch.no_grad():
            output = model.text_model(**tokenizer(f"an image of {name}", return_tensors="pt"))
            expected = model.text_projection(output.pooler_output)[0]
        assert torch.allclose(code, expected, atol=1e-5)
    assert (codes[0] - codes[1]).abs().max() > 1e-3


def test_text_codes_are_made_once(text_model, teacher, student, monkeypatch):
    config = small(label_embedding="clip", text_model=text_model)
    method = NAYER(config, teacher, student, TASK)
    warm = method.initial_synthesizer()
    warm.synthesize(student)
    expected = text_codes(NAMES, "a image of {label}", text_model, CPU)
    assert torch.equal(warm.codes, expected)
    monkeypatch.setattr("datafree.nayer.text_codes", None)
    main = method.synthesizer()
    main.load_state_dict(warm.state_dict())
    main.synthesize(student)
    assert torch.equal(main.codes, expected)


def test_embeddings_of_another_source_are_not_taken(teacher, student):
    warm = NAYERSynthesizer(SMALL, teacher, TASK, warm_up=True)
    warm.synthesize(student)
    main = NAYERSynthesizer(small(label_dim=9), teacher, TASK, warm_up=False)
    main.load_state_dict(warm.state_dict())
    assert main.codes is None
    main.synthesize(student)
    assert main.codes.shape == (4, 9)


def test_a_run_with_clip_needs_it_once(text_model, distill, tmp_path):
    flags = f"--label_embedding clip --text_model {text_model}"
    distill("nayer", tmp_path / "run", f"{flags} --stages synthesize")
    manifest = json.loads((tmp_path / "run" / "bank" / "manifest.json").read_text())
    assert manifest["external_prior"] == "tiny-clip"
    for file in ("model.safetensors", "config.json"):
        (tmp_path / "tiny-clip" / file).unlink()
    distill("nayer", tmp_path / "run", flags)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["external_prior"] == "tiny-clip"
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="--text_model .*tiny-clip: this directory is not a complete model"):
        distill("nayer", tmp_path / "run", flags)


def test_a_hub_that_cannot_be_reached_is_one_line(distill, tmp_path):
    with pytest.raises(UserError, match="--text_model openai/clip-vit-base-patch32: .*hf download") as caught:
        distill("nayer", tmp_path, "--label_embedding clip")
    assert "\n" not in str(caught.value)


def test_a_model_of_another_kind_is_refused(distill, tmp_path, miniature):
    with pytest.raises(UserError, match="--text_model .*dinov2 is a model of type dinov2"):
        distill("nayer", tmp_path / "run", f"--label_embedding clip --text_model {miniature('dinov2')}")


def test_a_model_without_tokenizer_is_one_line(miniature):
    with pytest.raises(UserError, match="--text_model .*clip gives different classes the same embedding") as caught:
        text_codes(NAMES, "{label}", miniature("clip"), CPU)
    assert "\n" not in str(caught.value)


BAD = {
    "g_steps": (0, "--g_steps 0 found, a whole number from 1 on wanted"),
    "g_life": (0, "--g_life 0"),
    "g_loops": (-1, "--g_loops -1 found, a whole number from 0 on wanted"),
    "init_g_loops": (0, "--init_g_loops 0"),
    "synthesis_batch_size": (1, "--synthesis_batch_size 1 found, a whole number from 2 to 1000000 wanted"),
    "label_dim": (0, "--label_dim 0"),
    "bn_mmt": (-0.5, "--bn_mmt -0.5 found"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags(name, teacher, student):
    value, message = BAD[name]
    with pytest.raises(UserError, match=message):
        NAYER(small(**{name: value}), teacher, student, TASK)


def test_clip_wants_class_names_and_a_place_for_them(teacher, student):
    nameless = make_task(num_classes=4)
    config = small(label_embedding="clip")
    with pytest.raises(UserError, match="--label_embedding clip needs class names"):
        NAYER(config, teacher, student, nameless)
    with pytest.raises(UserError, match=r"--prompt 'a photo' has no \{label\}"):
        NAYER(dataclasses.replace(config, prompt="a photo"), teacher, student, TASK)
    assert NAYER(SMALL, teacher, student, nameless).external_prior == "none"
