"""Builds the teachers and students of a run by name, with checked weights and with normalization inside the model."""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.networks import public
from engine.networks.weights import Normalization, WrongNetwork, choose_normalization, load_weights
from engine.runtime.errors import UserError, first_line, lookup, resolve
from engine.runtime.files import shipped
from models.classifier import Classifier, frozen, layers_with_statistics

PRETRAINED = Path("checkpoints/pretrained")


def short_name(spec: str) -> str:
    """A network's name in file names.

    "nets/mine.py:big" -> "mine_big", "nets.mine:big(depth=3)" -> "nets_mine_big_depth_3",
    "timm:resnet18.a1_in1k" -> "timm_resnet18_a1_in1k", "hf-hub:org/net" -> "org_net", "local-dir:nets/mine" -> "mine".
    """
    if spec.startswith("local-dir:"):
        return re.sub(r"[^\w-]+", "_", Path(spec.removeprefix("local-dir:")).resolve().name)
    if public.is_public(spec):
        return "_".join(re.findall(r"[\w-]+", spec.removeprefix("hf-hub:")))
    spec, _, arguments = spec.partition("(")
    name = spec.removesuffix(".py").split("/")[-1].replace(".py:", "_").replace(":", "_").replace(".", "_")
    return "_".join([name, *re.findall(r"\w+", arguments)])


def stored_checkpoint(spec: str, dataset: str) -> Path | None:
    """The file ``PRETRAINED/<dataset>_<name>``.pth or .safetensors, in the working directory or in the project; or None."""
    files = (shipped(f"{PRETRAINED}/{dataset}_{short_name(spec)}{suffix}") for suffix in (".pth", ".safetensors"))
    return next((file for file in files if file.exists()), None)


def find_checkpoint(spec: str, dataset: str, given: str | None, advice: str = "give its path with --teacher_ckpt") -> Path:
    """Path of the teacher's weights: ``given``, else the ``stored_checkpoint``.

    Raises:
        UserError: no file is given or found; the message says how to get one, and ends with ``advice``.
    """
    if file := given or stored_checkpoint(spec, dataset):
        return Path(file)
    raise UserError(
        f"no teacher checkpoint {PRETRAINED}/{dataset}_{short_name(spec)}.pth (or .safetensors); train one with 'python train_scratch.py --model "
        f"{spec} --dataset ...' (--dataset, --data_root, --domain and --image_size as in this command), put a published one "
        f"there, or {advice}"
    )


