"""The image filter: cosines and masks in closed form, embeddings by small random models. CPU, no network connection."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from datafree.filter import DEFAULT_MODELS, EMBEDDINGS, build_embedding, calibrated_omega, cosines, keep_mask
from engine.runtime.errors import UserError
from tests import tiny_pipelines


@pytest.fixture(scope="module")
def folders(miniature):
    return {kind: miniature(kind) for kind in ("clip", "dinov2")}


def flat(images):
    return images.flatten(1)


def test_cosines_in_closed_form():
    sources = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    sources[0, 0], sources[1, 1] = 255, 100
    variants = torch.zeros(5, 3, 1, 1, dtype=torch.uint8)
    variants[0, 0] = 7  # same direction
    variants[1, 1] = 9  # orthogonal
    variants[2, :2] = 50  # 45 degrees
    variants[3, 0], variants[3, 1] = 40, 30  # cosine 30 / 50
    index = torch.tensor([0, 0, 0, 1, 1])  # the last variant is black
    for batch_size in (1, 2, 256):
        found = cosines(flat, sources, variants, index, batch_size)
        assert torch.allclose(found, torch.tensor([1, 0, 0.5**0.5, 0.6, 0]), atol=1e-6)
    assert found.dtype == torch.float32 and found.device.type == "cpu"


def test_every_source_is_embedded_once():
    seen, reported = [], []

    def embedding(images):
        seen.append(len(images))
        return flat(images)

    sources = torch.randint(1, 256, (5, 3, 2, 2), dtype=torch.uint8)
    index = torch.arange(5).repeat(3)
    found = cosines(embedding, sources, sources[index], index, 4, reported.append)
    assert torch.allclose(found, torch.ones(15)) and found.max() <= 1
    assert seen == reported == [4, 4, 4, 4, 1, 3], "a batch of sources, then their variants"
    assert cosines(embedding, sources[:0], sources[:0], index[:0]).shape == (0,)


def test_the_default_omega_is_a_quantile_over_other_classes():
    angles = torch.arange(100) / 100
    images = torch.zeros(100, 3, 1, 1)
    images[:, 0, 0, 0], images[:, 1, 0, 0] = angles.cos(), angles.sin()
    labels = (torch.arange(100) >= 50).long()
    unit = images.flatten(1)
    pairs = [float(unit[a] @ unit[b]) for a in range(100) for b in range(100) if labels[a] != labels[b]]
    expected = torch.quantile(torch.tensor(pairs), 0.99).item()
    exact = (images * 255).round()
    assert calibrated_omega(flat, exact.byte(), labels) == pytest.approx(expected, abs=2e-3)
    assert calibrated_omega(flat, exact.byte(), torch.zeros(100, dtype=torch.long)) == -1
    assert calibrated_omega(flat, exact.byte(), labels, most=10) == pytest.approx(expected, abs=0.05)


def test_keep_mask():
    cosine = torch.tensor([0.83, 0.76, 0.45, float("nan")])
    assert keep_mask(cosine, 0.6).tolist() == [True, True, False, False]
    assert keep_mask(cosine, 0.76).tolist() == [True, True, False, False]  # a cosine equal to omega is kept
    assert keep_mask(cosine, -1).tolist() == [True, True, True, False]


def test_an_omega_that_keeps_nothing_suggests_one():
    cosine = torch.tensor([0.1, 0.305, 0.46])
    with pytest.raises(UserError, match=r"--omega 0.9 keeps none of 3 .* is 0.460; a lower --omega 0.30 would keep half"):
        keep_mask(cosine, 0.9)
    assert keep_mask(cosine, 0.30).sum() == 2
    with pytest.raises(UserError, match="none of 2 variants has a finite cosine"):
        keep_mask(torch.full((2,), float("nan")), 0)


def test_teacher_embedding_is_its_penultimate_features():
    class Teacher(torch.nn.Module):
        def forward(self, images, return_features=False):
            assert return_features
            return SimpleNamespace(logits=None, features=images.mean((2, 3)).half())

    images = torch.rand(2, 3, 8, 8)
    found = build_embedding("teacher", teacher=Teacher())(images)
    assert found.dtype == torch.float32 and torch.allclose(found, images.mean((2, 3)), atol=1e-3)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_pretrained_embeddings(folders, kind):
    embedding = build_embedding(kind, folders[kind])
    images = torch.rand(3, 3, 16, 16)
    found = embedding(images)
    assert found.shape == (3, tiny_pipelines.WIDTH) and found.dtype == torch.float32 and not found.requires_grad
    assert torch.allclose(embedding(images[1:2])[0], found[1], atol=1e-5)
    sources = (images * 255).to(torch.uint8)
    assert torch.allclose(cosines(embedding, sources, sources, torch.arange(3)), torch.ones(3), atol=1e-5)
    half = build_embedding(kind, folders[kind], dtype=torch.bfloat16)(images)
    assert half.dtype == torch.float32 and F.cosine_similarity(half, found).min() > 0.99


def test_clip_embedding_is_the_models_own(folders):
    from transformers import CLIPModel

    images = torch.rand(2, 3, 28, 28)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.3, 0.2, 0.1]).view(1, 3, 1, 1)
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(folders["clip"]).get_image_features((images - mean) / std).pooler_output
    assert torch.allclose(build_embedding("clip", folders["clip"])(images), wanted, atol=1e-5)


def test_dinov2_without_preprocessor_takes_standard_constants(folders):
    embedding = build_embedding("dinov2", folders["dinov2"])
    assert embedding.size == 28
    assert torch.allclose(embedding.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))


def test_models_that_cannot_be_had(folders, tmp_path):
    with pytest.raises(UserError, match="--embedding_model openai/clip-vit-base-patch32: .*'hf download openai/clip"):
        build_embedding("clip")
    with pytest.raises(UserError, match="of type dinov2, clip wanted"):
        build_embedding("clip", folders["dinov2"])
    with pytest.raises(UserError, match="of type clip, dinov2 wanted"):
        build_embedding("dinov2", folders["clip"])
    with pytest.raises(UserError, match="is not a complete model"):
        build_embedding("dinov2", str(tmp_path))
    assert set(DEFAULT_MODELS) | {"teacher"} == set(EMBEDDINGS)
