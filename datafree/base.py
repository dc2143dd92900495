"""Base classes of the distillation methods.

A new method is one file with these parts, one line in ``registry.py``, its scripts and a test:

Config        frozen dataclass of the method's flags (``engine.runtime.flags.flag``)
Synthesizer   makes images with the teacher (and the student), one round per call
Objective     nn.Module: (teacher_out, student_out, labels) -> {"loss": ..., every named term}; ``caches_logits = True`` if all
              that it needs of the teacher is each image's own logits, so that they can be cached
Augmenter     optional: makes variants of bank images (``datafree.diffusion.variation``)
Method        defines the stages of a run and builds the other parts

``docs/new_method.md`` builds a method from beginning to end. Shared parts are in ``losses``, ``generators`` and ``stream``.
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
from engine.runtime.compilation import CompileTarget
from engine.runtime.errors import UserError
from engine.runtime.flags import check_flags
from engine.runtime.precision import Precision, choose_amp, choose_device
from engine.runtime.processes import Processes, seed_position
from engine.runtime.run import earlier_value


@dataclass
class ImageBatch:
    """A batch of synthetic images.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1].
        labels: (B,) int64; -1 for images that were made for no class.
        scalars: named figures to log, scalar tensors.
    """

    images: Tensor
    labels: Tensor
    scalars: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """The dataset, device and settings that a method needs. A method never sees the command line and never picks a device.

    Attributes:
        info: name, classes and image size of the dataset.
        device: device of the networks.
        random_view: differentiable random crop and flip of images (B, 3, H, W), drawn for each image; in a run it is
            ``engine.data.crops.Views``.
        precision: mixed precision. Networks run inside ``precision.autocast()``. ``precision.fresh()`` makes an object for
            one optimizer: ``fresh().minimize(loss, optimizer)``. If that object is used for more than one round, its
            ``state_dict()`` is part of the synthesizer's.
        kd_steps: student steps per round.
        training_split: function that opens the real training images (``engine.data.splits.Split``); None unless the method
            has ``reads_train_split``.
        average_gradients: function to call with the parameters that ``after_step`` trains, between backward and step. If
            several processes train the student, ``after_step`` sees only this process's share of the batch.
    """

    info: DatasetInfo
    device: torch.device
    random_view: Callable[[Tensor], Tensor]
    precision: Precision
    kd_steps: int = 1
    training_split: Callable[[], Split] | None = None
    average_gradients: Callable[[Iterable[nn.Parameter]], None] = lambda parameters: None


class Synthesizer:
    """Makes the images of one round. It only computes: it opens no files, builds no loaders and chooses no device.

    Attributes:
        images_total: streaming methods: number of different images; None if every image is new.
        image_set: streaming methods: fixed set of images from which batches are drawn, in the task's random views; None if
            there is no such set.
        independent: whether a round of the initial bank depends on its number alone, not on earlier rounds.
        shared: module that ``batches`` and ``after_step`` use. If several processes train the student, only the main process
            calls ``synthesize``. The other processes then receive this module's weights.
        lr_factor: the student's learning rate in this round divided by ``--lr``. Stage distill sets it; a synthesizer may scale
            its own learning rate by it.
    """

    images_total: int | None = None
    image_set: TransferSet | None = None
    independent: bool = True
    shared: nn.Module | None = None
    lr_factor: float = 1.0

    def synthesize(self, student: nn.Module) -> ImageBatch:
        """Makes the images of one round, with the teacher and, in adversarial methods, the student.

        The student is in eval mode and its weights receive no gradients. Gradients may flow through the student to the
        images. In streaming methods the returned images are only shown in the log; the student is trained on those of
        ``batches``.
        """
        raise NotImplementedError

    def batches(self, batch_size: int, *, seed: int, rank: int = 0, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Streaming methods: yields images (B, 3, H, W) in [0, 1] and labels (B,) for the student's steps, without end.

        Args:
            batch_size: images per student step, over all processes; B is the share of this process.
            seed: seed of the order of images that are not new at every step; the same in all processes.
            rank: number of this process.
            count: number of processes.
        """
        raise NotImplementedError

    def after_step(self, student: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Called after every student step with the images of that step. Does nothing by default."""

    def compile_targets(self) -> list[CompileTarget]:
        """Functions that take most of a round's time; the stage compiles them if that saves time. None by default."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """State that the next round depends on, as tensors and plain values. Empty by default.

        The synthesizer of stage distill starts from the last state of the synthesizer of stage synthesize.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""


@contextmanager
def state_errors() -> Iterator[None]:
    """Context that turns an error from loading a state of another method, or of other sizes, into a one-line UserError.

    Raises:
        UserError: the state does not fit.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            "the synthesizer's state in the image bank does not fit: it was saved by another --method or for networks of "
            f"other sizes ({type(error).__name__}); give an --init_bank that this method made with these flags, or leave "
            "it out"
        ) from error


class LowestLoss:
    """Copy of the images at the step with the lowest loss so far, with their named losses. All of it stays on the device."""

    def __init__(self):
        self.images: Tensor | None = None
        self.losses: dict[str, Tensor] = {}
        self.last: Tensor | None = None  # total loss of the last step

    def update(self, images: Tensor, losses: dict[str, Tensor]) -> None:
        """Takes the images (B, ...) of a step if their ``losses["loss"]`` is the lowest so far.

        Args:
            images: (B, ...).
            losses: named scalar losses, "loss" among them.
        """
        losses = {name: value.detach() for name, value in losses.items()}
        self.last = losses["loss"]
        if self.images is None:
            self.images, self.losses = images.detach().clone(), losses
            return
        better = (losses["loss"] < self.losses["loss"]) | self.losses["loss"].isnan()
        self.images = torch.where(better, images.detach(), self.images)
        self.losses = {name: torch.where(better, value, self.losses[name]) for name, value in losses.items()}

    def scalars(self) -> dict[str, Tensor]:
        """Losses to log; "loss" is renamed to "loss_synthesis". It is NaN if the last step's loss is NaN or infinite.

        Otherwise a synthesis that diverges after its first step would pass as one, with the images of that step.
        """
        losses = self.losses | {"loss": self.losses["loss"] + 0 * self.last}
        return {("loss_synthesis" if name == "loss" else name): value for name, value in losses.items()}


class Method:
    """One row of ``registry.METHODS``: the stages of a run and the parts that they use.

    Class attributes:
        Config: frozen dataclass of the method's flags.
        streams: whether the student's batches come from ``Synthesizer.batches``; no image bank is kept then.
        reads_train_split: whether the method opens the real training images; only the control that distils on real data
            does.
        defaults: common flags whose default this method changes, for example {"epochs": 200}.
        external_prior: data or pretrained model that the synthesizer uses besides the teacher, as named in the results
            table; an instance may set it.

    If a Config has the field ``bn`` and its value is not 0, the teacher needs BatchNorm layers.
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
        """Checks before the first stage that the files and models named by the flags can be opened. Does nothing by default.

        A check should be quick: it may open a folder's first file or a model's configuration.

        Args:
            stages: names of the stages that are about to begin. Stages that are resumed were checked when they began.
        Raises:
            UserError: a file or model is missing or of the wrong kind.
        """

    def input_digests(self) -> dict[str, str]:
        """{flag: digest of the files that it names}, for flags of this method. A changed digest is an error on resuming.

        Raises:
            UserError: a file cannot be read.
        """
        return {}

    def stages(self) -> tuple[Stage, ...]:
        """The stages of a run, in order; by default only stage distill."""
        return (Distill(self, external_prior=self.external_prior),)

    def from_initial_bank(self, rounds: int) -> tuple[Stage, ...]:
        """Stages synthesize and distill; synthesize fills the bank with ``rounds`` rounds of ``initial_synthesizer``."""

        def maker(session: Session) -> SynthesisMaker:
            return SynthesisMaker(self.initial_synthesizer(), self.student, session.seed)

        prior = self.external_prior
        return FillBank("synthesize", rounds, maker, prior), Distill(self, "synthesize", external_prior=prior)

    @property
    def images_per_round(self) -> int:
        """Images that a round of stage distill adds to the bank; 0 if that stage synthesizes nothing."""
        return self.config.synthesis_batch_size

    @property
    def student_view(self) -> Callable[[Tensor], Tensor]:
        """Augmentation of bank images (B, 3, H, W) uint8 for the student; by default the task's random crop and flip.

        The teacher's outputs can be cached, and ``--views`` can be used, only if this is a ``Views``, a finite set of views.
        """
        return self.task.random_view

    def initial_synthesizer(self) -> Synthesizer:
        """Synthesizer of stage synthesize, which makes the initial image bank; the student it is given is untrained."""
        return self.synthesizer()

    def distillation_teacher(self) -> nn.Module:
        """Network whose outputs the student learns in stage distill; by default the teacher."""
        return self.teacher

    def synthesizer(self) -> Synthesizer:
        """Synthesizer of the rounds of stage distill."""
        raise NotImplementedError

    def objective(self) -> nn.Module:
        """The student's loss. Parameters of this module are trained together with the student's."""
        raise NotImplementedError


def balanced_labels(count: int, num_classes: int, device: torch.device) -> Tensor:
    """Class ids (count,) in random order; the classes' numbers of images differ by at most one."""
    order = torch.randperm(num_classes, device=device)
    labels = order.repeat(-(-count // num_classes))[:count]
    return labels[torch.randperm(count, device=device)]


# From flags to a method with its networks.


def run_folder(name: str, groups: list, dataset: str) -> Path:
    """Folder of a run of a method on the dataset of this name."""
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
    """Builds a method with its teacher, student and task.

    Args:
        name: name of the method in ``registry.METHODS``.
        method_class: class of the method.
        groups: the flags: ``TaskFlags``, ``RunFlags``, ``DistillFlags`` and the method's Config.
        schedule: lengths of stage distill.
        processes: the processes that train the student together.
        datasets, models: the tables of ``registry.py``.
    Raises:
        UserError: the dataset, the teacher or a flag of the method is missing or invalid.
    """
    flags, run_flags, _, config = groups
    device = choose_device(run_flags.gpu)
    if flags.no_test and method_class.reads_train_split:
        raise UserError(f"--no_test opens no real image, but {name} trains on real images; leave it out")
    named = flags.dataset, flags.data_root, flags.image_size, flags.domain, flags.classes, flags.name, flags.num_classes
    info = dataset_info(datasets, *named, unseen=flags.no_test)
    earlier = earlier_value(run_folder(name, groups, info.name), "amp")
    precision = Precision(processes.broadcast(choose_amp(run_flags.amp, device, earlier)), device)
    if own := own_weights(flags.teacher, info.name, flags.teacher_ckpt):
        info = info.adapted_to_model(flags.teacher, own, keep_size=flags.image_size is not None)
    teacher = load_teacher(models, flags.teacher, info, device, flags.teacher_ckpt, flags.teacher_mean, flags.teacher_std)
    if not info.reader:  # the dataset is not here: the teacher's normalization is all that is known of its pixels
        info = replace(info, mean=teacher.normalization.mean, std=teacher.normalization.std)
    seed_position(run_flags.seed, "student")
    student = build_classifier(models, flags.student, info, device)

    def training_split():
        if processes.main:
            print(f"{name} opens the training images of {info.name}: it is a control, not a data-free method")
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
