"""Networks by their public names: timm's, the Hugging Face hub's, torchvision's, and folders in timm's layout.

    timm:resnet50.a1_in1k        a network of timm, with the weights of that tag
    hf-hub:ORG/NAME              config.json and model.safetensors of a model repository
    torchvision:resnet18         a network of torchvision; ``torchvision:resnet18.IMAGENET1K_V1`` names the weights
    local-dir:PATH               config.json and model.safetensors of a folder: timm's, or one that engine.export wrote

timm and torchvision are imported only when such a name is used. No code from a model's files is ever run.
"""

import difflib
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.networks.weights import load_weights
from engine.runtime.errors import UserError, first_line, is_disk_full, lookup
from engine.runtime.files import read_json
from engine.runtime.schema import COUNT, SIZE, require

SOURCES = ("timm:", "hf-hub:", "torchvision:", "local-dir:")
OWN = "datafree_kd"  # ``library_name`` in the config.json of a network of this project
CONFIG = {
    "architecture": str, "num_classes": SIZE, "input_size": [SIZE], "mean": [float], "std": [float],
    "class_names?": [str], "model_args?": dict,
}  # fmt: skip
TIMM_CONFIG = {
    "num_classes": COUNT, "input_size?": [SIZE], "mean": [float], "std": [float], "label_names?": {list, tuple, dict},
    "label_descriptions?": dict,
}  # fmt: skip
FILES = ("config.json", "model.safetensors")


def is_public(spec: str) -> bool:
    """Whether a network's name begins with one of ``SOURCES``."""
    return spec.startswith(SOURCES)


def check_names(names: Sequence[str] | None, num_classes: int, file: str) -> None:
    """Raises a UserError if there are class names, but not one for each class."""
    if names is not None and len(names) != num_classes:
        raise UserError(
            f"{file} has {len(names)} class names for {num_classes} classes, one for each wanted; correct or remove "
            "class_names"
        )


def has_fixed_weights(spec: str) -> bool:
    """Whether a public name always stands for one set of weights, so that no checkpoint is looked for."""
    return spec.startswith(("hf-hub:", "local-dir:"))


def configuration(spec: str) -> dict[str, Any]:
    """Reads a model's own configuration, in the form of the plain values of a checkpoint; reads no weights.

    Args:
        spec: a public name, without arguments.
    Returns:
        num_classes, image_size, mean, std, and class_names (None if they are not known).
    Raises:
        UserError: there is no such model, or it takes other images than square RGB ones.
    """
    if (config := own_config(spec)) is not None:
        found = dict(config)
    elif spec.startswith("torchvision:"):
        weights = _torchvision_weights(spec)
        preset = weights.transforms()
        names = tuple(weights.meta["categories"])
        size = (3, *(preset.crop_size * 2)[:2])
        found = {"num_classes": len(names), "class_names": names, "input_size": size, "mean": preset.mean, "std": preset.std}
    else:
        found = dict(_timm_arguments(spec)["pretrained_cfg"])
        require(found, TIMM_CONFIG, f"the configuration of {spec}", "correct it, or use another model")
        found["class_names"] = _timm_names(found, spec)
    size = list(found.get("input_size") or ())
    if len(size) != 3 or size != [3, size[1], size[1]]:
        raise UserError(
            f"{spec} needs images of {' x '.join(map(str, size)) or 'unknown size'}, three channels and square images "
            "wanted; use another model"
        )
    names = found.get("class_names")
    return {
        "num_classes": found["num_classes"],
        "image_size": size[1],
        "class_names": None if names is None else list(map(str, names)),
        "mean": list(found["mean"]),
        "std": list(found["std"]),
    }


