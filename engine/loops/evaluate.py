"""Accuracy on a labelled split."""

import torch
from torch import Tensor, nn

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
def predict(classifier: nn.Module, split, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """The logits (N, C) float32 of a classifier in eval mode, and the labels (N,), both on the CPU, in the split's order.

    Args:
        classifier, split: as of ``evaluate``.
    """
    logits, bar = [], progress(len(split), "predict", "img", delay=3)
    with eval_mode(classifier), bar:
        for images, _ in split.batches(batch_size):
            logits.append(classifier(images).float().cpu())
            bar.update(len(images))
    return torch.cat(logits), split.labels.cpu()


def check_finite(values: dict[str, float], where: str, advice: str) -> None:
    """Stops a run whose losses are no longer numbers, before anything of it is written.

    Raises:
        UserError: names the first bad value.
    """
    for name, value in values.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise UserError(f"{name} became {value} in {where}; what was written before is whole: {advice}")
