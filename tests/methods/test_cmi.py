"""CMI: contrastive loss, views, memory and statistics against independent computations."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datafree import cmi
from datafree.cmi import CMI, CMIConfig, crop_resize, info_nce, local_views
from datafree.generators import reset
from datafree.losses import BNStatistics, adversarial_loss, bn_loss, one_hot_loss
from engine.data.crops import crop_flip
from engine.runtime.errors import UserError
from tests.conftest import make_task
from tests.methods.test_adi import classifier, inversion_loss, network_of

LENGTH = 7 + 5 + 7  # length of the penultimate features and of the inputs of two BN layers


def method(augment=lambda x: crop_flip(x, 1, False), student=None, **flags):
    small = {"init_g_steps": 2, "g_steps": 2, "synthesis_batch_size": 6, "nz": 8}
    flags = small | {"memory_size": 15, "negatives": 8, "head_dim": 10} | flags
    torch.manual_seed(5)
    return CMI(CMIConfig(**flags), classifier(0), student, make_task(num_classes=4, random_view=augment))


def sphere(*shape):
    return F.normalize(torch.randn(*shape), dim=1)


def brute_force(anchors, positives, negatives, temperature):
    """InfoNCE, one pair at a time."""
    anchors, positives, negatives = (np.asarray(x, dtype=float) for x in (anchors, positives, negatives))
    total = 0.0
    for i, anchor in enumerate(anchors):
        below = 0.0
        for other in (*positives, *negatives):
            below += math.exp(sum(a * b for a, b in zip(anchor, other)) / temperature)
        total -= math.log(math.exp(anchor @ positives[i] / temperature) / below)
    return total / len(anchors)


@pytest.mark.parametrize("count", [0, 9])
def test_info_nce_against_a_double_loop(count):
    torch.manual_seed(0)
    anchors, positives, negatives = sphere(4, 6), sphere(4, 6), sphere(count, 6)
    found = float(info_nce(anchors, positives, negatives, 0.2))
    assert found == pytest.approx(brute_force(anchors, positives, negatives, 0.2), rel=1e-5)
    assert found != pytest.approx(brute_force(positives, anchors, negatives, 0.2), rel=1e-2)


def test_info_nce_of_orthogonal_images():
    unit = torch.eye(4)
    assert float(info_nce(unit[:2], unit[:2], unit[2:], 0.5)) == pytest.approx(math.log(1 + 3 * math.exp(-2)))


def reference_views(images, top, left, height, width, mirror):
    """The same boxes, cut out by PyTorch's ``grid_sample``, whose coordinates run from -1 to 1."""
    theta = torch.zeros(len(images), 2, 3, dtype=images.dtype)
    theta[:, 0, 0], theta[:, 0, 2] = torch.where(mirror, -width, width), 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def boxes(count):
    height, width = 0.5 + 0.5 * torch.rand(2, count, dtype=torch.double)
    top, left = torch.rand(2, count, dtype=torch.double) * torch.stack([1 - height, 1 - width])
    return top, left, height, width, torch.arange(count) % 2 == 0


def test_crops_equal_the_librarys_sampler():
    torch.manual_seed(0)
    images = torch.rand(6, 3, 12, 16, dtype=torch.double)
    box = boxes(6)
    assert torch.allclose(crop_resize(images, *box), reference_views(images, *box), atol=1e-12)
    whole = [torch.full((6,), value, dtype=torch.double) for value in (0.0, 0.0, 1.0, 1.0)]
    assert torch.equal(crop_resize(images, *whole, torch.zeros(6, dtype=torch.bool)), images)
    assert torch.allclose(crop_resize(images, *whole, torch.ones(6, dtype=torch.bool)), images.flip(3))


def test_crops_are_differentiable():
    images, box = torch.rand(2, 1, 5, 5, dtype=torch.double, requires_grad=True), boxes(2)
    assert torch.autograd.gradcheck(lambda x: crop_resize(x, *box), (images,))


@pytest.mark.parametrize("flip", [False, True])
def test_local_views_are_one_random_box_an_image(flip, monkeypatch):
    drawn = []
    monkeypatch.setattr(cmi, "crop_resize", lambda images, *box: drawn.extend(box) or crop_resize(images, *box))
    image = torch.rand(1, 3, 16, 16)
    views = local_views(image.repeat(400, 1, 1, 1), flip)
    assert views.shape == (400, 3, 16, 16) and views.min() >= 0 and views.max() <= 1
    assert len({view.sum().item() for view in views}) > 390
    top, left, height, width, mirror = drawn
    area, aspect = height * width, width / height
    assert 0.25 - 1e-4 < area.min() < 0.27 and 0.95 < area.max() <= 1
    assert 3 / 4 - 1e-4 < aspect.min() < 0.78 and 1.3 < aspect.max() < 4 / 3 + 1e-4
    assert min(top.min(), left.min()) >= 0 and max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    assert 150 < mirror.sum() < 250 if flip else not mirror.any()


