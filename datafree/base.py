"""What a method is made of. A new method is one file with these pieces, one line in ``registry.py``, its scripts and a test.

Config        frozen dataclass of the method's flags (``engine.runtime.flags.flag``)
Synthesizer   makes images from the teacher (and the student), one round a call
Objective     nn.Module: (teacher_out, student_out, labels) -> {"loss": ..., every named term}; ``logits_only = True`` where the
              teacher's logits are all it looks at, so that they can be kept
Augmenter     optional: varies bank images (``datafree.diffusion.variation``)
Method        says which stages there are and builds the pieces

``docs/new_method.md`` makes one from beginning to end. Shared pieces are in ``losses``, ``generators`` and ``stream``.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.data.crops import Views
from engine.data.datasets import DatasetInfo, dataset_info
from engine.data.splits import Split, allow_train_split, load_split
from engine.data.transfer_set import TransferSet
from engine.loops.distill import Schedule
from engine.loops.makers import SynthesisMaker
from engine.loops.session import Session, Stage
from engine.loops.stages import Distill, FillBank
from engine.networks.build import build_classifier, load_teacher, own_weights, short_name
from engine.runtime.compilation import Hot
from engine.runtime.errors import UserError
from engine.runtime.flags import check_flags
from engine.runtime.precision import Precision, choose_amp, choose_device
from engine.runtime.processes import Processes, seed_position
from engine.runtime.run import earlier_value


@dataclass
class ImageBatch:
    """images (B, 3, H, W) float32 in [0, 1]; labels (B,) int64; scalars are named figures to log, () tensors.

    Where no label was asked for (images that stream past) labels are -1.
    """

    images: Tensor
    labels: Tensor
    scalars: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What a method may know of its surroundings; it never sees the command line and never picks a device.

    ``random_view`` maps images (B, 3, H, W) to randomly cropped and flipped ones, one draw an image, differentiably; in a run it
    is ``engine.data.crops.Views``.
    ``precision`` has ``autocast()``, the context in which networks run, and ``fresh()``, which makes one for an optimizer:
    ``fresh().minimize(loss, optimizer)``. Where that outlives a round, its ``state_dict()`` is part of the synthesizer's.
    ``kd_steps`` are the student's steps a round. ``training_split`` opens the real training images (``engine.data.splits.Split``) for a method that has ``reads_train_split``.
    ``average_gradients(parameters)`` comes between backward and step of what ``after_step`` trains: its images are a share of
    the student's batch where several processes train it.
    """

    info: DatasetInfo
    device: torch.device
    random_view: Callable[[Tensor], Tensor]
    precision: Precision
    kd_steps: int = 1
    training_split: Callable[[], Split] | None = None
    average_gradients: Callable[[Iterable[nn.Parameter]], None] = lambda parameters: None


