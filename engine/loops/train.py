"""Supervised training of a classifier on real data."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from engine.data.crops import crop_flip
from engine.loops.measures import check_finite, evaluate
from engine.runtime.compilation import Compiler
from engine.runtime.errors import UserError, first_line
from engine.runtime.flags import Range, flag
from engine.runtime.precision import DOES_NOT_FIT, OPTIMIZER, Precision, begin_momentum, load_optimizer
from engine.runtime.processes import seed_position
from engine.runtime.run import Run, progress
from engine.runtime.schema import require
from engine.runtime.stage_record import StageRecord
from engine.runtime.tensors import load_checkpoint, save_checkpoint

TRAIN = ("train",)
CHECKPOINT = {"network": {str: torch.Tensor}, "optimizer": OPTIMIZER, "precision": dict, "accuracies": [float]}


@dataclass(frozen=True)
class TrainFlags:
    """Training: lengths, optimizer and learning rate."""

    epochs: int = flag(200, "number of passes over the training split", affects=TRAIN, least=1)
    batch_size: int = flag(128, "images per training step", affects=TRAIN, short="-b", least=1, most=1_000_000)
    lr: float = flag(0.1, "peak learning rate of SGD", affects=TRAIN, above=0)
    lr_decay_milestones: tuple[int, ...] | None = flag(
        None,
        "epochs after which the learning rate is divided by ten, comma-separated; unset: cosine decay to zero",
        affects=TRAIN,
        least=0,
    )
    warmup_epochs: int = flag(
        5, "epochs of linear warm-up of the learning rate, limited to a tenth of --epochs", affects=TRAIN, least=0
    )
    momentum: float = flag(0.9, "Nesterov momentum of SGD", affects=TRAIN, least=0, below=1)
    weight_decay: float = flag(5e-4, "weight decay of SGD", affects=TRAIN, short="--wd", least=0)
    label_smoothing: float = flag(0.0, "label smoothing of the cross-entropy loss", affects=TRAIN, least=0, most=1)


def learning_rate(flags: TrainFlags, epoch: float) -> float:
    """Returns the learning rate after ``epoch`` epochs, which may be a fraction. It depends on this position alone."""
    warmup = min(flags.warmup_epochs, flags.epochs / 10)
    if epoch < warmup:
        return flags.lr * (epoch + 0.1) / (warmup + 0.1)
    if flags.lr_decay_milestones:
        return flags.lr * 0.1 ** sum(epoch >= milestone for milestone in flags.lr_decay_milestones)
    return flags.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (flags.epochs - warmup)))


def train(
    run: Run,
    stages: StageRecord,
    classifier: nn.Module,
    train_split,
    test_split,
    flags: TrainFlags,
    info,
    precision: Precision,
    compiler: Compiler,
    seed: int,
) -> list[float]:
    """Trains ``classifier`` and returns the test accuracy after every epoch in %.

    A checkpoint ``last.pth`` is written after every epoch. A resumed run continues from it.

    Args:
        train_split, test_split: ``engine.data.splits.Split``.
        info: ``engine.data.datasets.DatasetInfo``.
        seed: seed of the run.
    """
    stages.begin("train")
    optimizer = torch.optim.SGD(
        classifier.parameters(),
        lr=flags.lr,
        momentum=flags.momentum,
        weight_decay=flags.weight_decay,
        nesterov=flags.momentum > 0,
        fused=True,
    )
    begin_momentum(optimizer)
    file, start, accuracies = run.path / "last.pth", 0, []
    if file.exists():
        state = load_checkpoint(file, "run checkpoint")
        require(state, CHECKPOINT | {"epoch": (int, Range(least=0, most=flags.epochs))}, str(file), "use --redo")
        start, accuracies = state["epoch"], state["accuracies"]
        try:
            classifier.network.load_state_dict(state["network"])
            load_optimizer(optimizer, state["optimizer"])
            precision.load_state_dict(state["precision"])
        except DOES_NOT_FIT as error:
            raise UserError(f"{file} does not fit this run: {first_line(error)}; use --redo") from None
        if start != len(accuracies):
            raise UserError(
                f"{file} has {len(accuracies)} accuracies after {start} epochs, one per epoch wanted; use --redo"
            )
        run.log(f"resumed after epoch {start} of {flags.epochs}")
    run.rewind("train", start)
    steps = max(1, len(train_split) // flags.batch_size)
    trained = compiler(classifier, flags.epochs * steps, "network")
    bar = progress(flags.epochs * steps, f"train {classifier.name}", "step", start * steps)
    for epoch in range(start, flags.epochs):
        seed_position(seed, "train", epoch)
        order = torch.randperm(len(train_split))[: steps * flags.batch_size]
        classifier.train()
        total = torch.zeros((), device=precision.device)
        for step, (images, labels) in enumerate(train_split.batches(flags.batch_size, order)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(flags, epoch + step / steps)
            with precision.autocast():
                logits = trained(crop_flip(images, info.crop_padding, info.flip))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=flags.label_smoothing)
            precision.minimize(loss, optimizer)
            total += loss.detach()
            bar.update()
        figures = {"loss": round(float(total) / steps, 5)}
        check_finite(figures, f"epoch {epoch + 1}", "lower --lr and run again")
        figures |= evaluate(classifier, test_split)
        accuracies.append(figures["acc1"])
        bar.set_postfix({"acc1": f"{figures['acc1']:.2f}", "loss": f"{figures['loss']:.3f}"}, refresh=False)
        run.metrics("train", epoch, figures)
        save_checkpoint(
            file,
            {
                "epoch": epoch + 1,
                "network": classifier.network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "precision": precision.state_dict(),
                "accuracies": accuracies,
            },
        )
        stages.update("train")
    bar.close()
    return accuracies