def build_network(table: dict[str, str], spec: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """Builds a network with random weights.

    Args:
        table: ``registry.MODELS``.
        spec: a name in ``table``, ``path/to/file.py:factory``, ``package.module:factory``, or a public name
            (``timm:resnet18``; see ``engine.networks.public``). Arguments for the factory may follow in brackets, by name
            and with literal values: ``torchvision.models:get_model(name="resnet18")``.
        num_classes: number of classes, passed to the factory if it takes an argument of that name.
        image_size: image size in px, passed to a public network whose weights depend on it; None: the network's own.
    Raises:
        UserError: there is no such name, file or factory, or the factory fails or returns no ``torch.nn.Module``.
    """
    place, arguments = split_arguments(spec)
    if (config := public.own_config(place)) is not None:
        return build_network(table, exported_spec(table, config, place), num_classes, image_size)
    is_public = public.is_public(place)
    factory = None if is_public else _find_factory(table, place)
    try:
        if is_public:
            return public.build_public(place, arguments, num_classes, image_size)
        if _takes_num_classes(factory):
            arguments = {"num_classes": num_classes} | arguments
        network = factory(**arguments)
    except UserError:
        raise
    except Exception as error:  # a user's file may raise anything
        raise UserError(f"model '{spec}' failed: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model '{spec}' is of type {type(network).__name__}, a torch.nn.Module wanted")
    return network


def exported_spec(table: dict[str, str], config: dict[str, Any], place: str) -> str:
    """Spec of the network that an exported folder's configuration names; code that it names is never imported.

    Raises:
        UserError: the configuration names no network of this project or of torchvision.
    """
    name, arguments = config["architecture"], config.get("model_args") or {}
    if config["library_name"] == "torchvision":
        name = f"torchvision:{name}"
    elif name not in table:
        mean, std = (",".join(f"{value:g}" for value in config[key]) for key in ("mean", "std"))
        raise UserError(
            f"{place} has the architecture {name}, which is not in registry.MODELS, and code that only a folder names is "
            f"never run; give {name} as the model and {public.FILES[1]} of the folder as its weights (mean {mean}, std "
            f"{std})"
        )
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"{name}({written})" if written else name


def split_arguments(spec: str) -> tuple[str, dict[str, Any]]:
    """Splits ``"place:factory(depth=3)"`` into ``"place:factory"`` and {"depth": 3}. Nothing is executed.

    Raises:
        UserError: the brackets hold anything but arguments by name with literal values.
    """
    place, bracket, rest = spec.partition("(")
    if not bracket or public.has_fixed_weights(spec):
        return spec, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if None in arguments:  # **values
            raise ValueError
        return place, arguments
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise UserError(
            f"model '{spec}': arguments must be given by name, with literal values, as in {place}(depth=3, kind='a')"
        ) from None


def _find_factory(table: dict[str, str], spec: str) -> Callable[..., Any]:
    if spec.endswith(".py"):
        raise UserError(
            f"model '{spec}' has no factory; give {spec}:NAME, where NAME is a function that returns the network"
        )
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
        raise UserError(
            f"{place} has no function '{name}'; give {place}:NAME, where NAME is a function that returns the network"
        )
    return getattr(module, name)


def _import_file(path: Path) -> Any:
    module_spec = importlib.util.spec_from_file_location(str(path), path)  # a name that no import statement can ask for
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)  # dataclasses look it up there
    module_spec.loader.exec_module(module)
    return module


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    parameters = inspect.signature(factory).parameters
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build_classifier(table: dict[str, str], spec: str, info, device: torch.device) -> Classifier:
    """Builds a randomly initialized classifier with the dataset's normalization, channels_last on ``device``.

    Args:
        table: ``registry.MODELS``.
        info: ``engine.data.datasets.DatasetInfo``.
    Raises:
        UserError: the network cannot be built, or does not fit the dataset.
    """
    network = build_network(table, spec, info.num_classes, info.image_size)
    return wrap(network, spec, info, device, choose_normalization(info))


def wrap(network: nn.Module, spec: str, info, device: torch.device, normalization: Normalization) -> Classifier:
    """Wraps a network as a float32 classifier; its attribute ``normalization`` holds mean, std and the source of each.

    Raises:
        UserError: the network does not fit the dataset.
    """
    try:
        classifier = Classifier(
            network, info.num_classes, info.image_size, normalization.mean, normalization.std, name=short_name(spec)
        )
    except ValueError as error:
        raise UserError(f"{spec} does not fit {info.name}: {error}") from None
    classifier.normalization = normalization
    return classifier.to(device, torch.float32, memory_format=torch.channels_last)


def require_batch_norm(teacher: Classifier, config, methods: dict[str, str]) -> None:
    """Raises an error if a method matches BN statistics (``--bn`` above 0) and the teacher has none.

    Args:
        config: configuration of the method.
        methods: ``registry.METHODS``, from which the message names methods without BN statistics.
    Raises:
        UserError: the teacher has no BN statistics to match.
    """
    if getattr(config, "bn", 0) and not layers_with_statistics(teacher):
        without = [name for name, path in methods.items() if "bn" not in resolve(path).Config.__dataclass_fields__]
        raise UserError(
            f"the teacher {teacher.name} has no BatchNorm layer, but --bn {config.bn:g} matches the statistics of such "
            f"layers; give --bn 0, or a method that works without: {', '.join(without)}"
        )