class Synthesizer:
    """Makes the images of one round. It computes: no files, no loaders, no device choice.

    Attributes:
        images_total: of one that streams, how many different images there are; None: each is new.
        pictures: of one that streams, the set that its batches are drawn from in the task's random views; None: there is none.
        independent: a round of the initial bank depends on its number alone, not on the rounds before it.
        shared: what ``batches`` and ``after_step`` need of it. Where several processes train the student, the main one alone
            calls ``synthesize``, and the others get the weights of this module after it.
        rate: the student's learning rate in this round by ``--lr``, for one that anneals with it; stage distill sets it.
    """

    images_total: int | None = None
    pictures: TransferSet | None = None
    independent: bool = True
    shared: nn.Module | None = None
    rate: float = 1.0

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """One round of synthesis against the teacher and, where the method competes, the student.

        The student is in eval mode and its weights take no gradients; a gradient through it to the images is fine. Where the
        method streams, the images returned are only looked at.
        """
        raise NotImplementedError

    def batches(self, batch_size: int, *, seed: int, rank: int = 0, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Of a method that streams: endless images (B, 3, H, W) in [0, 1] and labels (B,) for the student's steps.

        B is the share of process ``rank`` of ``count`` of every ``batch_size`` images. Images that are not new at every step
        come in an order that ``seed``, the same in all processes, decides.
        """
        raise NotImplementedError

    def after_step(self, student: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Called after every student step with the images it saw. Default: nothing."""

    def hot(self) -> list[Hot]:
        """What a round spends its time on, which the stage compiles where that pays. Default: nothing."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Whatever the next round depends on; tensors and plain values only. Default: nothing.

        What the synthesizer of stage synthesize leaves here is where that of stage distill goes on.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes ``state_dict``."""


@contextmanager
def own_state() -> Iterator[None]:
    """Within it a state that another method left, or that has other sizes, is one line.

    Raises:
        UserError: the state does not fit.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            "the synthesizer's state beside the image bank was left by another --method or with other flags of size "
            f"({type(error).__name__}); give an --init_bank of this method and these flags, or none"
        ) from error


class LowestLoss:
    """The images of the step with the lowest loss so far, a copy, and its named losses. Nothing leaves the device."""

    def __init__(self):
        self.images: Tensor | None = None
        self.losses: dict[str, Tensor] = {}

    def update(self, images: Tensor, losses: dict[str, Tensor]) -> None:
        """images (B, ...) and their named scalar losses, "loss" among them."""
        losses = {name: value.detach() for name, value in losses.items()}
        if self.images is None:
            self.images, self.losses = images.detach().clone(), losses
            return
        better = (losses["loss"] < self.losses["loss"]) | self.losses["loss"].isnan()
        self.images = torch.where(better, images.detach(), self.images)
        self.losses = {name: torch.where(better, value, self.losses[name]) for name, value in losses.items()}

    def scalars(self) -> dict[str, Tensor]:
        """Figures to log."""
        return {("loss_synthesis" if name == "loss" else name): value for name, value in self.losses.items()}


class Method:
    """One row of ``registry.METHODS``: the stages of a run and the pieces that they use.

    Class attributes:
        Config: the frozen dataclass of flags.
        streams: the student learns from the newest images and none is kept.
        reads_train_split: only for the control that distils on real data.
        defaults: common flags whose default this method changes, as {"epochs": 200}.
        external_prior: what besides the teacher its synthesizer uses, as the results table names it; an instance may set it.

    A Config with the field ``bn`` needs a teacher with BatchNorm layers wherever that weight is not 0.
    """

    Config: ClassVar[type]
    streams: ClassVar[bool] = False
    reads_train_split: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {}
    external_prior: str = "none"

    def __init__(self, config: Any, teacher: nn.Module, student: nn.Module, task: Task):
        check_flags(config)
        self.config, self.teacher, self.student, self.task = config, teacher, student, task

    def check_inputs(self, stages: Collection[str]) -> None:
        """Opens what the flags name, before anything is made: a folder's first file, a model's configuration.

        Args:
            stages: names of those that are to begin; what one that goes on needs was there when it began.
        Raises:
            UserError: it is not there, or is something else.
        """

    def stages(self) -> tuple[Stage, ...]:
        """The stages of a run, in order. Default: all happens while distilling."""
        return (Distill(self, external_prior=self.external_prior),)

    def from_initial_bank(self, rounds: int) -> tuple[Stage, ...]:
        """Stages of a method whose distillation starts from a bank of ``rounds`` rounds of ``initial_synthesizer``."""

        def maker(session: Session) -> SynthesisMaker:
            return SynthesisMaker(self.initial_synthesizer(), self.student, session.seed)

        prior = self.external_prior
        return FillBank("synthesize", rounds, maker, prior), Distill(self, "synthesize", external_prior=prior)

    @property
    def images_per_round(self) -> int:
        """Images that a round of stage distill adds to the bank; 0: there is nothing to synthesize then."""
        return self.config.synthesis_batch_size

    @property
    def student_view(self) -> Callable[[Tensor], Tensor]:
        """What the student sees of images (B, 3, H, W) uint8 of the bank: the task's random crop and flip.

        Only if these are ``Views``, a finite set, can the teacher's answers be kept and ``--views`` make them fewer.
        """
        return self.task.random_view

    def initial_synthesizer(self) -> Synthesizer:
        """For stage synthesize: makes the image bank that distillation starts from; its student knows nothing yet."""
        return self.synthesizer()

    def answering_teacher(self) -> nn.Module:
        """Whose outputs the student learns in stage distill: the teacher, unless a method has it answer otherwise."""
        return self.teacher

    def synthesizer(self) -> Synthesizer:
        """For the rounds of stage distill."""
        raise NotImplementedError

    def objective(self) -> nn.Module:
        """The student's loss. Its own parameters are trained with the student's."""
        raise NotImplementedError


def balanced_labels(count: int, num_classes: int, device: torch.device) -> Tensor:
    """(count,) class ids in random order, each class as often as the others up to one."""
    order = torch.randperm(num_classes, device=device)
    labels = order.repeat(-(-count // num_classes))[:count]
    return labels[torch.randperm(count, device=device)]


# From flags to a method with its networks.


def run_folder(name: str, groups: list, dataset: str) -> Path:
    """Where a run of a method on a dataset of that name is kept."""
    task_flags, run_flags = groups[:2]
    pair = f"{dataset}_{short_name(task_flags.teacher)}_{short_name(task_flags.student)}"
    return Path(run_flags.save_dir or Path("checkpoints", name, f"{pair}_seed{run_flags.seed}"))


def build_method(
    name: str,
    method_class: type[Method],
    groups: list,
    schedule: Schedule,
    processes: Processes,
    datasets: dict,
    models: dict,
) -> Method:
    """The method with its networks.

    Args:
        groups: the flags: ``TaskFlags``, ``RunFlags``, ``DistillFlags`` and the method's Config.
        datasets, models: the tables of ``registry.py``.
    Raises:
        UserError: the dataset, the teacher or a flag of the method is not as it should be.
    """
    flags, run_flags, _, config = groups
    device = choose_device(run_flags.gpu)
    if flags.no_test and method_class.reads_train_split:
        raise UserError(f"--no_test opens no real image, and {name} learns from them; leave it out")
    named = flags.dataset, flags.data_root, flags.image_size, flags.domain, flags.classes, flags.name, flags.num_classes
    info = dataset_info(datasets, *named, unseen=flags.no_test)
    earlier = earlier_value(run_folder(name, groups, info.name), "amp")
    precision = Precision(processes.broadcast(choose_amp(run_flags.amp, device, earlier)), device)
    if own := own_weights(flags.teacher, info.name, flags.teacher_ckpt):
        info = info.as_known_to(flags.teacher, own, keep_size=flags.image_size is not None)
    teacher = load_teacher(models, flags.teacher, info, device, flags.teacher_ckpt, flags.teacher_mean, flags.teacher_std)
    if not info.reader:  # what is known of the dataset's pixels is how the teacher normalizes them
        info = replace(info, mean=teacher.normalization.mean, std=teacher.normalization.std)
    seed_position(run_flags.seed, "student")
    student = build_classifier(models, flags.student, info, device)

    def training_split():
        if processes.main:
            print(f"{name} opens the training images of {info.name}: a control, not a data-free method")
        with allow_train_split():
            return load_split(info, "train", device)

    task = Task(
        info=info,
        device=device,
        random_view=Views(info.crop_padding, info.flip),
        precision=precision,
        kd_steps=schedule.kd_steps,
        training_split=training_split if method_class.reads_train_split else None,
        average_gradients=processes.average_gradients,
    )
    return method_class(config, teacher, student, task)
