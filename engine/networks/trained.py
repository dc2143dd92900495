"""Opens a trained model that is given as a public name, a run folder, an exported folder, or a file of weights."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from engine.networks import public
from engine.networks.build import build_network, find_checkpoint, load_named_weights, split_arguments, with_own_weights
from engine.runtime import checksums
from engine.runtime.errors import UserError
from engine.runtime.schema import SIZE, require
from engine.runtime.stage_record import read_record
from engine.runtime.tensors import load_checkpoint

ABOUT_SCHEMA = {
    "dataset?": str, "num_classes": SIZE, "image_size?": SIZE, "class_names?": [str], "mean?": [float], "std?": [float],
}  # fmt: skip
ABOUT = tuple(key.removesuffix("?") for key in ABOUT_SCHEMA)


class Trained(NamedTuple):
    """A network with its weights, on the CPU.

    spec: name from which ``build_network`` builds the network.
    origin: where its weights come from.
    about: the fields of ``ABOUT`` that are known.
    kind: source of ``about``, 'checkpoint' or 'model', as ``Normalization`` names it.
    """

    network: nn.Module
    spec: str
    origin: str
    about: dict[str, Any]
    kind: str


def open_trained(table: dict[str, str], place: str, info=None, arch: str | None = None, flag: str = "--arch") -> Trained:
    """Opens a model.

    Args:
        table: ``registry.MODELS``.
        place: a public name, a run folder, a folder that engine.export or timm wrote, a file of weights, or the name of a
            network that has weights for the dataset in ``checkpoints/pretrained``.
        info: ``engine.data.datasets.DatasetInfo``; None if no dataset is given.
        arch: name of the network, for a file that names none or names one that code outside this project builds.
        flag: flag that gives ``arch``, for error messages.
    Raises:
        UserError: there is no such model, or the network of its weights is not known.
    """
    path = Path(place)
    if path.is_dir() and (path / public.FILES[0]).is_file():
        place = f"local-dir:{place}"
    if public.is_public(place):
        about = public.configuration(split_arguments(place)[0])
        return Trained(with_own_weights(table, place), place, place, about, "model")
    if path.is_dir():
        path = weights_of_run(path)
    elif not path.is_file():
        if info is None or not (split_arguments(place)[0] in table or ":" in place):
            raise UserError(
                f"there is no file or folder {place}; give one, a public name (timm:NAME, hf-hub:ORG/NAME, torchvision:NAME), or "
                "with --dataset the name of a network that was trained on it"
            )
        path, arch = find_checkpoint(place, info.name, None, f"give its path, and {flag} {place}"), place
    stored = load_checkpoint(path)
    stored = stored if isinstance(stored, dict) else {}
    spec = arch or _named_arch(table, stored, path, flag)
    num_classes = stored.get("num_classes") or (info and info.num_classes)
    if num_classes is None:
        raise UserError(f"{path} does not record its number of classes; give the dataset with --dataset")
    require(stored | {"num_classes": num_classes}, ABOUT_SCHEMA, str(path))
    public.check_names(stored.get("class_names"), num_classes, str(path))
    network = build_network(table, spec, num_classes, stored.get("image_size"))
    about = load_named_weights(table, network, path, "checkpoint", num_classes=num_classes)
    about = {key: about[key] for key in ABOUT if about.get(key) is not None} | {"num_classes": num_classes}
    return Trained(network, spec, str(path), about, "checkpoint")


def _named_arch(table: dict[str, str], stored: dict[str, Any], path: Path, flag: str) -> str:
    arch = stored.get("arch")
    if not isinstance(arch, str):
        raise UserError(f"{path} does not record its architecture; give {flag} NAME, for example a name in registry.MODELS")
    if split_arguments(arch)[0] not in table and not public.is_public(arch):
        raise UserError(
            f"{path} has the architecture {arch}, and code that only a file names is never run; give {flag} '{arch}' to "
            "run it"
        )
    return arch


def weights_of_run(run: Path) -> Path:
    """Path of the weights that a finished run made: its student, or the file that train_scratch.py wrote elsewhere.

    That file is also found in the run folder, for a folder that was moved with it.

    Raises:
        UserError: the folder is no run folder, its run is not finished, or the weights are no longer there.
    """
    if (run / "result.json").is_file():
        if (run / "student.pth").is_file():
            return run / "student.pth"
        stages = run / "stages.json"
        facts = read_record(stages).get("train", {}).get("facts", {})
        require(facts, {"output?": str, "sha256?": str}, str(stages))
        output, digest = facts.get("output"), facts.get("sha256")
        places = (Path(output), run / Path(output).name) if output else ()
        if found := [file for file in places if file.is_file()]:
            file = next((file for file in found if checksums.digest_of(file) == digest), found[0])
            checksums.require(file, digest)
            return file
        if output:
            raise UserError(
                f"the weights of {run} were written to {output}, and there is no such file there or in {run}; start this "
                "command in the folder where that run was started, or put the file into the run folder"
            )
    if not run.exists():
        raise UserError(f"{run} does not exist; give a run folder")
    inside = sorted(file.parent.name for file in run.glob("*/result.json"))
    advice = (
        f"give one of its folders ({', '.join(inside[:5])})" if inside else "give another run folder, or finish that run"
    )
    raise UserError(f"{run} has no finished run (result.json and student.pth); {advice}")
