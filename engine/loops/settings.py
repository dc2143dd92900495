"""Flags that every data-free method shares, and the rule that scales the lengths of a run."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from engine.loops.distill import Schedule
from engine.runtime.compilation import CHOICES as COMPILE
from engine.runtime.errors import UserError
from engine.runtime.flags import flag
from engine.runtime.precision import AMP

ALL = ("synthesize", "augment", "generate", "distill")
DISTILL = ("distill",)


@dataclass(frozen=True)
class TaskFlags:
    """Networks and data."""

    dataset: str = flag(
        "cifar10",
        "dataset: a name of registry.DATASETS (--list datasets), NAME of a file DATA_ROOT/NAME.npz, or "
        "folder for class folders DATA_ROOT/{train,test}/<class>/",
        affects=ALL,
    )
    data_root: str = flag(
        "data",
        "folder of the real data, relative to the current directory; data-free methods open only the test split, to report "
        "accuracy",
    )
    name: str | None = flag(
        None,
        "name of the dataset in checkpoints, run folders and tables; unset: the value of --dataset, or the folder's name "
        "for --dataset folder",
    )
    domain: str | None = flag(None, "domain, for a dataset that has several (domainnet)", affects=ALL)
    classes: str | None = flag(
        None,
        "classes, for a dataset with domains: ten (the usual subset) or all; unset: ten",
        choices=("ten", "all"),
        affects=ALL,
    )
    image_size: int | None = flag(
        None,
        "side of the square images in pixels; unset: the size of a public teacher, else the dataset's size",
        affects=ALL,
        least=1,
        most=4096,
    )
    num_classes: int | None = flag(
        None, "with --no_test: number of classes of a dataset that is not on this machine", least=1, most=1_000_000
    )
    no_test: bool = flag(
        False, "open no real images: report the student's agreement with the teacher on synthetic images instead of accuracy"
    )
    teacher: str = flag(
        "wrn40_2",
        "teacher: a name of registry.MODELS, a public model (timm:NAME, hf-hub:ORG/NAME, torchvision:NAME, "
        "local-dir:FOLDER), path/to/file.py:factory or package.module:factory(key='value')",
        affects=ALL,
    )
    teacher_ckpt: str | None = flag(
        None,
        "file with the teacher's weights; unset: checkpoints/pretrained/<dataset>_<teacher>.pth or .safetensors, in the "
        "current directory or beside datafree_kd.py; for a public model without such a file: the published weights",
    )
    teacher_mean: tuple[float, ...] | None = flag(
        None,
        "channel means r,g,b of the normalization that the teacher was trained with; unset: from its checkpoint or public "
        "model, else the dataset's",
        affects=ALL,
    )
    teacher_std: tuple[float, ...] | None = flag(
        None,
        "channel standard deviations r,g,b of the teacher's normalization; unset: as for --teacher_mean",
        affects=ALL,
        above=0,
    )
    student: str = flag("wrn16_1", "student network, given like --teacher; starts from random weights", affects=DISTILL)


@dataclass(frozen=True)
class RunFlags:
    """Run folder, stages, seeds, length and hardware."""

    save_dir: str | None = flag(
        None,
        "run folder; with --seeds, parent folder of the run folders seed<seed>; unset: "
        "checkpoints/<method>/<dataset>_<teacher>_<student>_seed<seed> in the current directory",
    )
    stages: tuple[str, ...] | None = flag(None, "stages to run, comma-separated; unset: all stages of the method")
    redo: str | None = flag(None, "delete the results of this stage and of all later stages, then run")
    init_bank: str | None = flag(
        None,
        "another run or image bank, made with the same teacher, whose images replace those of stage synthesize or generate",
        affects=("augment", "distill"),
    )
    init_variants: str | None = flag(
        None, "another run, whose variants of --init_bank replace those of stage augment", affects=DISTILL
    )
    seed: int = flag(0, "seed; all random numbers depend only on seed, stage and round", affects=ALL, least=0)
    seeds: tuple[int, ...] | None = flag(
        None,
        "seeds, comma-separated: one run for each, then a table of all runs; {seed} in a path is replaced by the seed",
        least=0,
        distinct=True,
    )
    scale: float = flag(
        1.0,
        "factor F for shorter (< 1) or longer runs than published: F times the student steps and the inversion steps, "
        "sqrt(F) times the images of the bank. The number of rounds and the steps per round are each multiplied by "
        "sqrt(F). Loss weights, learning rates and batch sizes are unchanged. A length given as a flag is not scaled",
        above=0,
        most=1000,
    )
    minutes: float | None = flag(
        None,
        "approximate duration of the run in minutes: chooses --scale (at most 1) from speeds measured on this machine; a "
        "resumed run keeps its scale",
        above=0,
    )
    gpu: int | None = flag(None, "index of the GPU, -1 for the CPU; unset: GPU 0 if there is one", least=-1)
    amp: str = flag(
        "auto",
        "mixed precision of the networks; auto: bf16 on hardware where it is faster, else no; a resumed run keeps its "
        "precision",
        choices=AMP,
        affects=ALL,
    )
    compile: str = flag(
        "auto",
        "torch.compile of the inner steps; auto: only steps that run often enough to save time, with teacher and student "
        "step as CUDA graphs in a run on one GPU; yes: all, without CUDA graphs; graphs: all, with them",
        choices=COMPILE,
    )


@dataclass(frozen=True)
class DistillFlags:
    """Student training: lengths, optimizer and learning rate of stage distill."""

    recipe: str = flag(
        "published",
        "a name of registry.RECIPES: a set of values for the flags of the student's training, listed at the end of this "
        "help; flags on the command line override it",
    )
    epochs: int = flag(200, "number of epochs; accuracy is measured after each epoch", affects=DISTILL, scales=True, least=1)
    kd_steps: int = flag(
        400, "student steps per round; each round begins with one synthesis", affects=DISTILL, scales=True, least=1
    )
    ep_steps: int = flag(
        0, "student steps per epoch; 0: the value of --kd_steps, one round per epoch", affects=DISTILL, scales=True, least=0
    )
    batch_size: int = flag(256, "images per student step", affects=DISTILL, short="-b", least=1, most=1_000_000)
    optimizer: str | None = flag(
        None,
        "optimizer of the student; muon: Muon for the filters of convolutions, SGD for all other weights; unset: sgd",
        choices=("sgd", "muon"),
        affects=DISTILL,
    )
    lr: float = flag(0.1, "peak learning rate of the student", affects=DISTILL, above=0)
    lr_min: float = flag(0.0, "learning rate at the end of the schedule", affects=DISTILL, least=0)
    lr_schedule: str | None = flag(
        None,
        "learning rate schedule; cosine: warm-up for --warmup_epochs, then cosine from --lr to --lr_min; one_cycle: linear "
        "rise in the first fifth of the run, then linear decay to --lr_min; unset: cosine",
        choices=("cosine", "one_cycle"),
        affects=DISTILL,
    )
    momentum: float = flag(0.9, "momentum of the optimizer", affects=DISTILL, least=0, below=1)
    weight_decay: float = flag(1e-4, "weight decay of the optimizer", affects=DISTILL, least=0)
    warmup_epochs: int = flag(
        0, "cosine: epochs of linear warm-up before the decay", affects=DISTILL, scales=True, least=0, most=1_000_000
    )

    logit_cache: str = flag(
        "auto",
        "cache of teacher logits for views (crop and flip) of images that come again: size in MiB, auto or no; "
        "auto: at most a quarter of the free memory, and no cache if few views come again",
    )
    views: int | None = flag(
        None,
        "train the student on only this many fixed random views (crop and flip) of each image, so that most teacher logits "
        "come from the cache of --logit_cache; unset: all views",
        affects=DISTILL,
        least=1,
    )

    def schedule(self) -> Schedule:
        """Returns these flags in the form that stage distill takes.

        Raises:
            UserError: ``--warmup_epochs`` is given for the one-cycle schedule, which has its own warm-up, or ``--lr_min`` is
                greater than ``--lr``.
        """
        if self.lr_min > self.lr:
            raise UserError(f"--lr_min {self.lr_min:g} found, at most --lr {self.lr:g} wanted; lower it")
        if self.lr_schedule == "one_cycle" and self.warmup_epochs:
            raise UserError(
                f"--warmup_epochs {self.warmup_epochs} found, but --lr_schedule one_cycle has its own warm-up; give "
                "--warmup_epochs 0 or --lr_schedule cosine"
            )
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Schedule)}
        values["ep_steps"] = self.ep_steps or self.kd_steps
        values |= {"lr_schedule": self.lr_schedule or "cosine", "optimizer": self.optimizer or "sgd"}
        return Schedule(**values)


def with_recipe(groups: list, recipe: dict[str, Any], given: Collection[str]) -> list:
    """Returns the flags of a run with the values of a recipe filled in.

    Args:
        groups: frozen dataclasses of flags.
        recipe: {name of a flag: value}; names that the run does not have are ignored.
        given: names of the flags on the command line, whose values are kept.
    """
    return [
        dataclasses.replace(group, **{name: recipe[name] for name in vars(group).keys() & recipe.keys() - set(given)})
        for group in groups
    ]


def for_seed(seed: int, several: bool, groups: list) -> list:
    """Returns the flags of the run with one of ``--seeds``.

    "{seed}" in a text flag is replaced by the seed. A ``--save_dir`` without "{seed}" gets the subfolder ``seed<seed>``.

    Args:
        seed: seed of this run.
        several: whether ``--seeds`` was given.
        groups: frozen dataclasses of flags.
    """
    made = []
    for group in groups:
        texts = {n: v.replace("{seed}", str(seed)) for n, v in vars(group).items() if isinstance(v, str) and "{seed}" in v}
        if isinstance(group, RunFlags):
            texts |= {"seed": seed}
            if several and group.save_dir and "save_dir" not in texts:
                texts["save_dir"] = f"{group.save_dir}/seed{seed}"
        made.append(dataclasses.replace(group, **texts))
    return made


# Length of a run: one rule makes a method's published lengths shorter or longer (``--scale``, ``--minutes``).
#
# ``--scale F`` multiplies each length by sqrt(F) and rounds it to the nearest whole number, at least 1. The lengths are
#
# - the number of rounds: ``epochs``, ``warmup_epochs``, ``init_rounds``, ``images_per_class``, passes over a bank;
# - the number of steps per round: ``kd_steps``, and the steps of an inversion (``g_steps``, ``init_g_steps``).
#
# A run then has F times the student steps and F times the inversion steps. Its bank (rounds x batch) is sqrt(F) times as
# large. A flag is such a length if it is declared with ``flag(..., scales=True)``. Everything else stays as published: loss
# weights, learning rates, batch sizes, batches per round. Also unscaled are the few steps per batch of a streaming,
# meta-learned or renewed generator (its method's ``g_steps``), because they define the method.
#
# If ``ep_steps`` is set, an epoch has many short rounds. Then ``kd_steps``, the student steps of a round, is not scaled,
# and ``ep_steps`` is scaled in whole rounds. Streaming methods thus keep their number of student steps per generator step.
#
# A length given on the command line is not scaled. 0 and unset are left unchanged.


def scaled(groups: list, scale: float, given: Collection[str] = ()) -> list:
    """Returns the flags of a run with their lengths scaled by the rule above.

    Args:
        groups: frozen dataclasses of flags, ``DistillFlags`` among them.
        scale: F > 0.
        given: names of the flags on the command line, which are not scaled.
    """
    if scale == 1:
        return groups
    return [dataclasses.replace(group, **_lengths(group, math.sqrt(scale), given)) for group in groups]


def _lengths(group: Any, factor: float, given: Collection[str]) -> dict[str, int]:
    """Returns {name: scaled value} for the lengths of one group of flags."""
    names = [field.name for field in dataclasses.fields(group) if field.metadata["scales"] and field.name not in given]
    lengths = {name: max(1, round(value * factor)) for name in names if (value := getattr(group, name))}
    if isinstance(group, DistillFlags) and group.ep_steps:
        lengths.pop("kd_steps", None)
        if "ep_steps" in lengths:
            lengths["ep_steps"] = group.kd_steps * max(1, round(group.ep_steps * factor / group.kd_steps))
    return lengths