def test_statistics_of_the_first_rows_equal_those_of_a_pass_of_their_own():
    teacher, images = classifier(0), torch.rand(10, 3, 16, 16)
    statistics, gradients, found = BNStatistics(teacher), [], []
    for batch, rows in ((images, 4), (images[:4], None)):
        batch = batch.clone().requires_grad_()
        with statistics.collect(rows=rows) as batch_stats:
            teacher(batch)
        bn_loss(batch_stats, statistics.running).backward()
        found.append(batch_stats)
        gradients.append(batch.grad)
    for mine, own in zip(*found, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, own))
    assert torch.allclose(gradients[0][:4], gradients[1], atol=1e-6) and not gradients[0][4:].any()
    with statistics.collect() as whole:
        teacher(images)
    assert not torch.allclose(whole[0][0], found[0][0][0], atol=1e-4)


def test_representation_is_features_and_pooled_inputs_of_bn_layers():
    synthesizer, images = method().synthesizer(), torch.rand(5, 3, 16, 16)
    teacher = synthesizer.teacher
    network, x = teacher.network, (images - teacher.mean) / teacher.std
    first, second = network[0](x), network[:4](x)
    expected = torch.cat([network[:8](x), first.mean((2, 3)), second.mean((2, 3))], 1)
    logits, features, _ = synthesizer.represent(images)
    assert features.shape == (5, LENGTH) and torch.allclose(features, expected, atol=1e-5)
    assert torch.allclose(logits, teacher(images), atol=1e-6)


def test_every_loss_but_the_contrastive_sees_the_global_view_alone():
    student, images, labels = classifier(1), torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    synthesizer = method(augment=lambda x: x.flip(2), bn=2.0, oh=3.0, cr=5.0, adv=7.0).synthesizer()
    losses = synthesizer.losses(images, labels, student)
    teacher, seen = synthesizer.teacher, images.flip(2)
    statistics = BNStatistics(teacher)
    with statistics.collect() as batch_stats:
        logits = teacher(seen)
    assert losses["loss_bn"].item() == pytest.approx(bn_loss(batch_stats, statistics.running).item(), rel=1e-4)
    assert losses["loss_oh"].item() == pytest.approx(one_hot_loss(logits, labels).item(), rel=1e-5)
    expected = adversarial_loss(student(seen), logits, agreeing_only=True).item()
    assert losses["loss_adv"].item() == pytest.approx(expected, abs=1e-6)
    weights = {"loss_bn": 2, "loss_oh": 3, "loss_cr": 5, "loss_adv": 7}
    assert losses["loss"].item() == pytest.approx(sum(w * losses[k].item() for k, w in weights.items()), rel=1e-5)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_positive_is_the_images_own_global_view(shift, monkeypatch):
    """L_cr by hand for fixed views; with ``shift`` 1 each local view is that of another image, which changes L_cr."""
    monkeypatch.setattr(cmi, "local_views", lambda images, flip: images.roll(shift, 0).flip(2) ** 2)
    synthesizer, images = method(augment=lambda x: x, negatives=100).synthesizer(), torch.rand(6, 3, 16, 16)
    synthesizer.remember(torch.rand(9, 3, 16, 16))
    found = synthesizer.losses(images, torch.zeros(6, dtype=torch.long), classifier(1))["loss_cr"].item()
    with torch.no_grad():
        views = images.flip(2) ** 2, images
        local, whole = (F.normalize(synthesizer.head(synthesizer.represent(v)[1]), dim=1) for v in views)
        remembered = F.normalize(synthesizer.head(synthesizer.memory.float()), dim=1)
    assert found == pytest.approx(brute_force(local.roll(shift, 0), whole, remembered, 0.2), rel=1e-5)
    for others in ((local.roll(1 - shift, 0), whole), (whole, local.roll(shift, 0))):
        assert found != pytest.approx(brute_force(*others, remembered, 0.2), rel=1e-5)


def by_hand(teacher, student, head, memory, images, labels):
    """The synthesis losses with weights 2, 3, 5 and 7; the global view is the image, the local view its mirror image."""
    bn, oh = inversion_loss(teacher, images, labels)
    first, bias, second, other_bias = head
    embedded = []
    for view in (images.flip(3), images):
        layers = network_of(teacher, view)
        embedded.append(torch.cat([layers[2], layers[0].mean((2, 3)), layers[1].mean((2, 3))], 1))
    r = torch.cat([*embedded, memory])
    r = (r @ first.T + bias).clamp(min=0) @ second.T + other_bias
    r = r / r.square().sum(1, keepdim=True).sqrt()
    count, contrast = len(images), 0
    for i in range(count):
        similarities = r[count:] @ r[i] / 0.2
        contrast = contrast + (similarities.exp().sum().log() - similarities[i]) / count
    t, s = network_of(teacher, images)[3], network_of(student, images)[3]
    agree = t.argmax(1) == s.argmax(1)
    adv = -((t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1) * agree).mean()
    return {
        "loss_bn": bn,
        "loss_oh": oh,
        "loss_cr": contrast,
        "loss_adv": adv,
        "loss": 2 * bn + 3 * oh + 5 * contrast + 7 * adv,
    }


