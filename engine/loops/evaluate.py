"""Accuracy on a labelled split."""

import torch
from torch import nn

from engine.runtime.errors import UserError
from engine.runtime.run import progress
from models.classifier import eval_mode


@torch.no_grad()
def evaluate(classifier: nn.Module, split, batch_size: int = 500) -> dict[str, float]:
    """acc1 and acc5 in %, of a classifier in eval mode (its mode is restored).

    Args:
        classifier: images (B, 3, H, W) in [0, 1] -> logits (B, C).
        split: ``engine.data.splits.Split``.
    """
    hits = 0
    bar = progress(len(split), "evaluate", "img", delay=3)
    with eval_mode(classifier), bar:
        for images, labels in split.batches(batch_size):
            top = classifier(images).topk(min(5, split.num_classes), dim=1).indices
            found = (top == labels[:, None]).float()
            hits = hits + torch.stack([found[:, 0].sum(), found.sum()])
            bar.update(len(images))
    acc1, acc5 = (100 * hits.double() / len(split)).tolist()
    return {"acc1": round(acc1, 3), "acc5": round(acc5, 3)}


@torch.no_grad()
def confusion(teacher: nn.Module, student: nn.Module, split, batch_size: int = 500) -> dict[str, list[list[int]]]:
    """How often which class is named: {"teacher_student": (C, C) counts, "label_student": (C, C) counts}.

    Row: what the teacher says, or the label; column: what the student says. Both networks in eval mode, which is restored.

    Args:
        split: ``engine.data.splits.Split``.
    """
    classes = split.num_classes
    counts = {name: 0 for name in ("teacher_student", "label_student")}
    with eval_mode(teacher), eval_mode(student):
        for images, labels in split.batches(batch_size):
            column = student(images).argmax(dim=1)
            for name, row in zip(counts, (teacher(images).argmax(dim=1), labels)):
                counts[name] = counts[name] + torch.bincount(row * classes + column, minlength=classes**2)
    return {name: count.view(classes, classes).tolist() for name, count in counts.items()}


def check_finite(values: dict[str, float], where: str, advice: str) -> None:
    """Stops a run whose losses are no longer numbers, before anything of it is written.

    Raises:
        UserError: names the first bad value.
    """
    for name, value in values.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise UserError(f"{name} became {value} in {where}; what was written before is whole: {advice}")
