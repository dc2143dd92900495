"""Distillation of activation maps at every scale (mSARC of SpaceshipNet, Yu et al., CVPR 2023)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.losses import kd_loss


class MapDistillation(nn.Module):
    """Student loss KL_T + msarc * L_mSARC.

    L_mSARC is the squared distance between the normalised activation maps of teacher and student, batch mean, summed over
    scales. Scales are paired from the last one backwards. The finer map is pooled to the size of the coarser one.

    Args:
        temperature: T.
        msarc: weight of L_mSARC.
        teacher, student: classifiers whose last linear layers are used. They do not become submodules.
    """

    def __init__(self, temperature: float, msarc: float, teacher: nn.Module, student: nn.Module):
        super().__init__()
        self.temperature, self.msarc, self.caches_logits = temperature, msarc, not msarc
        self.heads = (head_of(teacher), head_of(student))

    def forward(self, teacher_out, student_out, labels: Tensor) -> dict[str, Tensor]:
        """Named scalar losses of two outputs with logits (B, C) and feature_maps."""
        losses = {"kd": kd_loss(student_out.logits, teacher_out.logits, self.temperature)}
        losses["loss"] = losses["kd"]
        if self.msarc:
            classes = teacher_out.logits.argmax(1)
            losses["msarc"] = self.map_distance(teacher_out.feature_maps, student_out.feature_maps, classes)
            losses["loss"] = losses["loss"] + self.msarc * losses["msarc"]
        return losses

    def map_distance(self, teacher_maps: dict, student_maps: dict, classes: Tensor) -> Tensor:
        """L_mSARC, a scalar in [0, 4 * scales].

        Args:
            teacher_maps, student_maps: feature maps {(h, w): (B, C_l, h, w)}, fine to coarse.
            classes: classes (B,) of the class activation maps.
        """
        pairs = list(zip(reversed(teacher_maps.values()), reversed(student_maps.values())))
        total = torch.zeros((), device=classes.device)
        for scale, pair in enumerate(pairs):
            maps = [m.float() for m in pair]
            cam = scale == 0 and all(h is not None and h.weight.shape[1] == m.shape[1] for h, m in zip(self.heads, maps))
            if cam:
                weights = [head.weight.flatten(1)[classes].float() for head in self.heads]
                maps = [torch.einsum("bc,bchw->bhw", w, m) for w, m in zip(weights, maps)]
            else:
                maps = [m.square().mean(1) for m in maps]
            size = tuple(min(sides) for sides in zip(*(m.shape[1:] for m in maps)))
            t, s = (F.normalize(F.adaptive_avg_pool2d(m[:, None], size).flatten(1)) for m in maps)
            total = total + (t - s).square().sum(1).mean()
        return total


def head_of(classifier: nn.Module) -> nn.Module | None:
    """The last linear layer or 1x1 convolution with as many outputs as there are classes; None if there is none."""
    layers = [m for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    heads = [m for m in layers if m.weight.shape[0] == classifier.num_classes and m.weight[0, 0].numel() == 1]
    return heads[-1] if heads else None
