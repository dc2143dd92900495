"""Stage distill: rounds of [synthesis; kd_steps student steps]. The code is the same for all methods.

A round may be as short as one generator step and five student steps. All other work that takes time (reading a loss from the
device, a line of metrics, a checkpoint, the test accuracy) is therefore done once per epoch.

Deviation from the published scripts: the learning rate is updated at every student step and ends at ``lr_min``. The
published scripts update it once per epoch and never reach the end of the cosine. The exact end matters in short runs.

With several processes, the main process synthesizes the images of each round and writes the run folder. All processes hold
the same images, take equal shares of each student batch, and average the gradients.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from engine.data.crops import KeyedViews
from engine.data.pictures import grid
from engine.loops.logit_cache import STEPS, LogitCache
from engine.loops.measures import check_finite
from engine.loops.muon import Muon
from engine.loops.pace import StepPace
from engine.runtime.errors import UserError, first_line
from engine.runtime.flags import Range
from engine.runtime.precision import DOES_NOT_FIT, OPTIMIZER, Precision, begin_momentum, load_optimizer
from engine.runtime.processes import Processes, position_seed, seed_position
from engine.runtime.run import Run, Stopwatch, progress
from engine.runtime.schema import SECONDS, require
from engine.runtime.stage_record import StageRecord
from engine.runtime.tensors import load_checkpoint, save_checkpoint
from models.classifier import Output, weights_fixed

CHECKPOINT = {
    "student": {str: torch.Tensor}, "objective": {str: torch.Tensor}, "optimizer": OPTIMIZER, "synthesizer": dict,
    "precision": dict, "accuracies": [float], "synthesis_seconds": SECONDS,
}  # fmt: skip
UP = 0.2  # fraction of a one-cycle run in which the learning rate rises
ADVICE = "lower --lr, --lr_g or the loss weights, or give --amp no, and run again"


@dataclass(frozen=True)
class Schedule:
    """Lengths, optimizer and learning rate of stage distill; each field is the flag of the same name."""

    epochs: int
    ep_steps: int
    kd_steps: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    warmup_epochs: int
    lr_min: float = 0.0
    lr_schedule: str = "cosine"
    optimizer: str = "sgd"

    @property
    def rounds_per_epoch(self) -> int:
        return max(1, self.ep_steps // self.kd_steps)

    @property
    def rounds(self) -> int:
        return self.epochs * self.rounds_per_epoch

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate at a student step, counted from the beginning of the run.

        "cosine": linear warm-up over ``warmup_epochs``, then cosine decay to ``lr_min``.
        "one_cycle": linear rise over the first fifth of the run, then linear decay to ``lr_min``.
        """
        total = self.rounds * self.kd_steps
        one_cycle = self.lr_schedule == "one_cycle"
        warmup = round(total * UP) if one_cycle else self.warmup_epochs * self.rounds_per_epoch * self.kd_steps
        if step < warmup:
            return self.lr * (step + 1) / warmup
        passed = (step - warmup) / max(1, total - warmup)
        left = 1 - passed if one_cycle else 0.5 * (1 + math.cos(math.pi * passed))
        return self.lr_min + (self.lr - self.lr_min) * left


class StudentStep(nn.Module):
    """All trained parameters in one module: maps images (B, 3, H, W), labels (B,) and teacher outputs to named losses."""

    def __init__(self, student: nn.Module, objective: nn.Module):
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, images: Tensor, labels: Tensor, teacher_out) -> dict[str, Tensor]:
        return self.objective(teacher_out, self.student(images, return_features=True), labels)


