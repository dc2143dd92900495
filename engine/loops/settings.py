"""The flags that every data-free run has, whatever its method."""

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
    """Which networks, which data, where."""

    dataset: str = flag("cifar10", "a name of registry.DATASETS, or NAME where DATA_ROOT/NAME.npz exists", affects=ALL)
    data_root: str = flag("data", "folder of the real data (the test split, only to report), from the current directory on")
    name: str | None = flag(
        None, "what checkpoints, run folders and tables call the dataset; unset: its name, or that of its folder"
    )
    domain: str | None = flag(None, "domain of a dataset that has several (domainnet)", affects=ALL)
    classes: str | None = flag(
        None, "of such a dataset: ten (its usual subset) or all; unset: ten", choices=("ten", "all"), affects=ALL
    )
    image_size: int | None = flag(
        None, "px; unset: that of a public teacher, else the dataset's own", affects=ALL, least=1, most=4096
    )
    num_classes: int | None = flag(
        None, "with --no_test: the number of classes of a dataset that is not here", least=1, most=1_000_000
    )
    no_test: bool = flag(
        False, "open no real image: agreement with the teacher on synthetic images is measured, and no accuracy"
    )
    teacher: str = flag(
        "wrn40_2",
        "a name of registry.MODELS, a public one (timm:NAME, hf-hub:ORG/NAME, torchvision:NAME, local-dir:FOLDER), "
        "path/to/file.py:factory or package.module:factory(key='value')",
        affects=ALL,
    )
    teacher_ckpt: str | None = flag(
        None,
        "its weights; unset: checkpoints/pretrained/<dataset>_<teacher>.pth or .safetensors, here or beside datafree_kd.py, else "
        "a public model's own",
    )
    teacher_mean: tuple[float, ...] | None = flag(
        None,
        "normalization the teacher was trained with, r,g,b; unset: its checkpoint's or model's, else the dataset's",
        affects=ALL,
    )
    teacher_std: tuple[float, ...] | None = flag(None, "see --teacher_mean", affects=ALL, above=0)
    student: str = flag("wrn16_1", "as --teacher; starts from random weights", affects=DISTILL)


@dataclass(frozen=True)
class RunFlags:
    """What to do, where to keep it."""

    save_dir: str | None = flag(
        None,
        "run folder, with --seeds one below it for each; unset, in the current directory: "
        "checkpoints/<method>/<dataset>_<teacher>_<student>_seed<seed>",
    )
    stages: tuple[str, ...] | None = flag(None, "which stages to run, comma-separated; unset: all of the method's")
    redo: str | None = flag(None, "forget this stage of the run folder and those after it, then run")
    init_bank: str | None = flag(
        None,
        "image bank to start from, instead of stage synthesize or generate (made with the same teacher)",
        affects=("augment", "distill"),
    )
    init_variants: str | None = flag(
        None, "variants of --init_bank from another run, instead of stage augment", affects=DISTILL
    )
    seed: int = flag(0, "random numbers are a function of seed, stage and round", affects=ALL, least=0)
    seeds: tuple[int, ...] | None = flag(
        None,
        "several runs, one a seed, comma-separated; {seed} in a path flag stands for it, and a table ends them",
        least=0,
        distinct=True,
    )
    scale: float = flag(
        1.0,
        "F, shorter (< 1) or longer than published: F times the student and the inversion steps, a bank sqrt(F) times as large. "
        "Rounds and steps a round are multiplied by sqrt(F) each; weights, rates and batch sizes stay; a length given beside "
        "it is taken as it is",
        above=0,
        most=1000,
    )
    minutes: float | None = flag(
        None,
        "choose --scale, at most 1, by this machine's rates, so that the run takes about so many; a resume keeps it",
        above=0,
    )
    gpu: int | None = flag(None, "index of the GPU, -1 for the CPU; unset: GPU 0 if there is one", least=-1)
    amp: str = flag(
        "auto",
        "mixed precision of the networks; auto: bf16 where the processor computes in it, and what the run was begun with",
        choices=AMP,
        affects=ALL,
    )
    compile: str = flag(
        "auto",
        "torch.compile of inner steps; auto: of those that run often enough to win; graphs: networks and student step as CUDA graphs",
        choices=COMPILE,
    )


