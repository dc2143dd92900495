"""Losses that more than one method uses. Each is a function of tensors that computes in float32 and returns a scalar."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.runtime.errors import UserError
from models.classifier import layers_with_statistics

Terms = dict[str, tuple[float, Tensor]]  # {name: (weight, scalar)}


def weighted_sum(terms: Terms) -> dict[str, Tensor]:
    """The dictionary {"loss": sum of weight * term} with every term added, unweighted, under its name."""
    total = sum(weight * term for weight, term in terms.values())
    return {"loss": total} | {name: term for name, (_, term) in terms.items()}


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)`` at temperature T, batch mean (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student_logits, teacher_logits: (B, C).
    Returns:
        Scalar >= 0; 0 if and only if the softened distributions agree.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def one_hot_loss(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy between the teacher's logits (B, C) and the wanted classes (B,) (DAFL, arXiv 1904.01186)."""
    return F.cross_entropy(teacher_logits.float(), labels)


def feature_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of two feature maps (B, C, h, w) of the same shape (SimKD, arXiv 2203.14001)."""
    return F.mse_loss(student_map.float(), teacher_map.float())


def rotations(images: Tensor) -> Tensor:
    """Images rotated by 0, 90, 180 and 270 degrees: (B, C, H, H) -> (4B, C, H, H), rotation k in rows kB .. (k+1)B - 1."""
    turned = [images, images.flip(3).transpose(2, 3), images.flip((2, 3)), images.transpose(2, 3).flip(3)]
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.cat([t.contiguous(memory_format=layout) for t in turned])


def rotation_labels(labels: Tensor) -> Tensor:
    """Joint labels ``4y + k`` of class y and rotation k, ordered as ``rotations``: (B,) -> (4B,) (CSD, arXiv 2307.04542)."""
    turns = torch.arange(4, device=labels.device)
    return (4 * labels[None, :] + turns[:, None]).reshape(-1)


def adversarial_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, agreeing_only: bool = False
) -> Tensor:
    """``-T^2 * KL(teacher || student)``, batch mean; low if student and teacher disagree (ZSKT, arXiv 1905.09768).

    Args:
        student_logits, teacher_logits: (B, C).
        temperature: T.
        agreeing_only: count only images to which both networks assign the same class (CMI, arXiv 2105.08584, and later
            methods). Images then become hard without leaving their class. The mean is still over all B images.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    if agreeing_only:
        divergence = divergence * (student_logits.argmax(1) == teacher_logits.argmax(1))
    return -divergence.mean() * temperature**2


