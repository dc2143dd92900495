"""Exports the student of a run as a folder that can be used without this project.

python -m engine.export RUN OUT                          writes model.safetensors, config.json, README.md, network.py
python -m engine.export RUN OUT --onnx                   also writes model.onnx, checked against PyTorch
python -m engine.export RUN OUT --push_to_hub ORG/NAME   also uploads the folder to the Hugging Face hub
"""

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from engine.data.image_bank import find_bank, open_bank
from engine.networks import public
from engine.networks.build import exported_spec, split_arguments
from engine.networks.trained import Trained, open_trained, weights_of_run
from engine.report.results import checked
from engine.report.tables import markdown_cell
from engine.runtime.errors import UserError, first_line, one_line, reason_of, run_command
from engine.runtime.files import atomic_folder, read_json, require_new, write_json
from engine.runtime.flags import Parser
from engine.runtime.tensors import save_tensors
from models.classifier import Classifier
from registry import MODELS

# The model card of an exported student, from the records of its run.


FRONT = """---
license: other  # fill in; respect the licences of the teacher and the prior
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, {tag}]
---
"""
REDO = re.compile(r" --redo(?:[ =](?!-)\S+)?")  # deletes what a run has made, so it is not part of a command to repeat
TEXT = """
# {student} for {dataset}

{made}

| | |
|---|---|
{rows}

Input: RGB images of {size} x {size} px in [0, 1]. Subtract the mean {mean} and divide by the standard deviation {std}
(model.onnx does both itself). Output: logits of {classes} classes{names}.

{honesty}

## To reproduce

```
{command}
```

at commit {commit} of this project, {versions}.

## Licences

Fill in before you publish: the licences of the student (`license` above), of the teacher ({teacher}), of the teacher's
training data and of the external prior ({prior}).
"""


def model_card(library: str, student: Trained, result: dict[str, Any]) -> str:
    """Text of README.md, the model card of an exported folder.

    Args:
        library: ``library_name`` in the folder's configuration.
        result: content of the run's result.json, checked.
    """
    about, scratch = student.about, result["method"] == "scratch"
    names, prior, teacher = about.get("class_names"), result.get("external_prior", "none"), result.get("teacher", "none")
    known = {
        "method": result["method"],
        "teacher": None if scratch else f"{teacher}, weights {result.get('teacher_digest', 'unknown')}",
        "teacher's accuracy": _percent(result.get("teacher_acc1")),
        "external prior": None if scratch else prior,
        "accuracy, last epoch": _percent(result.get("acc1_last")),
        "accuracy, best epoch on the test split": _percent(result.get("acc1_best")),
        "measured on": result.get("dataset_identity", "").removeprefix("(").removesuffix(")") or None,
        "seed": result.get("seed"),
    }
    real = prior == "real training images"  # of a control
    made = "Trained on real images." if scratch else "Distilled from a teacher without its training data."
    made = "Distilled from a teacher on the real training images: a control, not data-free." if real else made
    best = "The best epoch was chosen on the test split itself, so compare the accuracy of the last epoch. "
    if not scratch and prior != "none":
        best += f"Besides the teacher, the run used an external prior ({prior}), whose data influence this student. "
    listed = ", ".join(f"{label}: {one_line(name)}" for label, name in enumerate(names[:20])) if names else ""
    more = f", and {len(names) - 20} more in config.json" if names and len(names) > 20 else ""
    mean, std = (", ".join(f"{value:g}" for value in about[key]) for key in ("mean", "std"))
    return FRONT.format(library=library, tag="classifier" if scratch or real else "data-free-distillation") + TEXT.format(
        student=result.get("student", student.spec),
        dataset=result.get("dataset", "unknown data"),
        made=made,
        rows="\n".join(f"| {name} | {markdown_cell(str(value))} |" for name, value in known.items() if value is not None),
        size=about["image_size"],
        mean=mean,
        std=std,
        classes=about["num_classes"],
        names=f": {listed}{more}" if names else ", whose names are not known",
        honesty=best
        + "The result of one seed is uncertain; python -m engine.report gives mean and spread over several seeds.",
        command=REDO.sub("", result.get("command", "unknown")),
        commit=result.get("commit", "unknown"),
        versions=", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
        or "versions unknown",
        teacher=teacher,
        prior=prior,
    )


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} %"


# The files of an exported folder: weights, configuration, the network's source code and a model card.


SOURCE = "network.py"


def write_folder(folder: Path, table: dict[str, str], student: Trained, result: dict[str, Any]) -> None:
    """Writes all files of an exported folder except model.onnx.

    A timm network gets timm's configuration in addition to this project's entries, so that timm can load the folder.

    Args:
        table: ``registry.MODELS``.
        student: network whose ``about`` has image_size, mean and std.
        result: content of the run's result.json, checked.
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
    """Where the network of ``spec`` comes from: (library, name in the library, arguments of its factory).

    The library is timm, torchvision or this project.
    """
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
    """Source code of the network as one Python file that imports nothing of this project.

    Args:
        architecture: name in ``table``, or ``path/to/file.py:factory``.
    Returns:
        The source code; None if the network's factory is in an installed package.
    """
    if architecture in table:
        return _inlined(table[architecture].partition(":")[0], set())
    file = Path(architecture.rpartition(":")[0])
    return file.read_text() if file.suffix == ".py" else None


def _inlined(module: str, seen: set[str]) -> str:
    """Source code of a module of ``models``; the modules of ``models`` that it imports replace the import statements."""
    seen.add(module)
    text = Path(models.__path__[0], f"{module.rpartition('.')[2]}.py").read_text()

    def source(match: re.Match) -> str:
        return "" if match[1] in seen else _inlined(match[1], seen)

    return re.sub(r"^from (models\.\w+) import .*\n", source, text, flags=re.MULTILINE)


# Upload of an exported folder to the Hugging Face hub.


def check_name(repository: str) -> None:
    """Raises a UserError unless ``repository`` has the form ORG/NAME."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push_to_hub {repository} found, ORG/NAME wanted")


