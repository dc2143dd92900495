"""Teachers and students as a run uses them: built by name, weights checked, normalization on board."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.networks.weights import first_line, load_weights
from engine.runtime.errors import UserError
from engine.runtime.names import lookup, resolve
from models.classifier import Classifier, frozen

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


def build_network(table: dict[str, str], spec: str, num_classes: int) -> nn.Module:
    """A fresh network.

    Args:
        table: ``registry.MODELS``.
        spec: one of its names, ``path/to/file.py:factory`` or ``package.module:factory``.
        num_classes: given to the factory, unless it takes no argument of that name.
    Raises:
        UserError: no such name, file or factory, or the factory fails or makes something else.
    """
    factory = _find_factory(table, spec)
    try:
        network = factory(num_classes=num_classes) if _takes_num_classes(factory) else factory()
    except Exception as error:  # whatever a user's file raises
        raise UserError(f"model '{spec}' failed: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model '{spec}' made a {type(network).__name__}, wanted a torch.nn.Module")
    return network


def _find_factory(table: dict[str, str], spec: str) -> Callable[..., Any]:
    if spec.endswith(".py"):
        raise UserError(f"model '{spec}' names no factory; give {spec}:factory")
    if ":" not in spec:
        return resolve(lookup(table, spec, "model"))
    place, _, name = spec.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"model file {place} does not exist")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise UserError(f"model '{spec}' cannot be imported: {first_line(error)}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{place} has no factory '{name}'")
    return getattr(module, name)


def _import_file(path: Path) -> Any:
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    parameters = inspect.signature(factory).parameters
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build_classifier(table: dict[str, str], spec: str, info, device: torch.device, mean=None, std=None) -> Classifier:
    """A randomly initialized classifier for a dataset, channels_last on ``device``.

    Args:
        table: ``registry.MODELS``.
        info: ``engine.data.datasets.DatasetInfo``.
        mean, std: three numbers each; None takes the dataset's.
    Raises:
        UserError: the network cannot be built, or does not fit the dataset.
    """
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and (len(value) != 3 or (name == "std" and min(value) <= 0)):
            raise UserError(f"--teacher_{name} {','.join(map(str, value))}: three numbers r,g,b are wanted, std above 0")
    network = build_network(table, spec, info.num_classes)
    try:
        classifier = Classifier(
            network, info.num_classes, info.image_size, mean or info.mean, std or info.std, name=short_name(spec)
        )
    except ValueError as error:
        raise UserError(f"{spec} does not fit {info.name}: {error}") from None
    return classifier.to(device, memory_format=torch.channels_last)


def require_batch_norm(teacher: Classifier, config, methods: dict[str, str]) -> None:
    """Stops a method that would match BN statistics (a flag ``--bn`` above 0) at a teacher that has none.

    Args:
        methods: ``registry.METHODS``, for the advice.
    Raises:
        UserError: names the methods that need none.
    """
    has_statistics = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in teacher.modules())
    if getattr(config, "bn", 0) and not has_statistics:
        without = [name for name, path in methods.items() if "bn" not in resolve(path).Config.__dataclass_fields__]
        raise UserError(
            f"the teacher {teacher.name} has no BatchNorm layer, and --bn {config.bn:g} asks to match the statistics that such "
            f"layers keep; give --bn 0, or a method that works without: {', '.join(without)}"
        )


def load_teacher(table: dict[str, str], spec: str, info, device: torch.device, checkpoint: str | None, mean=None, std=None) -> Classifier:
    """The frozen teacher with its weights.

    Raises:
        UserError: no such checkpoint, or it does not fit.
    """
    teacher = build_classifier(table, spec, info, device, mean, std)
    load_weights(teacher.network, find_checkpoint(spec, info.name, checkpoint), "teacher checkpoint")
    return frozen(teacher)
