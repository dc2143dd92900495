"""Device tests without a GPU: the steps of every method with all tensors on PyTorch's ``meta`` device.

Tensors on ``meta`` have a shape and no values. Reading a value on the host therefore fails, and ``AllOnMeta`` refuses a
tensor that was left on the CPU. The figures and images that a round may read once are read by its caller, outside these
tests.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import registry
from datafree.diffusion.guidance import Guidance
from datafree.diffusion.guided_sampler import Competitor, GuidedSampler
from datafree.diffusion.pixel import PixelAugmenter
from datafree.diffusion.priors import load_prior
from engine.data.crops import KeyedViews, Views, crop_flip
from engine.data.splits import Split
from engine.data.transfer_set import TransferSet
from engine.loops.distill import Distillation, Schedule
from engine.loops.logit_cache import LogitCache
from engine.loops.muon import Muon
from engine.loops.settings import DistillFlags
from engine.runtime.errors import resolve
from engine.runtime.flags import Parser, add_flags, from_args
from engine.runtime.precision import Precision
from models.classifier import frozen, weights_fixed
from tests.conftest import TINY, make_classifier, make_task

META = torch.device("meta")
STEPS = 3
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}  # operations that move a tensor from the host


class AllOnMeta(TorchDispatchMode):
    """Refuses operations that mix tensors on ``meta`` and on the CPU; CPU scalars are allowed, as on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type == "meta"}
        assert function in COPIES or len(kinds) < 2, f"{function}: a tensor was left on the CPU"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_meta(monkeypatch):
    """Puts image sets on ``meta`` and replaces fused optimizers, which refuse ``meta``, by plain ones during a test."""
    for name in ("Adam", "AdamW", "SGD"):
        optimizer = getattr(torch.optim, name)

        def plain(*args, optimizer=optimizer, **kwargs):
            return optimizer(*args, **kwargs | {"fused": False})

        monkeypatch.setattr(f"torch.optim.{name}", plain)
    monkeypatch.setattr("engine.data.transfer_set.storage_device", lambda size, device: device)
    with AllOnMeta():
        yield


def networks():
    return [make_classifier().to(META) for _ in range(2)]


def meta_task(**changes):
    info = {"class_names": tuple("abcdefghij"), "flip": True}
    task = {"device": META, "random_view": Views(1, True), "precision": Precision("no", META)}
    return make_task(**info | task | changes)


def build(method, extra="", **changes):
    """Builds a method's pieces and a Distillation of them, all on ``meta``; ``changes`` are arguments of its task."""
    method_class = resolve(registry.METHODS[method])
    parser = Parser()
    for group in (DistillFlags, method_class.Config):
        add_flags(parser, group, method, method_class.defaults)
    config = from_args(method_class.Config, parser.parse_args(f"{TINY[method]} {extra}".split()))
    teacher, student = networks()
    pixels = torch.zeros(40, 16, 16, 3, dtype=torch.uint8, device=META)
    split = Split(pixels, torch.zeros(40, dtype=torch.long, device=META), 10)
    task = meta_task(kd_steps=STEPS, training_split=lambda: split, **changes)
    pieces = method_class(config, frozen(teacher), student, task)
    schedule = Schedule(1, STEPS, STEPS, 8, 0.1, 0.9, 1e-4, 0)
    objective = pieces.objective().to(META)
    return pieces, Distillation(pieces.teacher, student, objective, pieces.synthesizer(), schedule, task.precision)


def round_of(pieces, distillation, remember=False):
    """Runs a round of synthesis and student steps on its images; returns the losses of the steps.

    Args:
        remember: whether the teacher logits come from a cache (``LogitCache``), which is filled before the steps.
    """
    if pieces.streams or pieces.images_per_round:
        batch = distillation.synthesize(0)
    source = distillation.synthesizer.image_set
    if not pieces.streams:
        source = TransferSet(12, 16, META)
        if pieces.images_per_round:
            source.add((255 * batch.images).to(torch.uint8), batch.labels)
        source.add(torch.zeros(6, 3, 16, 16, dtype=torch.uint8, device=META), torch.zeros(6, dtype=torch.long, device=META))
    if source is None:
        batches = distillation.synthesizer.batches(8, seed=0)
    elif isinstance(pieces.student_view, Views):
        views, logit_cache = KeyedViews(pieces.student_view, source.capacity, few=4 if remember else None, device=META), None
        if remember:
            logit_cache = LogitCache(
                lambda keys: distillation.teacher_outputs(source.images_of_keys(views, keys)).logits, len(views), 48, 8, META
            )
            logit_cache.logits = logit_cache.compute_logits(torch.zeros(8, dtype=torch.long, device=META))
        distillation.views, distillation.logit_cache = views, logit_cache
        batches = source.keyed_batches(8, views, seed=0, steps=STEPS)
    else:
        batches = source.batches(8, pieces.student_view, seed=0)
    return distillation.student_steps(batches, 0, SimpleNamespace(update=lambda: None))