def balance_loss(teacher_logits: Tensor) -> Tensor:
    """``sum p log p`` of the batch's mean class probabilities p (DAFL); least, -log C, if p is uniform."""
    mean = F.softmax(teacher_logits.float(), dim=1).mean(0)
    return torch.xlogy(mean, mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum()  # without the clamp, p = 0 has gradient NaN


class KLDistillation(nn.Module):
    """The student loss of most methods: ``kd_loss`` at temperature T. Labels are not used."""

    caches_logits = True

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """The dictionary {"loss", "kd"}, both the same scalar, of two outputs with logits (B, C)."""
        loss = kd_loss(student_out.logits, teacher_out.logits, self.temperature)
        return {"loss": loss, "kd": loss}


# The BN-statistics loss of DeepInversion (Yin et al. 2020, arXiv 1912.08795).
#
# A trained network keeps the running mean and variance of its training data at the input of every BN layer. The loss is the
# distance of a synthetic batch's mean and variance from them. PyTorch's batch-norm kernel computes the batch statistics in
# one pass, and their gradient is one fused multiply-add. On a CPU this is about seven times as fast as ``torch.var_mean``
# with autograd.


Stats = tuple[Tensor, Tensor]  # (mean, variance)


class _BatchStatistics(torch.autograd.Function):
    """Computes mean (C,) and biased variance (C,) of inputs (B, C, ...), in float32 or the inputs' higher precision."""

    @staticmethod
    def forward(ctx, inputs: Tensor) -> Stats:
        if torch.compiler.is_compiling():  # compiled, torch.var_mean takes one pass too
            axes = [axis for axis in range(inputs.dim()) if axis != 1]
            var, mean = torch.var_mean(inputs.float() if inputs.element_size() < 4 else inputs, axes, correction=0)
        else:
            # For inputs in half precision the kernel returns float32 statistics only if it is given a float32 weight.
            weight = torch.ones(inputs.shape[1], device=inputs.device) if inputs.element_size() < 4 else None
            _, mean, inverse_std = torch.native_batch_norm(inputs, weight, None, None, None, True, 0.0, 0.0)
            # The kernel returns an inverse std of 0 if the variance is 0 (a dead channel).
            var = torch.where(inverse_std == 0, inverse_std, inverse_std.pow(-2))
        ctx.save_for_backward(inputs, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        inputs, mean = ctx.saved_tensors
        count = inputs.numel() // inputs.shape[1]
        shape = (1, -1) + (1,) * (inputs.dim() - 2)
        slope = grad_var * (2 / count)
        offset = grad_mean / count - slope * mean
        return torch.addcmul(offset.to(inputs.dtype).view(shape), inputs, slope.to(inputs.dtype).view(shape))


def batch_statistics(inputs: Tensor) -> Stats:
    """Mean and biased variance of each channel over the batch and all positions, differentiable.

    Args:
        inputs: (B, C, ...) in any memory format, with at least two values per channel.
    Returns:
        Mean (C,) and variance (C,); float32 for inputs in half precision.
    """
    return _BatchStatistics.apply(inputs)


def bn_loss(batch_stats: list[Stats], running_stats: list[Stats]) -> Tensor:
    """Distance of a batch's BN statistics from the teacher's (DeepInversion, R_feature).

    Args:
        batch_stats: one (mean, var) per BN layer, each (C_l,), biased variance.
        running_stats: the teacher's running statistics, in the same order and shapes.
    Returns:
        Scalar >= 0: sum over layers of ||mean - running_mean||_2 + ||var - running_var||_2; 0 if and only if all agree.
    Raises:
        ValueError: the two lists differ in length.
    """
    if len(batch_stats) != len(running_stats):
        raise ValueError(
            f"{len(batch_stats)} layers with batch statistics, but {len(running_stats)} layers with running statistics"
        )
    distances = [
        torch.linalg.vector_norm(batch.float() - running.float())
        for pair, running_pair in zip(batch_stats, running_stats, strict=True)
        for batch, running in zip(pair, running_pair, strict=True)
    ]
    return torch.stack(distances).sum()


def collected(statistics: "BNStatistics | None", **options):
    """``statistics.collect(**options)``, or an empty context if ``statistics`` is None (``--bn 0``)."""
    return statistics.collect(**options) if statistics else nullcontext()


def normalizing_by_batch(network: nn.Module) -> nn.Module:
    """Copy of a network whose BN layers normalize by the statistics of the current batch, also in eval mode.

    Raises:
        UserError: the network has no BN layer with running statistics.
    """
    copied = copy.deepcopy(network)
    layers = layers_with_statistics(copied)
    if not layers:
        raise UserError("the teacher has no BatchNorm layer that could normalize by the batch; give --bn_mode running")
    for layer in layers:
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return copied


class BNStatistics:
    """Collects the batch statistics at the input of every BN layer of a network.

        statistics = BNStatistics(teacher)
        with statistics.collect() as batch_stats:
            teacher(images)
        loss = bn_loss(batch_stats, statistics.running)

    Outside ``collect`` the hooks do nothing. Any number of BN layers is supported, 1-d to 3-d. Layers are in the order in
    which they run, and a layer that runs twice counts twice.

    Raises:
        UserError: the network has no BN layer with running statistics.
    """

    def __init__(self, network: nn.Module):
        layers = layers_with_statistics(network)
        if not layers:
            raise UserError("the teacher has no BatchNorm layer, so it keeps no statistics to match; give --bn 0")
        self.running: list[Stats] = []
        self._batch: list[Stats] | None = None
        self._rows: int | None = None
        self._pooled: list[Tensor] | None = None
        for layer in layers:  # hooks stay registered: compiled code cannot add or remove them
            layer.register_forward_pre_hook(self._record)

    def _record(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._batch is None:
            return
        inputs = args[0]
        self._batch.append(batch_statistics(inputs if self._rows is None else inputs[: self._rows]))
        if self._pooled is not None:
            self._pooled.append(inputs.mean(tuple(range(2, inputs.ndim))) if inputs.ndim > 2 else inputs)
        self.running.append((layer.running_mean, layer.running_var))

    @contextmanager
    def collect(self, rows: int | None = None, pooled: list[Tensor] | None = None) -> Iterator[list[Stats]]:
        """Context in which forward passes append to the yielded list; ``running`` gets the matching running statistics.

        Args:
            rows: number of images, from the first one, over which statistics are computed; None: the whole batch.
            pooled: list to which every layer's input is appended, averaged over positions: (B, C_l), always the whole batch.
        """
        batch: list[Stats] = []
        self.running, self._batch, self._rows, self._pooled = [], batch, rows, pooled
        try:
            yield batch
        finally:
            self._batch = self._pooled = None