@dataclass(frozen=True)
class DistillFlags:
    """Lengths and optimizer of stage distill."""

    recipe: str = flag(
        "published",
        "how the student is trained, as far as the command does not say: a name of registry.RECIPES; what each sets stands below",
    )
    epochs: int = flag(
        200, "epochs of ep_steps student steps; accuracy is measured after each", affects=DISTILL, scales=True, least=1
    )
    kd_steps: int = flag(
        400, "student steps a round (a round begins with one synthesis)", affects=DISTILL, scales=True, least=1
    )
    ep_steps: int = flag(
        0, "student steps an epoch; 0: kd_steps, so that an epoch is a round", affects=DISTILL, scales=True, least=0
    )
    batch_size: int = flag(256, "images a student step", affects=DISTILL, short="-b", least=1, most=1_000_000)
    optimizer: str | None = flag(
        None,
        "muon: SGD, but Muon's steps for the filters of convolutions; unset: sgd",
        choices=("sgd", "muon"),
        affects=DISTILL,
    )
    lr: float = flag(0.1, "SGD learning rate at its highest", affects=DISTILL, above=0)
    lr_min: float = flag(0.0, "and at its end", affects=DISTILL, least=0)
    lr_schedule: str | None = flag(
        None,
        "cosine: from lr to lr_min, after warmup_epochs; one_cycle: linear up in the first fifth of the run, then linear down; "
        "unset: cosine",
        choices=("cosine", "one_cycle"),
        affects=DISTILL,
    )
    momentum: float = flag(0.9, "SGD momentum", affects=DISTILL, least=0, below=1)
    weight_decay: float = flag(1e-4, "SGD weight decay", affects=DISTILL, least=0)
    warmup_epochs: int = flag(
        0, "of cosine: epochs of linear warm-up of lr", affects=DISTILL, scales=True, least=0, most=1_000_000
    )

    memo: str = flag(
        "auto",
        "MiB of the teacher's answers to keep, so that it is not asked twice about a view of an image; auto: a quarter of the "
        "free memory, where enough questions come again; no: none",
    )
    views: int | None = flag(
        None,
        "fixed random views of each image that the student sees in place of all, so that most are known",
        affects=DISTILL,
        least=1,
    )

    def schedule(self) -> Schedule:
        """The same in the form that stage distill takes.

        Raises:
            UserError: a warm-up is given to a learning rate that has its own.
        """
        if self.lr_schedule == "one_cycle" and self.warmup_epochs:
            raise UserError(
                f"--warmup_epochs {self.warmup_epochs} found, but --lr_schedule one_cycle has a warm-up of its own; give "
                "--warmup_epochs 0 or --lr_schedule cosine"
            )
        steps = self.ep_steps or self.kd_steps
        return Schedule(
            self.epochs,
            steps,
            self.kd_steps,
            self.batch_size,
            self.lr,
            self.momentum,
            self.weight_decay,
            self.warmup_epochs,
            self.lr_min,
            self.lr_schedule or "cosine",
            self.optimizer or "sgd",
        )


def with_recipe(groups: list, recipe: dict[str, Any], given: Collection[str]) -> list:
    """The flags of a run with those of a recipe, as far as the run has them.

    Args:
        groups: frozen dataclasses of flags.
        recipe: {name of a flag: value}.
        given: names of flags that the command gives, which stay.
    """
    return [
        dataclasses.replace(group, **{name: recipe[name] for name in vars(group).keys() & recipe.keys() - set(given)})
        for group in groups
    ]


def for_seed(seed: int, several: bool, groups: list) -> list:
    """The flags of one of ``--seeds``: {seed} in any path stands for it, and run folders of several seeds lie apart."""
    made = []
    for group in groups:
        texts = {n: v.replace("{seed}", str(seed)) for n, v in vars(group).items() if isinstance(v, str) and "{seed}" in v}
        if isinstance(group, RunFlags):
            texts |= {"seed": seed}
            if several and group.save_dir and "save_dir" not in texts:
                texts["save_dir"] = f"{group.save_dir}/seed{seed}"
        made.append(dataclasses.replace(group, **texts))
    return made


# How long a run is: one rule that makes a method's published lengths shorter or longer (``--scale``, ``--minutes``).
#
# ``--scale F`` multiplies each length by sqrt(F) and rounds it to the nearest whole number, at least 1:
#
# - how many rounds there are: ``epochs``, ``warmup_epochs``, ``init_rounds``, ``images_per_class``, passes over a bank;
# - how many steps a round has: ``kd_steps``, and the steps of an inversion (``g_steps``, ``init_g_steps``).
#
# So a run has F times the student steps and F times the inversion steps, and a bank (rounds x batch) sqrt(F) times as large.
# A flag says itself that it is such a length: ``flag(..., scales=True)``. All else stays as published:
# weights, rates, batch sizes, batches a round, and the few steps that a generator which lives on takes for each batch
# (``g_steps`` of a method whose generator is streaming, meta-learned or renewed), because they are what the method is.
#
# Where a run has ``ep_steps``, an epoch has many short rounds. Then ``kd_steps``, the student's part of a round, stays too, and
# ``ep_steps`` is scaled in whole rounds: one generator step stays one to five student steps.
#
# A length that the command gives is taken as it is. 0 and unset stay what they are.


def scaled(groups: list, scale: float, given: Collection[str] = ()) -> list:
    """The flags of a run with their lengths scaled by the rule above.

    Args:
        groups: frozen dataclasses of flags, ``DistillFlags`` among them.
        scale: F > 0.
        given: names of flags that the command gives.
    """
    if scale == 1:
        return groups
    return [dataclasses.replace(group, **_lengths(group, math.sqrt(scale), given)) for group in groups]


def _lengths(group: Any, factor: float, given: Collection[str]) -> dict[str, int]:
    """{name: new value} of the lengths of one group of flags."""
    names = [field.name for field in dataclasses.fields(group) if field.metadata["scales"] and field.name not in given]
    lengths = {name: max(1, round(value * factor)) for name in names if (value := getattr(group, name))}
    if isinstance(group, DistillFlags) and group.ep_steps:
        lengths.pop("kd_steps", None)
        if "ep_steps" in lengths:
            lengths["ep_steps"] = group.kd_steps * max(1, round(group.ep_steps * factor / group.kd_steps))
    return lengths
