"""Losses against closed forms and independent computations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datafree.base import balanced_labels
from datafree.generators import Generator, UpsampleConv2d, reset
from datafree.losses import BNStatistics, batch_statistics, bn_loss, kd_loss, one_hot_loss, rotation_labels, rotations
from engine.runtime.errors import UserError


def test_kd_loss_is_temperature_squared_kl():
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    T = 4.0
    p, q = torch.softmax(teacher / T, 1), torch.softmax(student / T, 1)
    expected = T * T * (p * (p / q).log()).sum()
    assert torch.allclose(kd_loss(student, teacher, T), expected, atol=1e-6)
    assert kd_loss(teacher, teacher, T) == 0


def test_kd_loss_is_a_batch_mean():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    rows = [kd_loss(student[k : k + 1], teacher[k : k + 1], 20.0) for k in range(5)]
    assert torch.allclose(kd_loss(student, teacher, 20.0), torch.stack(rows).mean(), rtol=1e-4)


def test_one_hot_loss_at_uniform_logits():
    assert math.isclose(float(one_hot_loss(torch.zeros(3, 10), torch.tensor([0, 4, 9]))), math.log(10), rel_tol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_statistics_equal_var_mean(channels_last):
    x = torch.randn(6, 5, 4, 4) * 3 + 1
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    mean, var = batch_statistics(x)
    expected_var, expected_mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert torch.allclose(mean, expected_mean, atol=1e-5) and torch.allclose(var, expected_var, rtol=1e-4)


def test_batch_statistics_gradient():
    x = torch.randn(3, 2, 2, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(batch_statistics, (x,))
    assert torch.autograd.gradcheck(batch_statistics, (torch.randn(6, 3, dtype=torch.double, requires_grad=True),))


def test_batch_statistics_of_a_dead_channel_are_zero():
    x = torch.randn(4, 2, 3, 3)
    x[:, 1] = 0
    _, var = batch_statistics(x)
    assert var[1] == 0 and torch.isfinite(var).all()


def test_bn_loss_by_hand():
    batch = [(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])), (torch.tensor([0.0]), torch.tensor([2.0]))]
    running = [(torch.zeros(2), torch.ones(2)), (torch.zeros(1), torch.zeros(1))]
    assert float(bn_loss(batch, running)) == pytest.approx(5.0 + 0.0 + 0.0 + 2.0)
    assert bn_loss(running, running) == 0
    with pytest.raises(ValueError, match="1 layers"):
        bn_loss(batch[:1], running)


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    ).eval()


def test_bn_statistics_see_the_inputs_of_bn_layers():
    network, x = small_network(), torch.randn(8, 3, 9, 9)
    statistics = BNStatistics(network)
    with statistics.collect() as batch:
        network(x)
    inputs = network[0](x)
    var, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
    assert torch.allclose(batch[0][0], mean, atol=1e-5) and torch.allclose(batch[0][1], var, rtol=1e-4)
    assert len(batch) == 2 and statistics.running[1][0] is network[4].running_mean
    network(x)
    assert len(batch) == 2, "hooks do nothing outside the context"


def test_bn_statistics_of_half_precision_are_float32():
    inputs = (3 * torch.randn(16, 4, 9, 9) + 5).bfloat16()
    gradients = []
    for images in (inputs, inputs.float()):
        images = images.clone().requires_grad_()
        mean, var = batch_statistics(images)
        (mean.sum() + var.square().sum()).backward()
        gradients.append(images.grad.float())
    assert mean.dtype == var.dtype == torch.float32
    expected_var, expected_mean = torch.var_mean(inputs.float(), (0, 2, 3), correction=0)
    mean, var = batch_statistics(inputs)
    assert torch.allclose(mean, expected_mean, rtol=1e-4) and torch.allclose(var, expected_var, rtol=1e-3)
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()


def test_bn_loss_is_zero_for_the_data_that_set_the_statistics():
    network, x = small_network(), torch.randn(64, 3, 9, 9)
    for layer in (network[1], network[4]):
        layer.momentum = 1.0
    network.train()(x)
    for layer, batch in ((network[1], network[0](x)),):
        layer.running_var = torch.var(batch, (0, 2, 3), correction=0).detach()
    statistics = BNStatistics(network.eval())
    with statistics.collect() as batch_stats:
        network(x)
    assert bn_loss(batch_stats[:1], statistics.running[:1]).item() < 1e-4


def test_bn_statistics_want_a_bn_layer():
    with pytest.raises(UserError, match="no BatchNorm layer.*--bn 0"):
        BNStatistics(nn.Linear(2, 2))


def test_rotations_are_quarter_turns_with_joint_labels():
    x = torch.randn(2, 3, 4, 4)
    turned = rotations(x)
    for k in range(4):
        assert torch.equal(turned[2 * k : 2 * k + 2], torch.rot90(x, k, (2, 3))), k
    assert rotation_labels(torch.tensor([3, 7])).tolist() == [12, 28, 13, 29, 14, 30, 15, 31]


@pytest.mark.parametrize("size", [16, 32, 64, 224])
def test_generator_sizes(size):
    generator = reset(Generator(8, size))
    images = generator(torch.randn(2, 8))
    assert images.shape == (2, 3, size, size) and 0 <= images.min() and images.max() <= 1


def test_upsample_convolution_equals_its_two_parts():
    layer, x = UpsampleConv2d(5, 7).double(), torch.randn(2, 5, 6, 6, dtype=torch.double)
    apart = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, padding=1)
    assert torch.allclose(layer(x), apart, atol=1e-12)


def test_generator_of_an_impossible_size():
    with pytest.raises(UserError, match="multiple of"):
        Generator(8, 30)


def test_generator_reset_follows_the_seed():
    generator = Generator(8, 16)
    torch.manual_seed(1)
    first = [p.clone() for p in reset(generator).parameters()]
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, reset(generator).parameters()))


def test_balanced_labels():
    counts = torch.bincount(balanced_labels(23, 10, torch.device("cpu")), minlength=10)
    assert counts.sum() == 23 and counts.max() - counts.min() <= 1
    assert len(set(balanced_labels(5, 10, torch.device("cpu")).tolist())) == 5