class Distillation:
    """State of stage distill that its rounds change, with its checkpoint.

    Args:
        teacher, student: ``models.classifier.Classifier``; the teacher is frozen.
        objective: (teacher_out, student_out, labels) -> named losses; its own parameters are trained too.
        synthesizer: ``datafree.base.Synthesizer``.
        schedule: lengths, optimizer and learning rate.
        precision: mixed precision of the student's training.
        images_per_round: number of images that a round adds to the bank; 0 in a run with a bank: there is no synthesis.
        processes: processes that train the student together.
        compile: (function, calls, name) -> function to call instead; see ``engine.runtime.compilation.Compiler``.
    """

    def __init__(
        self,
        teacher,
        student: nn.Module,
        objective: nn.Module,
        synthesizer,
        schedule: Schedule,
        precision: Precision,
        images_per_round: int = 0,
        processes: Processes = Processes(),
        compile: Callable[..., Callable] = lambda function, calls, name, **_: function,
    ):
        self.student, self.objective, self.synthesizer = student, objective, synthesizer
        self.schedule, self.precision, self.images_per_round = schedule, precision, images_per_round
        self.processes = processes
        steps, step = schedule.rounds * schedule.kd_steps, StudentStep(student, objective)
        self.teacher = compile(teacher, steps, "teacher", constant_weights=True)
        step.forward = compile(step.forward, steps, "student step")
        self.step = processes.parallel(step)
        self.parameters = [*student.parameters(), *objective.parameters()]
        rates = {"lr": schedule.lr, "momentum": schedule.momentum, "weight_decay": schedule.weight_decay}
        muon = schedule.optimizer == "muon"
        self.optimizer = Muon(self.parameters, **rates) if muon else torch.optim.SGD(self.parameters, **rates, fused=True)
        begin_momentum(self.optimizer)
        self.views: KeyedViews | None = None  # numbered views on which the student is trained
        self.logit_cache: LogitCache | None = None  # teacher logits of these views
        self.scores: list[float] = []  # accuracy or agreement after each epoch
        self.synthesis_clock = Stopwatch(precision.device)
        self.pace: StepPace | None = None

    def synthesize(self, round: int):
        """Runs one round of synthesis in the main process and adds its duration to the synthesis time.

        Returns:
            The synthesizer's ``ImageBatch``; None in the other processes.
        """
        if not self.processes.main:
            return None
        self.synthesizer.lr_factor = self.schedule.learning_rate(round * self.schedule.kd_steps) / self.schedule.lr
        with self.synthesis_clock, weights_fixed(self.student):
            return self.synthesizer.synthesize(self.student)

    @torch.no_grad()
    def teacher_outputs(self, images: Tensor) -> Output:
        """Returns the teacher's outputs for images (B, 3, H, W)."""
        with self.precision.autocast():
            return self.teacher(images, return_features=True)

    def student_steps(self, batches: Iterator[tuple[Tensor, ...]], round: int, bar) -> dict[str, Tensor]:
        """Runs the ``kd_steps`` student steps of a round; returns the mean of every named loss, on the device.

        Args:
            batches: images (B, 3, H, W), labels (B,) and, if there are numbered views, their keys (B,).
            round: number of the round.
            bar: progress bar.
        """
        first = round * self.schedule.kd_steps
        sums: dict[str, Tensor] = {}
        self.step.train()
        for step, (images, labels, *keys) in enumerate(islice(batches, self.schedule.kd_steps), first):
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.learning_rate(step)
            teacher_out = Output(self.logit_cache(*keys)) if self.logit_cache else self.teacher_outputs(images)
            with self.precision.autocast():
                losses = self.step(images, labels, teacher_out)
            self.precision.minimize(losses["loss"], self.optimizer)
            self.synthesizer.after_step(self.student, images, labels)
            sums = add(sums, {name: value.detach() for name, value in losses.items()})
            bar.update()
            if self.pace:
                self.pace.step()
        return {name: total / self.schedule.kd_steps for name, total in sums.items()}

    def state_dict(self, round: int) -> dict:
        return {
            "round": round,
            "student": self.student.network.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "synthesizer": self.synthesizer.state_dict(),
            "precision": self.precision.state_dict(),
            "accuracies": self.scores,
            "synthesis_seconds": self.synthesis_clock.read(),
        }

    def load_state_dict(self, state: dict) -> int:
        """Loads a checkpoint; returns the number of the next round."""
        self.student.network.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.synthesizer.load_state_dict(state["synthesizer"])
        self.precision.load_state_dict(state["precision"])
        self.scores = state["accuracies"]
        self.synthesis_clock.seconds = state["synthesis_seconds"]
        return state["round"]


