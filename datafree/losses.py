"""Losses that more than one method uses. Each is a function of tensors, float32 inside, scalar out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Terms = dict[str, tuple[float, Tensor]]  # {name: (weight, scalar)}


def weighted_sum(terms: Terms) -> dict[str, Tensor]:
    """{"loss": sum of weight * term, and every term unweighted}."""
    total = sum(weight * term for weight, term in terms.values())
    return {"loss": total} | {name: term for name, (_, term) in terms.items()}


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)`` at temperature T, batch mean (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student_logits, teacher_logits: (B, C).
    Returns:
        Scalar >= 0; 0 iff the softened distributions agree.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def one_hot_loss(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the teacher's logits (B, C) to the wanted classes (B,) (DAFL, arXiv 1904.01186)."""
    return F.cross_entropy(teacher_logits.float(), labels)


def feature_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of two feature maps (B, C, h, w) of one shape (SimKD, arXiv 2203.14001)."""
    return F.mse_loss(student_map.float(), teacher_map.float())


def rotations(images: Tensor) -> Tensor:
    """All four quarter turns: (B, C, H, H) -> (4B, C, H, H), turn k in rows kB .. (k+1)B - 1."""
    turned = [images, images.flip(3).transpose(2, 3), images.flip((2, 3)), images.transpose(2, 3).flip(3)]
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.cat([t.contiguous(memory_format=layout) for t in turned])


def rotation_labels(labels: Tensor) -> Tensor:
    """Joint class-and-turn labels ``4y + k`` of ``rotations``: (B,) -> (4B,) (CSD, arXiv 2307.04542)."""
    turns = torch.arange(4, device=labels.device)
    return (4 * labels[None, :] + turns[:, None]).reshape(-1)


def adversarial_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, agreeing_only: bool = False
) -> Tensor:
    """``-T^2 * KL(teacher || student)``, batch mean: low where the student is wrong about the image (ZSKT, arXiv 1905.09768).

    Args:
        student_logits, teacher_logits: (B, C).
        agreeing_only: count only samples on which both name the same class (CMI, arXiv 2105.08584, and later methods), so
            that images are hard without leaving the teacher's classes. The mean is still over all B.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    if agreeing_only:
        divergence = divergence * (student_logits.argmax(1) == teacher_logits.argmax(1))
    return -divergence.mean() * temperature**2


def balance_loss(teacher_logits: Tensor) -> Tensor:
    """``sum p log p`` of the batch's mean class probabilities p: least, -log C, where all classes are as frequent (DAFL)."""
    mean = F.softmax(teacher_logits.float(), dim=1).mean(0)
    return torch.xlogy(mean, mean).sum()


class KLDistillation(nn.Module):
    """The objective of most methods: ``kd_loss`` at temperature T and nothing else; labels play no part."""

    logits_only = True

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """Outputs with logits (B, C) -> {"loss", "kd"}, the same scalar."""
        loss = kd_loss(student_out.logits, teacher_out.logits, self.temperature)
        return {"loss": loss, "kd": loss}
