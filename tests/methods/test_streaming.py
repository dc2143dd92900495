"""DAFL, ZSKT, DFAD, DFQ and the control experiments, against closed forms and independent references."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datafree import dafl, dfad, dfq, zskt
from datafree.kd import KDObjective
from datafree.losses import KLDistillation, adversarial_loss, balance_loss, kd_loss
from datafree.noise import NoiseImages
from engine.loops.distill import Distillation, Schedule
from models.classifier import Output
from tests.conftest import make_classifier, make_task


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def out(logits, **maps):
    return Output(logits, logits, None, maps.get("maps", {}))


@pytest.fixture
def task():
    return make_task()


@pytest.fixture
def networks():
    torch.manual_seed(0)
    teacher, student = (make_classifier(name).eval() for name in ("resnet8", "wrn16_1"))
    return teacher.requires_grad_(False), student.requires_grad_(False)


def test_adversarial_loss_is_minus_the_divergence_sample_by_sample():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 5, 4)) * 3
    expected = []
    for temperature in (1.0, 3.0):
        p, q = softmax(t / temperature), softmax(s / temperature)
        expected.append(-(p * (np.log(p) - np.log(q))).sum(1) * temperature**2)
    student, teacher = torch.tensor(s), torch.tensor(t)
    assert adversarial_loss(student, teacher).item() == pytest.approx(expected[0].mean(), rel=1e-5)
    assert adversarial_loss(student, teacher, 3.0).item() == pytest.approx(expected[1].mean(), rel=1e-5)
    assert adversarial_loss(student, teacher, 3.0).item() == pytest.approx(-kd_loss(student, teacher, 3.0).item(), rel=1e-5)
    agree = s.argmax(1) == t.argmax(1)
    assert 0 < agree.sum() < 5
    masked = adversarial_loss(student, teacher, agreeing_only=True).item()
    assert masked == pytest.approx(expected[0][agree].sum() / 5, rel=1e-5)


def test_balance_is_least_at_a_uniform_batch():
    uniform = torch.eye(4).repeat(3, 1) * 50
    assert balance_loss(uniform).item() == pytest.approx(-math.log(4), abs=1e-5)
    one_class = torch.tensor([[50.0, 0, 0, 0]] * 6)
    assert balance_loss(one_class).item() == pytest.approx(0, abs=1e-5)
    two = torch.tensor([[80.0, 0, 0, 0], [0, 80, 0, 0], [0, 80.0, 0, 0]])
    p = np.array([1, 2]) / 3
    assert balance_loss(two).item() == pytest.approx((p * np.log(p)).sum(), abs=1e-5)
    sure = torch.tensor([[120.0, 0, 0, 0]] * 6, requires_grad=True)  # the other probabilities underflow to 0
    balance_loss(sure).backward()
    assert sure.grad.isfinite().all()


def test_dafl_wants_certain_active_balanced_images(networks, task):
    """The three terms and their weights are each recomputed; the student is not used."""
    config = dafl.DAFLConfig(nz=8)
    synthesizer = dafl.DAFLSynthesizer(config, networks[0], task)
    images = torch.rand(6, 3, 16, 16)
    losses = synthesizer.losses(images, None)
    told = networks[0](images, return_features=True)
    probabilities = told.logits.softmax(1)
    oh = -probabilities.max(1).values.log().mean().item()
    mean = probabilities.mean(0)
    balance = (mean * mean.log()).sum().item()
    act = -told.features.abs().mean().item()
    assert losses["loss_oh"].item() == pytest.approx(oh, rel=1e-4)
    assert losses["loss_act"].item() == pytest.approx(act, rel=1e-5)
    assert losses["loss_balance"].item() == pytest.approx(balance, rel=1e-4)
    assert losses["loss"].item() == pytest.approx(oh + 0.001 * act + 20 * balance, rel=1e-4)
    assert dafl.activation_loss(torch.tensor([[1.0, -3.0]])).item() == -2


def test_attention_matches_where_maps_are_active():
    """Against a double loop. Channels may differ, a map's scale has no effect, and sizes of only one network are skipped."""
    torch.manual_seed(0)
    student, teacher = torch.rand(2, 3, 2, 2) - 0.5, torch.rand(2, 5, 2, 2) - 0.5

    def unit(maps):
        rows = [[sum(float(v) ** 2 for v in m[:, i, j]) for i in range(2) for j in range(2)] for m in maps]
        return [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]

    pairs = zip(sum(unit(student), []), sum(unit(teacher), []))
    expected = sum((a - b) ** 2 for a, b in pairs) / 8
    loss = zskt.attention_loss({(4, 4): torch.rand(2, 1, 4, 4), (2, 2): student}, {(2, 2): teacher})
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert zskt.attention_loss({(2, 2): 7 * teacher}, {(2, 2): teacher}).item() == pytest.approx(0, abs=1e-12)
    objective = zskt.BeliefMatching(2.0, 250.0)
    logits = torch.randn(2, 2, 4)
    losses = objective(out(logits[0], maps={(2, 2): teacher}), out(logits[1], maps={(2, 2): student}), None)
    assert losses["loss"].item() == pytest.approx(kd_loss(logits[1], logits[0], 2.0).item() + 250 * expected, rel=1e-4)


