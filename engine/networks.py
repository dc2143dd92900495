"""Teachers and students as a run uses them: built by name, weights checked, normalization on board."""

from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from engine.errors import UserError
from models.classifier import Classifier, frozen
from models.load import build_network, load_weights
from registry import METHODS, resolve

PRETRAINED = Path("checkpoints/pretrained")


def short_name(spec: str) -> str:
    """A network's name for file names: "nets/mine.py:big" -> "mine_big"."""
    return spec.removesuffix(".py").split("/")[-1].replace(".py:", "_").replace(":", "_").replace(".", "_")


def find_checkpoint(spec: str, dataset: str, given: str | None, folder: Path = PRETRAINED) -> Path:
    """The teacher's weights: ``given``, else ``<folder>/<dataset>_<name>.pth`` or ``.safetensors``.

    Raises:
        UserError: neither exists; says how to get one.
    """
    if given:
        return Path(given)
    stem = f"{dataset}_{short_name(spec)}"
    for suffix in (".pth", ".safetensors"):
        if (folder / (stem + suffix)).exists():
            return folder / (stem + suffix)
    raise UserError(
        f"no teacher checkpoint {folder / stem}.pth (or .safetensors); train one with 'python train_scratch.py --model "
        f"{spec} --dataset {dataset}', put a published one there, or name one with --teacher_ckpt"
    )


def build_classifier(spec: str, info, device: torch.device, mean=None, std=None) -> Classifier:
    """A randomly initialized classifier for a dataset, channels_last on ``device``.

    Args:
        info: ``engine.data.DatasetInfo``.
        mean, std: three numbers each; None takes the dataset's.
    Raises:
        UserError: the network cannot be built, or does not fit the dataset.
    """
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and (len(value) != 3 or (name == "std" and min(value) <= 0)):
            raise UserError(f"--teacher_{name} {','.join(map(str, value))}: three numbers r,g,b are wanted, std above 0")
    network = build_network(spec, info.num_classes)
    try:
        classifier = Classifier(
            network, info.num_classes, info.image_size, mean or info.mean, std or info.std, name=short_name(spec)
        )
    except ValueError as error:
        raise UserError(f"{spec} does not fit {info.name}: {error}") from None
    return classifier.to(device, memory_format=torch.channels_last)


def require_batch_norm(teacher: Classifier, config) -> None:
    """Stops a method that would match BN statistics (a flag ``--bn`` above 0) at a teacher that has none.

    Raises:
        UserError: names the methods that need none.
    """
    has_statistics = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in teacher.modules())
    if getattr(config, "bn", 0) and not has_statistics:
        without = [name for name, path in METHODS.items() if "bn" not in resolve(path).Config.__dataclass_fields__]
        raise UserError(
            f"the teacher {teacher.name} has no BatchNorm layer, and --bn {config.bn:g} asks to match the statistics that such "
            f"layers keep; give --bn 0, or a method that works without: {', '.join(without)}"
        )


def load_teacher(spec: str, info, device: torch.device, checkpoint: str | None, mean=None, std=None) -> Classifier:
    """The frozen teacher with its weights.

    Raises:
        UserError: no such checkpoint, or it does not fit.
    """
    teacher = build_classifier(spec, info, device, mean, std)
    load_weights(teacher.network, find_checkpoint(spec, info.name, checkpoint), "teacher checkpoint")
    return frozen(teacher)