def push(folder: Path, repository: str) -> str:
    """Uploads a folder to a repository, which is created if it does not exist, and returns the repository's address.

    Raises:
        UserError: there is no network connection, or the hub refuses the upload.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload a distilled student")
    except Exception as error:  # error types of the hub's client and of its HTTP client
        raise UserError(
            f"--push_to_hub {repository}: the upload failed ({first_line(error)}); {folder} is complete: with a network "
            f"and a login (hf auth login), run hf upload {repository} {folder}"
        ) from None
    return str(address)


# A student as an ONNX file that includes the normalization, checked against PyTorch.


CHECKED = 64  # number of images in the check
TOLERANCE = 1e-3  # largest allowed difference of a logit


def images_of_run(run: Path, image_size: int) -> tuple[Tensor, str]:
    """``CHECKED`` images (N, 3, H, W) in [0, 1] for the ONNX check, and their description for the log.

    They are the first images of the run's bank, or random pixels if the bank is missing, too small or of another image size.
    """
    path = find_bank(run)
    if path != run and (path / "manifest.json").is_file():
        images = open_bank(path).read_all()["images"]
        if len(images) >= CHECKED and images.shape[-1] == image_size:
            return images[:CHECKED].float() / 255, "of the run's bank"
    return torch.rand(CHECKED, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)), "random pixels"


def write_onnx(file: Path, student: Trained, images: Tensor) -> float:
    """Writes a student as an ONNX file and returns the largest difference of a logit between onnxruntime and PyTorch.

    Args:
        images: images (N, 3, H, W) in [0, 1] for the comparison.
    Raises:
        UserError: a package is missing, the network cannot be converted, or the difference is above ``TOLERANCE``.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--onnx needs the package {error.name}; run pip install -r requirements.txt") from None
    facts = (student.about[name] for name in ("num_classes", "image_size", "mean", "std"))
    model = Classifier(student.network, *facts).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (images[:2],),
                str(file),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=False,
                verbose=False,
            )
            wanted = model(images)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        found = [torch.from_numpy(session.run(None, {"images": part.numpy()})[0]) for part in (images, images[:1])]
    except Exception as error:  # the exporter and the runtime have their own error types
        raise UserError(f"{student.spec} cannot be exported to ONNX: {reason_of(error)[:300]}; leave out --onnx") from None
    difference = max(float((part - wanted[: len(part)]).abs().max()) for part in found)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits of model.onnx differ from PyTorch's by {difference:.2g}, at most {TOLERANCE:g} wanted; leave out --onnx"
        )
    return difference


def main() -> None:
    parser = Parser(
        prog="python -m engine.export",
        description="Exports the student of a run as a folder that can be used without this project.",
    )
    parser.add_argument("run", type=Path, help="run folder of datafree_kd.py or train_scratch.py")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--onnx", action="store_true", help="also write model.onnx, which maps images in [0, 1] to logits for any batch size"
    )
    parser.add_argument("--arch", metavar="NAME", help="the student's network, if its code is not part of this project")
    parser.add_argument(
        "--push_to_hub", metavar="ORG/NAME", help="upload the folder to this repository of the Hugging Face hub"
    )
    args = parser.parse_args()
    require_new(args.out)
    if args.push_to_hub:
        check_name(args.push_to_hub)
    if args.run.is_file():
        raise UserError(
            f"{args.run} is a file, a run folder wanted; the run folder of a trained network is the --save_dir of "
            "train_scratch.py, by default a folder in checkpoints/scratch"
        )
    weights_of_run(args.run)
    result = checked(read_json(args.run / "result.json"), str(args.run / "result.json"))
    student = open_trained(MODELS, str(args.run), arch=args.arch)
    if missing := [key for key in ("image_size", "mean", "std") if key not in student.about]:
        raise UserError(f"{student.origin} does not record its {' and '.join(missing)}; give a run of this version")
    with atomic_folder(args.out) as unfinished:
        write_folder(unfinished, MODELS, student, result)
        if args.onnx:
            images, what = images_of_run(args.run, student.about["image_size"])
            difference = write_onnx(unfinished / "model.onnx", student, images)
            print(f"model.onnx: logits differ from PyTorch's by at most {difference:.2g} on {len(images)} images ({what})")
    print(f"{args.run} -> {args.out}: {', '.join(sorted(file.name for file in args.out.iterdir()))}")
    if args.push_to_hub:
        print(f"{args.out} -> {push(args.out, args.push_to_hub)}")


if __name__ == "__main__":
    run_command(main)