CASES = [(method, "") for method in sorted(registry.METHODS)] + [
    ("fast", "--is_maml 0"), ("diffdfkd", "--msarc 1 --mix cutmix"), ("diffdfkd", "--mix mixup --student_crop resized"),
    ("nayer", "--bn 0"), ("csd", "--feat 0"), ("cmi", "--cr 0"), ("deepinv", "--l2 1"), ("kd", "--ce 1"),
]  # fmt: skip


@pytest.mark.parametrize("method, extra", CASES)
def test_synthesis_student_steps_and_what_follows_them(method, extra, on_meta):
    pieces, distillation = build(method, extra)
    losses = round_of(pieces, distillation)
    if distillation.views and getattr(distillation.objective, "caches_logits", False):
        losses |= round_of(pieces, distillation, remember=True)
    assert losses and all(loss.device == META for loss in losses.values())
    if pieces.streams or pieces.images_per_round:
        distillation.synthesize(0)


def test_muon(on_meta):
    pieces, distillation = build("kd")
    distillation.optimizer = Muon(distillation.parameters, lr=0.1, momentum=0.9, weight_decay=0)
    assert all(loss.device == META for loss in round_of(pieces, distillation).values())


@pytest.mark.parametrize("method", ["fast", "nayer", "cmi", "csd", "dda"])
def test_the_initial_bank(method, on_meta):
    pieces, _ = build(method)
    with weights_fixed(pieces.student):
        batch = pieces.initial_synthesizer().synthesize(pieces.student)
    assert batch.images.device == batch.labels.device == META


GUIDED = [
    ("patch_prior", "ddim", "unet", 0), ("patch_prior", "ancestral", "decoder", 2), ("stable_diffusion", "dpmsolver++", "unet", 2),
    ("dit", "ddim", "unet", 0), ("pixel_unet", "ddim", "decoder", 0),
]  # fmt: skip


@pytest.mark.parametrize("kind, rule, backprop, micro_batch", GUIDED)
def test_guided_denoising(kind, rule, backprop, micro_batch, miniature, on_meta):
    """Samples a batch with all terms and latent CutMix, and trains the student of ``adv``."""
    teacher, student = networks()
    prior = load_prior(miniature(kind), num_classes=10, class_names=tuple("abcdefghij"), device=META)
    guidance = Guidance(frozen(teacher), 16, bn=1.0, adv=1.0, backprop=backprop, micro_batch=micro_batch)
    competitor = Competitor(0, STEPS, 20.0, 4, 0.1)
    sampler = GuidedSampler(
        prior, guidance, meta_task(), student, steps=2, rule=rule, lca=[1], lca_repair=1, competitor=competitor
    )
    labels, images = torch.arange(4), torch.zeros(6, 3, 16, 16, dtype=torch.uint8)  # images of a bank on the host
    for learned in (False, True):
        drawn, finite = sampler.draw_async(labels, [3, 4, 5, 6], [0] * 4)
        assert drawn.images.device == finite.device == META and finite.shape == (2,)
        if not learned:
            assert sampler.fit(images, torch.zeros(6, dtype=torch.long))["loss_student"].device == META


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_pixel_prior(guidance_scale, on_meta):
    augmenter = PixelAugmenter(10, 16, num_inference_steps=4, guidance_scale=guidance_scale, flip=True, device=META)
    augmenter.total_steps = 4
    for _ in range(2):
        loss = augmenter.training.learn(
            torch.zeros(5, 3, 16, 16, dtype=torch.uint8, device=META), torch.zeros(5, dtype=torch.long, device=META)
        )
    assert loss.device == META
    assert augmenter.augment(torch.rand(3, 3, 16, 16), torch.arange(3), [1, 2, 3]).device == META


MISTAKES = {
    "a weight on the CPU": lambda images: torch.nn.functional.conv2d(images, torch.ones(2, 3, 3, 3)),
    "an index on the CPU": lambda images: images[torch.tensor([0, 1])],
    "a value that the host reads": lambda images: images.sum().item(),
    "a branch on a value": lambda images: images if images.max() > 1 else -images,
    "a mask of unknown length": lambda images: images[images > 0],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_round_is_found(mistake, on_meta, monkeypatch):
    """The mistake is made in the random view, which the student steps and the synthesis use."""

    def view(images):
        MISTAKES[mistake](images.float())
        return crop_flip(images, 1, True)

    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match="CPU|meta|nonzero"):
        round_of(*build("csd", random_view=view))
