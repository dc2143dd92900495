"""CSD: losses, gradients, steps of the head and a whole synthesis step, against independent computations."""

import copy
import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datafree.csd import CSD, AlignedDistillation, CSDConfig
from datafree.generators import reset
from engine.runtime.errors import UserError
from models.classifier import Output, frozen
from tests.conftest import TINY, build_network, make_classifier, make_task, outcome
from tests.methods.test_adi import classifier, inversion_loss, network_of

LABELS = torch.arange(8) % 4


def method(student=None, **flags):
    torch.manual_seed(5)
    small = {"init_g_steps": 2, "g_steps": 2, "synthesis_batch_size": 8, "nz": 6}
    return CSD(CSDConfig(**small | flags), classifier(0), student or classifier(1), make_task(num_classes=4))


def bounds(count):
    """Smallest and largest cross-entropy of a logit vector with n = ``count`` entries and Euclidean length 1.

    CE = log(1 + sum of exp(v_j - v_y) over j != y). By the Cauchy-Schwarz inequality the mean of v_j - v_y is at least -s,
    with s = sqrt(n / (n - 1)). Since exp is convex, this gives the smallest CE. For the largest CE, exp(sqrt(v_j^2)) is
    concave in v_j^2 under the condition sum v_j^2 <= 1. Equal v_j therefore give the largest CE, with v_j - v_y <= s.
    """
    s = math.sqrt(count / (count - 1))
    return math.log(1 + (count - 1) * math.exp(-s)), math.log(1 + (count - 1) * math.exp(s))


@pytest.mark.parametrize("count", [4, 8, 40, 400])
def test_the_bounds_are_reached_and_never_left(count):
    torch.manual_seed(0)
    target, found = torch.zeros(1, dtype=torch.long), []
    for sign in (1, -1):
        raw = torch.randn(1, count, dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=0.1)
        for _ in range(300):
            loss = F.cross_entropy(F.normalize(raw, dim=1), target)
            optimizer.zero_grad()
            (sign * loss).backward()
            optimizer.step()
            assert bounds(count)[0] - 1e-9 < loss < bounds(count)[1] + 1e-9
        found.append(loss.item())
    assert found == pytest.approx(bounds(count), abs=1e-4)


def head_of(parameters, features):
    """The head's logits, computed from its four parameter tensors."""
    first, bias, second, other_bias = parameters
    out = (features @ first.T + bias).clamp(min=0) @ second.T + other_bias
    return out / out.square().sum(1, keepdim=True).sqrt()


def rotation_loss(head, student, images, labels):
    """- mean over k and images of CE(h(f_S(rot_k x)), 4y + k), for a head h given by its four parameter tensors."""
    total = 0
    for k in range(4):
        logits = head_of(head, network_of(student, torch.rot90(images, k, (2, 3)))[2])
        total = total + sum(logits[i].exp().sum().log() - logits[i, 4 * y + k] for i, y in enumerate(labels.tolist()))
    return -total / (4 * len(images))


def test_every_loss_and_its_gradient():
    pieces = method(csd=3.0, bn=5.0, oh=7.0)
    synthesizer, images = pieces.synthesizer(), torch.rand(8, 3, 16, 16, requires_grad=True)
    losses = synthesizer.losses(images, LABELS, pieces.student)
    bn, oh = inversion_loss(pieces.teacher, images, LABELS)
    csd = rotation_loss([*synthesizer.head.parameters()], pieces.student, images, LABELS)
    for name, expected in {"loss_bn": bn, "loss_oh": oh, "loss_csd": csd, "loss": 3 * csd + 5 * bn + 7 * oh}.items():
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)
        found, wanted = (torch.autograd.grad(x, images, retain_graph=True)[0] for x in (losses[name], expected))
        assert (found - wanted).norm() < 1e-3 * wanted.norm(), name
    assert bounds(16)[0] < -csd < bounds(16)[1]