def own_weights(spec: str, dataset: str, given: str | None) -> dict[str, Any] | None:
    """Configuration of a public model that is used with its own weights; None if the weights come from a checkpoint.

    A checkpoint given by ``--teacher_ckpt`` comes first. Next comes a checkpoint of that network and dataset in
    ``PRETRAINED``, unless the name itself stands for one set of weights (``hf-hub:``, ``local-dir:``).

    Raises:
        UserError: there is no such model.
    """
    if given or not public.is_public(spec):
        return None
    if not public.has_fixed_weights(spec) and stored_checkpoint(spec, dataset):
        return None
    return public.configuration(split_arguments(spec)[0])


def with_own_weights(table: dict[str, str], spec: str, num_classes: int | None = None) -> nn.Module:
    """Builds a public model with its own weights.

    Args:
        num_classes: number of classes; the model gets a new head if its own has another number. None: its own head.
    Raises:
        UserError: the weights cannot be loaded.
    """
    place, arguments = split_arguments(spec)
    return public.load_public(place, arguments, num_classes, lambda *wanted: build_network(table, spec, *wanted))


def load_teacher(
    table: dict[str, str], spec: str, info, device: torch.device, checkpoint: str | None, mean=None, std=None
) -> Classifier:
    """Builds the frozen teacher with its weights.

    Args:
        info: ``engine.data.datasets.DatasetInfo``; for a public model with its own weights, the result of
            ``DatasetInfo.adapted_to_model`` for its configuration.
        checkpoint: path of the weights; None: see ``own_weights`` and ``find_checkpoint``.
        mean, std: input normalization; None: that of the checkpoint, else that of the dataset.
    Raises:
        UserError: there is no such checkpoint, or it does not fit the network.
    """
    if own := own_weights(spec, info.name, checkpoint):
        network = with_own_weights(table, spec)
        normalization = choose_normalization(info, mean, std, own, f"the configuration of {spec}", "--teacher_", "model")
        return frozen(wrap(network, spec, info, device, normalization))
    network = build_network(table, spec, info.num_classes, info.image_size)
    file = find_checkpoint(spec, info.name, checkpoint)
    stored = load_named_weights(table, network, file, "teacher checkpoint", num_classes=info.num_classes)
    require_image_size(stored, info, f"teacher checkpoint {file}")
    normalization = choose_normalization(info, mean, std, stored, f"teacher checkpoint {file}", "--teacher_")
    return frozen(wrap(network, spec, info, device, normalization))


def require_image_size(stored: dict[str, Any], info, what: str) -> None:
    """Raises a UserError if a checkpoint records another image size than the dataset's, and no flag chose that size.

    Args:
        stored: the checkpoint's facts.
        info: ``engine.data.datasets.DatasetInfo``.
        what: description of the checkpoint.
    """
    size = stored.get("image_size", info.image_size)
    if size != info.image_size and not info.size_given:
        raise UserError(
            f"{what} was trained at {size} px, but the images of {info.name} have {info.image_size} px; give --image_size "
            f"{size}, or --image_size {info.image_size} to use it at another size all the same"
        )


def load_named_weights(
    table: dict[str, str], network: nn.Module, path: Path, what: str, *, num_classes: int, new_head: bool = False
) -> dict[str, Any]:
    """Calls ``load_weights``; if the weights are another network's, the error names the networks that fit.

    Args:
        table: ``registry.MODELS``.
    """
    try:
        return load_weights(network, path, what, new_head)
    except WrongNetwork as error:
        names = matching_models(table, error.shapes, num_classes)
        found = f"{' or '.join(names)} would fit" if names else "give the architecture that it was trained with"
        raise UserError(f"{error}; {found}") from None


def matching_models(table: dict[str, str], shapes: dict[str, torch.Size], num_classes: int) -> list[str]:
    """Names in a table whose networks have the keys and shapes of a state dict; their weights take no memory.

    Args:
        shapes: shapes of the state dict's tensors, without BN's batch counters.
    """
    return [name for name, place in table.items() if _shapes(name, place, num_classes) == shapes]


@functools.cache
def _shapes(name: str, place: str, num_classes: int) -> dict[str, torch.Size]:
    """Shapes in a network's state dict, without BN's batch counters. Cached; all networks together take about a second."""
    with torch.device("meta"):
        state = build_network({name: place}, name, num_classes).state_dict()
    return {key: tensor.shape for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