def distill(
    run: Run | None, record: StageRecord | None, distillation: Distillation, bank, transfer, augment_batch, measure, *,
    seed: int,
) -> dict[str, float]:  # fmt: skip
    """Runs all remaining epochs, with one measurement and one checkpoint after each epoch.

    Args:
        run, record: run folder writer and stage record of the main process; None in the other processes.
        bank: bank that stores the images of each round; None for a streaming method.
        transfer: ``TransferSet`` with the images from before the first round; None if ``bank`` is None.
        augment_batch: random crop and flip of the student's batches; not used with ``distillation.views``.
        measure: ``engine.loops.measures.Accuracy`` or ``Agreement`` in the main process, used only for reports; None in the
            other processes.
        seed: seed of the run.
    Returns:
        acc1_last, acc1_best and acc1_mean (over epochs) in %, or the same figures of the agreement; student_steps;
        synthesis_seconds (in this stage). Empty in all processes but the main one.
    """
    schedule, processes = distillation.schedule, distillation.processes
    state = None
    if processes.main:
        record.begin("distill")
        file = run.path / "distill.pth"
        state = load_checkpoint(file, "run checkpoint") if file.exists() else None
        advice = "if it is of an earlier version, use --redo distill"
        if state is not None:
            require(state, CHECKPOINT | {"round": (int, Range(least=0, most=schedule.rounds))}, str(file), advice)
            if state["round"] != len(state["accuracies"]) * schedule.rounds_per_epoch:
                raise UserError(
                    f"{file} has {len(state['accuracies'])} accuracies after {state['round']} rounds, one per epoch "
                    f"wanted; {advice}"
                )
        run.rewind("distill", state["round"] if state else 0)
    state = processes.broadcast(state)
    try:
        start = distillation.load_state_dict(state) if state else 0
    except DOES_NOT_FIT as error:
        raise UserError(f"distill.pth does not fit this run: {first_line(error)}; use --redo distill") from None
    if bank is not None:
        if distillation.images_per_round:
            made = bank.read("distill", start)
            transfer.add(made["images"], made["labels"])
        if len(transfer) != (images := processes.broadcast(len(transfer))):
            raise UserError(
                f"process {processes.rank} sees {len(transfer)} images in {bank.path}, the main process sees {images}; wait "
                "until all machines see the same files, then run the same command again"
            )
    if start and processes.main:
        run.log(f"distill: resumed after round {start} of {schedule.rounds}")
    bar = progress(schedule.rounds * schedule.kd_steps, "distill", "step", start * schedule.kd_steps)
    distillation.pace = StepPace(run.log, distillation, start) if run else None
    for epoch in range(start // schedule.rounds_per_epoch, schedule.epochs):
        figures = distill_epoch(distillation, epoch, bank, transfer, augment_batch, seed, bar, run)
        if not processes.main:
            continue
        rounds = (epoch + 1) * schedule.rounds_per_epoch
        measured = measure(distillation.student, distillation.synthesizer, transfer, rounds)
        score = measured[measure.name]
        distillation.scores.append(score)
        figures |= {**measured, "student_steps": rounds * schedule.kd_steps}
        bar.set_postfix({measure.name: f"{score:.2f}", "best": f"{max(distillation.scores):.2f}"}, refresh=False)
        run.metrics("distill", rounds - 1, figures)  # before the checkpoint: ``rewind`` removes the line of a repeated epoch
        save_checkpoint(file, distillation.state_dict(rounds))
        record.update("distill", rounds=rounds)
    bar.close()
    if not processes.main:
        return {}
    figures = summary(measure.name, distillation.scores, schedule)
    return figures | {"synthesis_seconds": round(distillation.synthesis_clock.read(), 3)}


def distill_epoch(
    distillation: Distillation, epoch: int, bank, transfer, augment_batch, seed: int, bar, run: Run | None
) -> dict[str, float]:
    """Runs the rounds of one epoch; returns the means of all named losses, those of the student also over the processes."""
    schedule, processes, synthesizer = distillation.schedule, distillation.processes, distillation.synthesizer
    makes_images = bank is None or distillation.images_per_round > 0
    made: dict[str, Tensor] = {}
    learned: dict[str, Tensor] = {}
    for round in range(epoch * schedule.rounds_per_epoch, (epoch + 1) * schedule.rounds_per_epoch):
        seed_position(seed, "distill", round, *processes.stream)
        share = {"seed": position_seed(seed, "order", round), "rank": processes.rank, "count": processes.count}
        source = synthesizer.image_set if bank is None else transfer
        if makes_images:
            batch = distillation.synthesize(round)
            made = add(made, batch.scalars if batch else {})
            if bank is not None:
                keep(distillation, bank, transfer, batch, round)
            processes.broadcast_weights(synthesizer.shared)
        if distillation.views:
            plan = {
                "steps": schedule.kd_steps,
                "prepare": distillation.logit_cache and distillation.logit_cache.prepare,
                "ahead": STEPS,
            }
            batches = source.keyed_batches(schedule.batch_size, distillation.views, **plan, **share)
        elif bank is None:
            batches = synthesizer.batches(schedule.batch_size, **share)
        else:
            batches = transfer.batches(schedule.batch_size, augment_batch, **share)
        learned = add(learned, distillation.student_steps(batches, round, bar))
    sums = made | processes.mean(learned)
    figures = {name: float(total) / schedule.rounds_per_epoch for name, total in sums.items()}
    check_finite(figures, f"epoch {epoch + 1} of stage distill", ADVICE)
    if processes.main and makes_images and (epoch % 10 == 0 or epoch + 1 == schedule.epochs):
        run.picture("images", grid(batch.images[:64], labels=batch.labels[:64], names=run.class_names), epoch)
    return figures


def add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns ``sums`` with ``values`` added by name."""
    return sums | {name: sums.get(name, 0) + value for name, value in values.items()}


def keep(distillation: Distillation, bank, transfer, batch, round: int) -> None:
    """Stores a round's new images in the main process's bank and in the transfer set of every process."""
    processes, device = distillation.processes, distillation.precision.device
    images = labels = None
    if batch is not None:
        values = {name: float(value) for name, value in batch.scalars.items()}
        check_finite(values, f"round {round} of stage distill (synthesis)", ADVICE)
        images, labels = bank.append("distill", round, batch.images, batch.labels)
    if processes.count > 1 and processes.broadcast(transfer.mapped):  # each process reads the shard
        columns = bank.open_shards([bank.shard("distill", round)])
        images, labels = columns["images"], columns["labels"]
    elif processes.count > 1:
        images = processes.broadcast_tensor(images[:] if processes.main else None, device)
        labels = processes.broadcast_tensor(labels, device)
    transfer.add(images, labels)


def summary(name: str, scores: list[float], schedule: Schedule) -> dict[str, float]:
    """Returns the figures of a finished run. The best epoch is chosen by the reported score itself, as papers do."""
    return {
        f"{name}_last": scores[-1],
        f"{name}_best": max(scores),
        f"{name}_mean": round(sum(scores) / len(scores), 3),
        "student_steps": schedule.rounds * schedule.kd_steps,
    }