def test_a_whole_synthesis_step():
    """Two steps of Adam on generator and noise. The images of the lowest loss are kept, then the head is reset."""
    pieces = method(csd=2.0, lr_g=0.01)
    synthesizer = pieces.synthesizer()
    reference, head = copy.deepcopy(synthesizer.generator), copy.deepcopy(synthesizer.head)
    torch.manual_seed(3)
    batch = synthesizer.synthesize(pieces.student)
    assert not any(torch.equal(a, b) for a, b in zip(head.parameters(), synthesizer.head.parameters()))
    assert not any(p.any() for name, p in synthesizer.head.named_parameters() if "bias" in name)
    torch.manual_seed(3)
    reset(reference).train()
    z = torch.randn(8, 6, requires_grad=True)
    optimizer = torch.optim.Adam([*reference.parameters(), z], lr=0.01, betas=(0.5, 0.999))
    seen = []
    for _ in range(2):
        images = reference(z)
        bn, oh = inversion_loss(pieces.teacher, images, batch.labels)
        loss = bn + oh + 2 * rotation_loss([*head.parameters()], pieces.student, images, batch.labels)
        seen.append((loss.item(), images.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lowest = min(seen, key=lambda pair: pair[0])
    assert float(batch.scalars["loss_synthesis"]) == pytest.approx(lowest[0], rel=1e-4)
    torch.testing.assert_close(batch.images, lowest[1], atol=1e-4, rtol=0)
    assert (seen[0][1] - seen[1][1]).abs().max() > 1e-2
    assert torch.bincount(batch.labels).tolist() == [2, 2, 2, 2]


def test_the_heads_steps_are_sgd_with_momentum_that_outlives_its_weights():
    pieces = method(lr_head=0.3)
    synthesizer, momenta = pieces.synthesizer(), [0, 0, 0, 0]
    for step in range(4):
        if step == 2:
            synthesizer.synthesize(pieces.student)  # resets the head's weights
        weights = [p.detach().clone().requires_grad_() for p in synthesizer.head.parameters()]
        images = torch.rand(8, 3, 16, 16)
        gradients = torch.autograd.grad(-rotation_loss(weights, pieces.student, images, LABELS), weights)
        momenta = [0.9 * m + g + 1e-4 * w for m, g, w in zip(momenta, gradients, weights)]
        synthesizer.after_step(pieces.student, images, LABELS)
        for found, weight, momentum in zip(synthesizer.head.parameters(), weights, momenta):
            torch.testing.assert_close(found, weight - 0.3 * momentum, rtol=1e-3, atol=1e-6)


def trained(pieces, steps):
    """A synthesizer whose head was trained for ``steps`` steps on the same images, and these images."""
    synthesizer = pieces.synthesizer()
    torch.manual_seed(7)
    # No two images or rotations of images are alike.
    images = torch.rand(8, 3, 16, 16) * torch.rand(8, 3, 1, 1) * torch.linspace(0, 1, 16)
    for _ in range(steps):
        synthesizer.after_step(pieces.student, images, LABELS)
    return synthesizer, images


def test_a_head_trained_hard_bounds_every_loss():
    torch.manual_seed(0)
    student = frozen(make_classifier(num_classes=4, mean=0.5, std=0.25))
    pieces = method(student, csd=100.0, lr_head=1.0, g_steps=30, lr_g=0.05)
    synthesizer, images = trained(pieces, 200)
    least, greatest = bounds(16)
    learnt = -synthesizer.losses(images, LABELS, student)["loss_csd"].item()
    assert least < learnt < math.log(16) - 0.3, "it has learnt: of logits of any length nothing would bound the loss"
    scalars = synthesizer.synthesize(pieces.student).scalars
    assert -greatest < scalars["loss_csd"] < -least
    assert 0 < scalars["loss_oh"] < 20 and 0 < scalars["loss_bn"] < 200
    assert scalars["loss_synthesis"] > -100 * greatest


def test_a_run_with_a_head_trained_hard_stays_within_bounds(command, teacher_file, tmp_path):
    flags = f"--method csd --dataset digits --teacher resnet8 --student resnet8 --gpu -1 --teacher_ckpt {teacher_file}"
    lengths = "--epochs 2 --kd_steps 20 --ep_steps 20 --batch_size 16 --csd 100 --lr_head 1 --g_steps 5 --save_dir"
    command("datafree_kd", f"{flags} {TINY['csd']} {lengths} {tmp_path}")
    least, greatest = bounds(40)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss_csd"] for line in lines if "loss_csd" in line]
    assert len(found) == 2 and all(-greatest < value < -least for value in found)


def test_the_heads_momentum_survives_a_stop():
    pieces = method()
    unbroken, images = trained(pieces, 3)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, without = pieces.synthesizer(), pieces.synthesizer()
    resumed.load_state_dict(state)
    without.head.load_state_dict(state["head"])
    for synthesizer in (unbroken, resumed, without):
        synthesizer.after_step(pieces.student, images, LABELS)
    heads = [torch.cat([p.detach().flatten() for p in s.head.parameters()]) for s in (unbroken, resumed, without)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_warm_generator_goes_on_where_the_last_round_left_it(distill, tmp_path):
    """Checked in memory, and for a run that stops after its initial bank and is resumed from its files."""
    torch.manual_seed(0)
    weights = []
    for warm in (False, True):
        synthesizer = method(warm_generator=warm).initial_synthesizer()
        assert synthesizer.independent != warm and not synthesizer.state_dict()
        for _ in range(2):
            synthesizer.synthesize(None)
            weights.append(synthesizer.generator.project.weight.detach().clone())
        assert bool(synthesizer.state_dict()) == warm
    moved = [float((second - first).abs().mean()) for first, second in (weights[:2], weights[2:])]
    assert moved[1] < 0.2 * moved[0]
    flags = "--warm_generator --init_rounds 2"
    for name, stops in (("unbroken", ("",)), ("stopped", ("--stages synthesize", ""))):
        for stop in stops:
            distill("csd", tmp_path / name, f"{flags} {stop}")
    assert (tmp_path / "unbroken/bank/synthesizer.pth").exists()
    assert outcome(tmp_path / "unbroken") == outcome(tmp_path / "stopped")
    with pytest.raises(UserError, match="saved by another --method or for networks of other sizes"):
        distill("csd", tmp_path / "other", f"--warm_generator --nz 9 --init_bank {tmp_path / 'unbroken'}")
    distill("csd", tmp_path / "cold", f"--nz 9 --init_bank {tmp_path / 'unbroken'}")


def test_a_bank_of_another_method_is_one_line(distill, finished, tmp_path):
    with pytest.raises(UserError, match="saved by another --method or for networks of other sizes"):
        distill("csd", tmp_path / "run", f"--init_bank {finished('fast')}")


@pytest.mark.parametrize("sizes", [((5, 4, 4), (6, 4, 4)), ((5, 8, 8), (6, 4, 4)), ((5, 4, 4), (6, 8, 8))])
def test_the_students_loss_and_its_gradient(sizes):
    torch.manual_seed(0)
    (student_shape, teacher_shape), labels = sizes, torch.tensor([1, 0, 2])
    objective = AlignedDistillation(CSDConfig(T=4.0, ce=2.0, feat=3.0), student_shape, teacher_shape)
    convolutions = [m for m in objective.align if isinstance(m, nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convolutions] == [(12, 5, 1, 1), (12, 12, 3, 3), (6, 12, 1, 1)]
    assert objective.align[-1] is convolutions[-1] and all(c.bias is None for c in convolutions), (
        "nothing after the last one"
    )
    student, teacher, map_s, map_t = (
        torch.randn(3, 4),
        torch.randn(3, 4),
        torch.randn(3, *student_shape),
        torch.randn(3, *teacher_shape),
    )
    student.requires_grad_(), map_s.requires_grad_()
    losses = objective(Output(teacher, teacher, None, {}, map_t), Output(student, student, None, {}, map_s), labels)
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    kd = 16 * (p * (p / q).log()).sum() / 3
    ce = -student.softmax(1)[range(3), labels].log().mean()
    x, target = (F.avg_pool2d(m, m.shape[2] // 4) for m in (map_s, map_t))
    for k, convolution in enumerate(convolutions):
        x = F.conv2d(x, convolution.weight, padding=k % 2)
        if k < 2:  # followed by BN in training mode and ReLU
            x = ((x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()).clamp(min=0)
    feat = (x - target).square().mean()
    for name, expected in {"kd": kd, "ce": ce, "feat": feat, "loss": kd + 2 * ce + 3 * feat}.items():
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(*(torch.autograd.grad(x, (student, map_s)) for x in (losses["loss"], kd + 2 * ce + 3 * feat))):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["wrn16_1", "wrn40_2"])
def test_the_map_of_a_pre_activation_network_is_before_its_last_norm(name):
    network = build_network(name, 10)
    nn.init.uniform_(network.bn1.bias, -1, 1)
    wrapped, images = frozen(make_classifier(network, image_size=32, mean=0.5, std=0.25)), torch.rand(2, 3, 32, 32)
    out = wrapped(images, return_features=True)
    x = network.conv1((images - 0.5) / 0.25)
    expected = network.block3(network.block2(network.block1(x)))
    torch.testing.assert_close(out.block_map, expected)
    torch.testing.assert_close(out.feature_map, network.bn1(expected).relu())
    assert wrapped.block_map_shape == tuple(expected.shape[1:]) and expected.min() < 0


def test_the_map_of_another_network_is_its_last():
    out = frozen(make_classifier(image_size=32, mean=0.5, std=0.25))(torch.rand(2, 3, 32, 32), True)
    assert out.block_map is out.feature_map and out.block_map.min() >= 0