@pytest.fixture
def reversal(monkeypatch):
    monkeypatch.setattr(cmi, "local_views", lambda images, flip: images.flip(3))


@pytest.fixture
def near_student():
    """A student that agrees with the teacher on most images, but not on all."""
    student = classifier(0)
    student.network[8].weight.data *= 1.5
    student.network[8].bias.data += 0.2 * torch.randn(4, generator=torch.Generator().manual_seed(1))
    return student


def weighted(**flags):
    return method(augment=lambda x: x, bn=2.0, oh=3.0, cr=5.0, adv=7.0, negatives=100, **flags).synthesizer()


def test_every_loss_and_its_gradient(reversal, near_student):
    synthesizer, student, labels = weighted(), near_student, torch.arange(6) % 4
    synthesizer.remember(torch.rand(5, 3, 16, 16))
    images = torch.rand(6, 3, 16, 16, requires_grad=True)
    head = list(synthesizer.head.parameters())
    losses = synthesizer.losses(images, labels, student)
    expected = by_hand(synthesizer.teacher, student, head, synthesizer.memory.float(), images, labels)
    assert set(losses) == set(expected) and expected["loss_adv"] != 0
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
        wanted = torch.autograd.grad(value, [images, *head], retain_graph=True, allow_unused=True)
        found = torch.autograd.grad(losses[name], [images, *head], retain_graph=True, allow_unused=True)
        for a, b in zip(found, wanted):
            assert (a is None) == (b is None) and (a is None or (a - b).norm() < 1e-3 * b.norm()), name


def test_a_whole_synthesis_step(reversal, near_student):
    """Two steps of Adam on generator and noise (betas .5, .999) and on the head (.9, .999)."""
    synthesizer, student = weighted(lr_g=0.01), near_student
    generator, head = copy.deepcopy(synthesizer.generator), [p.detach().clone() for p in synthesizer.head.parameters()]
    torch.manual_seed(3)
    batch = synthesizer.synthesize(student)
    torch.manual_seed(3)
    reset(generator).train()
    z = torch.randn(6, 8, requires_grad=True)
    head = [p.requires_grad_() for p in head]
    fresh = torch.optim.Adam([*generator.parameters(), z], lr=0.01, betas=(0.5, 0.999))
    lasting, seen = torch.optim.Adam(head, lr=0.01), []
    for _ in range(2):
        images = generator(z)
        loss = by_hand(synthesizer.teacher, student, head, torch.zeros(0, LENGTH), images, batch.labels)["loss"]
        seen.append((loss.item(), images.detach()))
        for optimizer in (fresh, lasting):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (fresh, lasting):
            optimizer.step()
    lowest = min(seen, key=lambda pair: pair[0])
    assert batch.scalars["loss_synthesis"].item() == pytest.approx(lowest[0], rel=1e-4)
    assert (batch.images - lowest[1]).abs().mean() < 1e-4 < (seen[0][1] - seen[1][1]).abs().mean()
    for found, expected in zip(synthesizer.head.parameters(), head):
        assert (found - expected).abs().mean() < 1e-4


def test_negatives_are_drawn_without_repetition(monkeypatch):
    synthesizer, seen = method(negatives=8).synthesizer(), []
    synthesizer.head = nn.Identity()
    synthesizer.memory = torch.randn(15, LENGTH).half()
    monkeypatch.setattr(cmi, "info_nce", lambda a, p, n, t: seen.append(n))
    for _ in range(30):
        synthesizer.contrastive_loss(torch.randn(2, LENGTH), torch.randn(2, LENGTH))
    rows = F.normalize(synthesizer.memory.float(), dim=1)
    drawn = [[int((rows @ n).argmax()) for n in negatives] for negatives in seen]
    assert all(len(d) == len(set(d)) == 8 for d in drawn) and {k for d in drawn for k in d} == set(range(15))