def build_public(spec: str, arguments: dict[str, Any], num_classes: int, image_size: int | None) -> nn.Module:
    """Builds a network with random weights.

    Args:
        spec: a public name for which ``own_config`` returns None.
        arguments: arguments for the network's factory; they override all others.
        image_size: image size in px, passed to a network whose weights depend on it (ViT).
    Raises:
        UserError: there is no such network, or its configuration cannot be read.
    """
    if spec.startswith("torchvision:"):
        import torchvision

        name = _torchvision_name(spec)
        if image_size and name.startswith("vit_"):
            arguments = {"image_size": image_size} | arguments
        return torchvision.models.get_model(name, weights=None, **{"num_classes": num_classes} | arguments)
    import timm

    resolved = _timm_arguments(spec, image_size) | {"num_classes": num_classes} | arguments
    return timm.create_model(resolved.pop("model_name"), **resolved)


def load_public(spec: str, arguments: dict[str, Any], num_classes: int | None, build: Callable[..., nn.Module]) -> nn.Module:
    """Builds a network with its own weights.

    Args:
        arguments: arguments for the network's factory.
        num_classes: number of classes; if it is not the model's own, the head is new and random. None: the model's own.
        build: function (num_classes, image_size) -> the network with random weights.
    Raises:
        UserError: the weights cannot be loaded; the message says which files to put where.
    """
    exported = own_config(spec) is not None
    if exported or spec.startswith("torchvision:"):
        own = configuration(spec)
        network = build(num_classes or own["num_classes"], own["image_size"])
        advice = "put it into {folder} under the same name"
        file = _file(spec, FILES[1]) if exported else fetch_torchvision(_torchvision_weights(spec), spec, advice)
        load_weights(network, file, "weights", new_head=num_classes is not None)
    else:
        import timm

        head = {} if num_classes is None else {"num_classes": num_classes}
        try:
            network = timm.create_model(spec.removeprefix("timm:"), pretrained=True, **head, **arguments)
        except Exception as error:  # timm, its hub client and torch raise dozens of types
            if is_disk_full(error):
                raise
            raise UserError(f"the weights of {spec} cannot be loaded ({first_line(error)}); {_how_to_bring(spec)}") from None
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{spec} has NaN or infinite weights ({name}), finite ones wanted; use another model")
    return network


def own_config(spec: str) -> dict[str, Any] | None:
    """Reads the configuration that ``engine.export`` wrote for a network that is not timm's; None for any other name.

    Raises:
        UserError: the folder or its configuration is missing or damaged.
    """
    if not has_fixed_weights(spec):
        return None
    file = _file(spec, FILES[0])
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{file} has no 'architecture'; give a folder in timm's layout, or one that engine.export wrote")
    if config.get("library_name") not in (OWN, "torchvision"):
        return None
    require(config, CONFIG, str(file), "give a folder as engine.export writes it")
    check_names(config.get("class_names"), config["num_classes"], str(file))
    if len(config["input_size"]) != 3:
        raise UserError(
            f"{file} has an input_size of {len(config['input_size'])} numbers, three wanted (channels, height, width)"
        )
    return config


def _file(spec: str, name: str) -> Path:
    """Path of a file in a folder or in a hub repository; a file of the hub is downloaded if it is not in the cache."""
    kind, _, place = spec.partition(":")
    if kind == "local-dir":
        if not (file := Path(place, name)).is_file():
            raise UserError(f"{file} does not exist; give a folder with {' and '.join(FILES)}")
        return file
    from huggingface_hub import hf_hub_download

    repository, _, revision = place.partition("@")
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:  # the hub's own types and those of its HTTP client
        if is_disk_full(error):
            raise
        raise UserError(f"{name} of {spec} cannot be downloaded ({first_line(error)}); {_how_to_bring(spec)}") from None


def _how_to_bring(spec: str) -> str:
    """Advice for an error message: what to do on a machine without a network."""
    if spec.startswith("local-dir:"):
        return f"put {' and '.join(FILES)} of one model into that folder"
    repository = spec.removeprefix("hf-hub:").partition("@")[0]
    if spec.startswith("timm:"):
        repository = _timm_arguments(spec)["pretrained_cfg"].get("hf_hub_id") or f"timm/{spec.removeprefix('timm:')}"
    return (
        f"on a machine with a network, run 'hf download {repository} {' '.join(FILES)} --local-dir FOLDER', copy that "
        "folder here, and give local-dir:FOLDER as the model"
    )


# timm