def test_every_scale_of_a_network_is_found(networks):
    """The last map of each size: three in CIFAR ResNets and WRNs; the last is the map before pooling."""
    teacher, student = networks
    assert (
        [s[1:] for s in teacher.feature_map_shapes]
        == [s[1:] for s in student.feature_map_shapes]
        == [(16, 16), (8, 8), (4, 4)]
    )
    images, seen = torch.rand(2, 3, 16, 16), {}
    for key, module in (("teacher", teacher.network.layer1), ("student", student.network.block2.layer[0].relu1)):
        module.register_forward_hook(lambda module, inputs, output, key=key: seen.setdefault(key, output))
    told = teacher(images, return_features=True)
    assert list(told.feature_maps) == [(16, 16), (8, 8), (4, 4)] and told.feature_maps[4, 4] is told.feature_map
    assert torch.equal(told.feature_maps[16, 16], seen["teacher"])  # the output of a block
    told = student(images, return_features=True)
    assert torch.equal(told.feature_maps[16, 16], seen["student"])  # a map after the activation


def test_dfad_is_one_game_of_mean_absolute_differences(networks, task):
    teacher, student = networks
    s, t = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert dfad.logit_distance(s, t, 1.0).item() == 1.0 and dfad.logit_distance(s, t, 2.0).item() == 0.5
    assert dfad.LogitMatching(1.0)(out(t), out(s), None)["loss"].item() == 1.0
    images = torch.rand(4, 3, 16, 16)
    losses = dfad.DFADSynthesizer(dfad.DFADConfig(nz=8, adv=2.0), teacher, task).losses(images, student)
    assert losses["loss"].item() == pytest.approx(-2 * (student(images) - teacher(images)).abs().mean().item(), rel=1e-5)


def test_dfq_adds_up(networks, task):
    """The loss is the sum of its weighted terms; with bn 0 there is no loss_bn."""
    teacher, student = networks
    images = torch.rand(4, 3, 16, 16)
    losses = dfq.DFQSynthesizer(dfq.DFQConfig(nz=8, bn=3.0), teacher, task).losses(images, student)
    logits = teacher(images)
    parts = {
        "loss_adv": adversarial_loss(student(images), logits),
        "loss_oh": F.cross_entropy(logits, logits.argmax(1)),
        "loss_balance": balance_loss(logits),
    }
    for name, value in parts.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4)
    total = parts["loss_adv"] + parts["loss_oh"] + 20 * parts["loss_balance"] + 3 * losses["loss_bn"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-4) and losses["loss_bn"] > 0
    assert "loss_bn" not in dfq.DFQSynthesizer(dfq.DFQConfig(nz=8, bn=0.0), teacher, task).losses(images, student)


