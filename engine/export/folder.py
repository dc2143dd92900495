"""What an exported folder holds: weights, configuration, the network's source, a model card."""

import re
from pathlib import Path
from typing import Any

from torch import nn

import models
from engine.export.card import model_card
from engine.networks import public
from engine.networks.build import exported_spec, split_arguments
from engine.networks.trained import Trained
from engine.runtime.files import save_tensors, write_json

SOURCE = "network.py"


def write_folder(folder: Path, table: dict[str, str], student: Trained, result: dict[str, Any]) -> None:
    """Writes everything but model.onnx.

    A network of timm gets timm's configuration, with the same plain figures beside it, so that timm loads the folder.

    Args:
        table: ``registry.MODELS``.
        student: with image_size, mean and std among what is known of it.
        result: the run's result.json.
    """
    library, architecture, arguments = origin_of(table, student.spec)
    about, names = student.about, student.about.get("class_names")
    size = about["image_size"]
    figures = {"class_names": names, "input_size": [3, size, size], "mean": about["mean"], "std": about["std"]}
    if library == "timm":
        _write_timm(folder, student.network, figures)
    else:
        named = {"library_name": library, "architecture": architecture, "model_args": arguments}
        write_json(folder / public.FILES[0], named | {"num_classes": about["num_classes"]} | figures)
        save_tensors(folder / public.FILES[1], student.network.state_dict(), {"format": "pt"})
    if library == public.OWN and (source := network_source(table, architecture)):
        (folder / SOURCE).write_text(source)
    (folder / "README.md").write_text(model_card(library, student, result))


def _write_timm(folder: Path, network: nn.Module, figures: dict[str, Any]) -> None:
    import timm

    data = {"input_size": tuple(figures["input_size"]), "mean": tuple(figures["mean"]), "std": tuple(figures["std"])}
    names = {"label_names": figures["class_names"]} if figures["class_names"] else {}
    about = {"library_name": "timm"} | names | figures
    timm.models.save_for_hf(network, folder, safe_serialization=True, data_config=data, model_config=about)


def origin_of(table: dict[str, str], spec: str) -> tuple[str, str, dict[str, Any]]:
    """(library, name of the network there, arguments of its factory): of timm, of torchvision, or else of this project."""
    place, arguments = split_arguments(spec)
    if (config := public.own_config(place)) is not None:
        return origin_of(table, exported_spec(table, config, place))
    if place.startswith("torchvision:"):
        return "torchvision", place.removeprefix("torchvision:").partition(".")[0], arguments
    if public.is_public(place):
        return "timm", place, arguments
    module, _, name = table.get(place, "").partition(":")
    return ("torchvision", name, arguments) if module == "models.imagenet" else (public.OWN, place, arguments)


def network_source(table: dict[str, str], architecture: str) -> str | None:
    """One Python file that makes the network and imports nothing of this project; None where it is in a package.

    Args:
        architecture: a name of ``table``, or ``path/to/file.py:factory``.
    """
    if architecture in table:
        return _inlined(table[architecture].partition(":")[0], set())
    file = Path(architecture.rpartition(":")[0])
    return file.read_text() if file.suffix == ".py" else None


def _inlined(module: str, seen: set[str]) -> str:
    """A module of ``models``, with those that it imports from in place of the import."""
    seen.add(module)
    text = Path(models.__path__[0], f"{module.rpartition('.')[2]}.py").read_text()

    def source(match: re.Match) -> str:
        return "" if match[1] in seen else _inlined(match[1], seen)

    return re.sub(r"^from (models\.\w+) import .*\n", source, text, flags=re.MULTILINE)