def _timm_arguments(spec: str, image_size: int | None = None) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for a name: model_name, pretrained_cfg, and those that its configuration sets."""
    import timm

    name = spec.removeprefix("timm:")
    if spec.startswith("timm:"):
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            near = " or ".join(difflib.get_close_matches(architecture, timm.list_models()))
            hint = f"did you mean {near}?" if near else "timm.list_models() lists all networks"
            raise UserError(f"timm has no network '{architecture}'; {hint}")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            raise UserError(f"timm has no weights '{tag}' of {architecture}; it has {', '.join(tags) or 'none'}")
    try:
        return timm.models.resolve_model_input_args(name, {"img_size": image_size} if image_size else None)
    except Exception as error:  # a damaged configuration may raise anything
        raise UserError(f"{spec}: its configuration is not a valid timm configuration ({first_line(error)})") from None


def _timm_names(config: dict[str, Any], spec: str) -> list[str] | None:
    """Class names by label, as words if the configuration has words; None if they are not known, or not one for each class.

    For ImageNet and its subsets timm knows names and words.
    """
    import timm.data

    names, words = config.get("label_names"), config.get("label_descriptions") or {}
    if names is None and spec.startswith("timm:") and (subset := timm.data.infer_imagenet_subset(config)):
        info = timm.data.ImageNetInfo(subset)
        names, words = info.label_names(), info.label_descriptions(as_dict=True)
    if isinstance(names, dict):
        names = [names.get(str(label), label) for label in range(config["num_classes"])]
    if names is None or len(names) != config["num_classes"]:
        return None
    return [str(words.get(name, name)).partition(",")[0] for name in map(str, names)]


# torchvision


def _torchvision_name(spec: str) -> str:
    import torchvision

    name = spec.removeprefix("torchvision:").partition(".")[0]
    lookup(dict.fromkeys(torchvision.models.list_models(torchvision.models)), name, "network of torchvision")
    return name


def _torchvision_weights(spec: str) -> Any:
    """torchvision's weights for a name: those after the period, else the default, which is the best."""
    import torchvision

    known = torchvision.models.get_model_weights(_torchvision_name(spec))
    tag = spec.partition(".")[2]
    if tag and tag not in known.__members__:
        raise UserError(f"{spec}: torchvision has no such weights; it has {', '.join(known.__members__) or 'none'}")
    return known[tag] if tag else known.DEFAULT


def published_weights(table: dict[str, str], spec: str) -> Path:
    """Path of the file with torchvision's ImageNet weights for a registered network.

    Args:
        table: ``registry.MODELS``.
        spec: a name in ``table`` of a network that ``models.imagenet`` builds.
    Raises:
        UserError: torchvision has no weights for that network, or they cannot be downloaded.
    """
    module, _, name = table.get(spec, "").partition(":")
    if module != "models.imagenet":
        known = ", ".join(key for key, value in table.items() if value.startswith("models.imagenet:"))
        raise UserError(
            f"--pretrained: there are no published ImageNet weights of '{spec}'; choose --model from {known}, or a network "
            "of timm:, hf-hub:, torchvision: or local-dir:"
        )
    advice = "give --resume {name} in place of --pretrained: a head for other classes is dropped"
    return fetch_torchvision(_torchvision_weights(f"torchvision:{name}"), "--pretrained", advice)


def fetch_torchvision(weights: Any, what: str, advice: str) -> Path:
    """Path of a file of torchvision's weights, downloaded if it is not in torch's cache.

    Args:
        weights: a member of one of torchvision's enumerations of weights.
        what: beginning of the error message.
        advice: end of its sentence "fetch it where there is a network and …"; {name} and {folder} stand for the file's
            name and folder.
    Raises:
        UserError: the file cannot be downloaded.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(file), file.stem.rpartition("-")[2])
        except (OSError, HTTPException, RuntimeError) as error:
            if is_disk_full(error):
                raise
            raise UserError(
                f"{what}: {weights.url} cannot be downloaded ({first_line(error)}); download it where there is a network "
                "and " + advice.format(name=file.name, folder=file.parent)
            ) from None
    return file