@pytest.mark.parametrize("module, name", [(dafl, "DAFL"), (zskt, "ZSKT"), (dfad, "DFAD"), (dfq, "DFQ")])
def test_generator_steps_lower_their_loss(module, name, networks, task):
    """With fixed networks, 15 steps lower the loss on one fixed batch of noise."""
    torch.manual_seed(0)
    config = getattr(module, f"{name}Config")(nz=8, synthesis_batch_size=32, lr_g=5e-3, g_steps=15)
    synthesizer = getattr(module, f"{name}Synthesizer")(config, networks[0], task)
    z = torch.randn(64, 8)

    def now():
        with torch.no_grad():
            return synthesizer.losses(synthesizer.generator(z), networks[1])["loss"].item()

    before = now()
    batch = synthesizer.synthesize(networks[1])
    assert now() < before and batch.images.shape == (32, 3, 16, 16) and (batch.labels == -1).all()
    images, labels = next(synthesizer.batches(5, seed=0))
    assert len(images) == 5 and not images.requires_grad and 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize("module, name, falls", [(zskt, "ZSKT", True), (dfad, "DFAD", True), (dafl, "DAFL", False)])
def test_the_generator_s_rate_falls_with_the_student_s(module, name, falls, networks, task):
    """The learning rate follows a cosine over the rounds in the methods whose papers decay both learning rates."""
    config = getattr(module, f"{name}Config")(nz=8, synthesis_batch_size=2)
    synthesizer = getattr(module, f"{name}Synthesizer")(config, networks[0], task)
    schedule = Schedule(1, 8, 2, batch_size=2, lr=0.3, momentum=0.9, weight_decay=0.0, warmup_epochs=0)
    distillation = Distillation(*networks, KLDistillation(1.0), synthesizer, schedule, task.precision)
    for round in range(schedule.rounds):
        distillation.synthesize(round)
        share = 0.5 + 0.5 * math.cos(math.pi * round / 4) if falls else 1.0
        assert synthesizer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * share)


def test_a_stream_goes_on_from_its_state(networks, task):
    def rounds(synthesizer, seed):
        torch.manual_seed(seed)
        return synthesizer.synthesize(networks[1]).images

    config = zskt.ZSKTConfig(nz=8, synthesis_batch_size=4)
    first = zskt.ZSKTSynthesizer(config, networks[0], task)
    rounds(first, 1)
    state = {k: v for k, v in torch.load(_saved(first.state_dict()), weights_only=True).items()}
    expected = rounds(first, 2)
    second = zskt.ZSKTSynthesizer(config, networks[0], task)
    second.load_state_dict(state)
    assert torch.equal(rounds(second, 2), expected)


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_the_control_is_hinton_s_loss():
    logits, labels = torch.randn(2, 6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    losses = KDObjective(4.0, 0.5)(out(logits[0]), out(logits[1]), labels)
    expected = kd_loss(logits[1], logits[0], 4.0) + 0.5 * F.cross_entropy(logits[1], labels)
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    unlabelled = torch.full((6,), -1)
    assert KDObjective(4.0, 0.0)(out(logits[0]), out(logits[1]), unlabelled)["loss"] == losses["kd"]
    assert KLDistillation(4.0)(out(logits[0]), out(logits[1]), unlabelled)["loss"] == losses["kd"]


def test_noise_has_the_distribution_it_says(task):
    torch.manual_seed(0)
    uniform, normal = (next(NoiseImages(task, kind).batches(200, seed=0))[0] for kind in ("uniform", "normal"))
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01) and uniform.std().item() == pytest.approx(
        12**-0.5, abs=0.01
    )
    assert normal.mean().item() == pytest.approx(0.5, abs=0.01) and 0.2 < normal.std().item() < 0.26
    assert min(uniform.min(), normal.min()) >= 0 and max(uniform.max(), normal.max()) <= 1