def test_the_memory_forgets_the_oldest():
    synthesizer = method(augment=lambda x: x, memory_size=15).synthesizer()
    rounds = [torch.rand(6, 3, 16, 16) for _ in range(4)]
    for count, images in zip((6, 12, 15, 15), rounds):
        synthesizer.remember(images)
        assert synthesizer.memory.shape == (count, LENGTH) and synthesizer.memory.dtype == torch.half
    with torch.no_grad():
        expected = torch.cat([synthesizer.represent(images)[1] for images in rounds])[-15:].half()
    assert torch.equal(synthesizer.memory, expected)
    assert synthesizer.memory.untyped_storage().nbytes() == 15 * LENGTH * 2, "a checkpoint holds no more"


def test_a_round_remembers_the_images_it_keeps():
    synthesizer = method(augment=lambda x: x).synthesizer()
    batch = synthesizer.synthesize(classifier(1))
    with torch.no_grad():
        assert torch.equal(synthesizer.memory, synthesizer.represent(batch.images)[1].half())


def after_one_round(student, **flags):
    pieces = method(**flags)
    synthesizer = pieces.initial_synthesizer()
    torch.manual_seed(1)
    synthesizer.synthesize(student)
    return pieces, synthesizer


def test_a_saved_synthesizer_goes_on_bit_for_bit():
    student = classifier(1)
    pieces, unbroken = after_one_round(student)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    resumed = pieces.initial_synthesizer()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    outcomes = []
    for synthesizer in (unbroken, resumed, pieces.initial_synthesizer()):
        torch.manual_seed(2)
        batch = synthesizer.synthesize(student)
        state = synthesizer.state_dict()
        outcomes.append([batch.images, state["memory"], *state["head"].values(), *batch.scalars.values()])
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0], outcomes[1], strict=True))
    moments = [s.optimizer.state[s.head[0].weight] for s in (unbroken, resumed)]
    assert moments[0]["step"] == moments[1]["step"] == 4 and torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])
    assert not torch.equal(outcomes[0][0], outcomes[2][0]), "one that starts anew does not: the state matters"


def test_a_state_holds_the_heads_moments_alone():
    _, synthesizer = after_one_round(classifier(1))
    assert len(synthesizer.optimizer.state) == 4 and len(synthesizer.state_dict()["optimizer"]["state"]) == 4


def test_distillation_goes_on_from_the_initial_bank():
    pieces, initial = after_one_round(classifier(1))
    synthesizer = pieces.synthesizer()
    assert synthesizer.adv == 0.5 and initial.adv == 0
    synthesizer.load_state_dict(initial.state_dict())
    assert torch.equal(synthesizer.memory, initial.memory) and len(synthesizer.memory) == 6
    with pytest.raises(UserError, match="--head_dim 12 found, .* give --head_dim 10"):
        method(head_dim=12).synthesizer().load_state_dict(initial.state_dict())
    slower = method(lr_g=1e-4).synthesizer()
    slower.load_state_dict(initial.state_dict())
    assert {group["lr"] for group in slower.optimizer.param_groups} == {1e-4}


def test_the_adversarial_loss_counts_agreement_alone():
    images, labels = torch.rand(6, 3, 16, 16), torch.zeros(6, dtype=torch.long)
    synthesizer = method(augment=lambda x: x).synthesizer()
    with torch.no_grad():
        logits = synthesizer.teacher(images)
    assert synthesizer.losses(images, labels, lambda x: -logits)["loss_adv"] == 0
    half = torch.cat([2 * logits[:3], -logits[3:]])
    expected = F.kl_div(half[:3].log_softmax(1), logits[:3].log_softmax(1), reduction="sum", log_target=True) / 6
    assert synthesizer.losses(images, labels, lambda x: half)["loss_adv"].item() == pytest.approx(-expected.item(), rel=1e-4)


def test_the_initial_bank_never_asks_the_student():
    def student(images):
        raise AssertionError("asked")

    batch = method().initial_synthesizer().synthesize(student)
    assert set(batch.scalars) == {"loss_synthesis", "loss_oh", "loss_bn", "loss_cr"}


def test_without_the_contrastive_loss_there_is_one_view_and_no_state():
    synthesizer, seen = method(cr=0.0).initial_synthesizer(), []
    synthesizer.teacher.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    assert "loss_cr" not in synthesizer.synthesize(None).scalars and set(seen) == {6}
    assert synthesizer.state_dict() == {} and synthesizer.load_state_dict({}) is None


def test_the_embedding_learns_to_tell_images_apart():
    synthesizer = method(bn=0.0, oh=0.0, g_steps=1, lr_g=1e-2).initial_synthesizer()
    synthesizer.g_steps = 1
    losses = []
    for seed in range(25):
        torch.manual_seed(seed % 2)
        losses.append(synthesizer.synthesize(None).scalars["loss_cr"].item())
    assert sum(losses[-4:]) < sum(losses[2:6])


def test_bad_input():
    for flag in ("g_steps", "init_g_steps"):
        with pytest.raises(UserError, match=f"--{flag} 0"):
            method(**{flag: 0})
