"""Evaluates a trained model on a test split or on a folder of images, and compares its predictions with its teacher's.

python -m engine.evaluate RUN                                  the test split of a run's own dataset
python -m engine.evaluate MODEL --dataset digits               the test split of a dataset
python -m engine.evaluate MODEL --images FOLDER                FOLDER/<class>/*, or a folder of unlabelled images
python -m engine.evaluate MODEL --dataset digits --against TEACHER --csv predictions.csv --json figures.json

MODEL and TEACHER are each a run folder, a folder that engine.export wrote, a file of weights (student.pth), a public name
(timm:NAME, hf-hub:ORG/NAME, torchvision:NAME, local-dir:FOLDER), or a name of registry.MODELS trained on the dataset.
"""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.datasets import DatasetInfo, dataset_info
from engine.data.pictures import image_files
from engine.data.splits import load_split, read_split
from engine.loops.measures import calibration_error, class_accuracy, confusion, predict
from engine.networks.build import wrap
from engine.networks.public import is_public
from engine.networks.trained import Trained, open_trained
from engine.networks.weights import choose_normalization
from engine.report.results import DATASET_FLAGS, dataset_flags, flags_of
from engine.runtime.errors import UserError, run_command
from engine.runtime.files import atomic_path, require_output, write_json
from engine.runtime.flags import Parser, numbers
from engine.runtime.precision import choose_device
from models.classifier import Classifier
from registry import DATASETS, MODELS

MOST_SHOWN = 20  # largest number of classes in the printed table; with more classes only the worst ones are printed


def parse(argv: list[str] | None = None):
    """Parses the command line; ``task`` has the arguments of ``dataset_info`` if the images are those of a dataset.

    Raises:
        UserError: both --dataset and --images are given, or neither and the model is no run folder.
    """
    parser = Parser(prog="python -m engine.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model",
        help="model to evaluate: a run folder, an exported folder, a file of weights, a public name (timm:NAME, "
        "hf-hub:ORG/NAME, torchvision:NAME, local-dir:FOLDER) or a name of registry.MODELS",
    )
    parser.add_argument("--against", metavar="TEACHER", help="second model, whose agreement with the first is reported")
    parser.add_argument(
        "--dataset", help="dataset: a name of registry.DATASETS, or NAME of DATA_ROOT/NAME.npz; unset: a run's own"
    )
    parser.add_argument("--images", metavar="FOLDER", help="folder of unlabelled images, or with one folder per class")
    parser.add_argument("--data_root", help="folder of the dataset; unset: that of a run whose dataset is used, else data")
    parser.add_argument("--domain", help="domain of a dataset that has several (domainnet)")
    parser.add_argument("--classes", help="classes of a dataset with domains: ten or all; unset: ten")
    parser.add_argument(
        "--image_size", type=int, least=1, most=4096, help="image size in px; unset: the model's own, else the dataset's"
    )
    parser.add_argument("--arch", metavar="NAME", help="network of a file of weights that does not name its network")
    parser.add_argument("--against_arch", metavar="NAME", help="the same as --arch for the --against model")
    for name, legal in (("mean", {}), ("std", {"above": 0})):
        text = f"{name} r,g,b for the normalization; unset: the model's own, else the dataset's"
        parser.add_argument(f"--{name}", type=numbers, help=text, **legal)
    parser.add_argument("--batch_size", type=int, least=1, default=250, help="images per forward pass [250]")
    parser.add_argument(
        "--workers",
        type=int,
        least=0,
        most=1024,
        default=4,
        help="processes that decode images if the images do not fit in memory [4]",
    )
    parser.add_argument("--gpu", type=int, least=-1, help="index of the GPU, -1 for the CPU; unset: GPU 0 if there is one")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file to write the predictions to, one line per image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write all figures to")
    args = parser.parse_args(argv)
    if not args.dataset and not args.images and (Path(args.model) / "args.json").exists():
        known = {name: value for name, value in vars(args).items() if value is not None}
        args.task = dataset_flags(flags_of(Path(args.model), DATASET_FLAGS) | known)
        return args
    args.task = [args.dataset, args.data_root or "data", args.image_size, args.domain, args.classes]
    if args.dataset and args.images:
        raise UserError("give either --dataset NAME or --images FOLDER, not both")
    if not (args.dataset or args.images):
        raise UserError(
            f"{args.model} is no run folder, whose dataset would be known; give --dataset NAME or --images FOLDER"
        )
    return args


def main() -> None:
    args = parse()
    for name, fields in (("csv", ()), ("json", ("model", "weights", "on"))):
        if file := getattr(args, name):
            require_output(f"--{name}", file, (f".{name}",), fields)
    device = choose_device(args.gpu)
    info, labelled = None, True
    if not args.images:
        info = dataset_info(DATASETS, *args.task)
    model = open_trained(MODELS, args.model, info, args.arch)
    if args.images:
        info, labelled = images_info(args.images, model, args.image_size)
    size = args.image_size
    info = known_to(info, model, size, args.model)
    logits, labels = logits_of(model, info, device, args, args.mean, args.std)
    figures = {"model": args.model, "weights": model.origin, "on": args.images or info.name, "images": len(labels)}
    predictions = {"predicted": logits.argmax(1), "confidence": logits.softmax(1).amax(1)}
    if labelled:
        figures |= measures(logits, labels, info.num_classes)
    else:
        figures["predicted"] = torch.bincount(predictions["predicted"], minlength=info.num_classes).tolist()
    if args.against:
        teacher = open_trained(MODELS, args.against, info, args.against_arch, "--against_arch")
        theirs, _ = logits_of(teacher, known_to(info, teacher, size, args.against), device, args)
        predictions["teacher_predicted"] = theirs.argmax(1)
        figures |= {"against": args.against, "agreement": _percent(logits.argmax(1) == theirs.argmax(1))}
        if labelled:
            figures["teacher_acc1"] = measures(theirs, labels, info.num_classes)["acc1"]
    if args.csv:
        write_csv(args.csv, info, labels if labelled else None, predictions)
    if args.json:
        write_json(args.json, figures)
    print("\n".join(lines(figures, info)))


def images_info(folder: str, model: Trained, image_size: int | None) -> tuple[DatasetInfo, bool]:
    """Describes a folder of images as a dataset with the model's classes.

    Returns:
        The dataset, and whether it is labelled. It is labelled if the folder has subfolders with images.
    Raises:
        UserError: there is no such folder, or the image size is unknown.
    """
    root, about = Path(folder), model.about
    if not root.is_dir():
        raise UserError(
            f"--images {folder} is not a folder; give a folder of images, or a folder with one subfolder of images per class"
        )
    labelled = any(entry.is_dir() and not entry.name.startswith(".") and image_files(entry) for entry in root.iterdir())
    size = image_size or about.get("image_size")
    if size is None:
        raise UserError(f"{model.origin} does not record its image size; give --image_size")
    names = about.get("class_names")
    reader = "engine.data.readers:read_class_folders" if labelled else "engine.data.readers:read_unlabelled"
    return DatasetInfo(
        name=root.resolve().name,
        num_classes=about["num_classes"],
        image_size=size,
        mean=about.get("mean") or (0.5,) * 3,
        std=about.get("std") or (0.5,) * 3,
        class_names=None if names is None else tuple(names),
        flip=False,
        crop_padding=0,
        data_root=".",
        reader=reader,
        source=folder,
    ), labelled


def known_to(info: DatasetInfo, model: Trained, size: int | None, name: str) -> DatasetInfo:
    """The dataset with the image size and the class names that are stored with a model's weights.

    Args:
        size: image size in px that goes before the model's, or None.
        name: the model's name in error messages.
    """
    about = {"image_size": size or info.image_size} | model.about
    weights = "--pretrained" if is_public(model.spec) else f"--resume {model.origin}"
    return info.adapted_to_model(name, about, size is not None, f"--model {model.spec} {weights}")


def logits_of(model: Trained, info: DatasetInfo, device: torch.device, args, mean=None, std=None) -> tuple[Tensor, Tensor]:
    """The logits (N, C) and labels (N,) of a dataset's test split, on the CPU.

    Raises:
        UserError: a logit is NaN or infinite.
    """
    normalization = choose_normalization(info, mean, std, model.about, model.origin, kind=model.kind)
    classifier: Classifier = wrap(model.network, model.spec, info, device, normalization)
    print(f"{model.origin} ({model.spec}): {info.image_size} px, {normalization}")
    logits, labels = predict(classifier, load_split(info, "test", device, args.workers), args.batch_size)
    if not logits.isfinite().all():
        raise UserError(
            f"{model.origin} gives NaN or infinite logits with {normalization}; give another model, --mean or --std"
        )
    return logits, labels


def measures(logits: Tensor, labels: Tensor, num_classes: int) -> dict[str, Any]:
    """acc1, acc5 and the accuracy of each class in %, the calibration error and the confusion matrix, as plain values."""
    counts = confusion(labels, logits.argmax(1), num_classes)
    top = logits.topk(min(5, num_classes), 1).indices
    by_class = [None if value != value else round(value, 2) for value in class_accuracy(counts).tolist()]
    return {
        "acc1": _percent(top[:, 0] == labels),
        "acc5": _percent((top == labels[:, None]).any(1)),
        "calibration_error": round(calibration_error(logits.softmax(1), labels), 4),
        "class_acc1": by_class,
        "confusion": counts.tolist(),
    }


def _percent(hits: Tensor) -> float:
    return round(100 * float(hits.double().mean()), 3)


def write_csv(file: Path, info: DatasetInfo, labels: Tensor | None, predictions: dict[str, Tensor]) -> None:
    """Writes one line per image: its file or number, its label if there is one, and the predictions.

    Classes are written by name if the names are known.
    """
    raw, _ = read_split(info, "test")
    images = raw.images if isinstance(raw.images, list) else range(len(raw.images))
    names = info.class_names or range(info.num_classes)
    columns = {"image": list(images)} | ({} if labels is None else {"label": [names[k] for k in labels.tolist()]})
    for name, values in predictions.items():
        is_class = not values.is_floating_point()
        columns[name] = [names[value] if is_class else f"{value:.4f}" for value in values.tolist()]
    with atomic_path(file) as temporary, open(temporary, "w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))


def lines(figures: dict[str, Any], info: DatasetInfo) -> list[str]:
    """The lines to print: the figures, the accuracy of all (or the worst) classes and the most frequent confusions."""
    names = info.class_names or tuple(map(str, range(info.num_classes)))
    found = [f"{figures['images']} images of {figures['on']}"]
    if "acc1" in figures:
        found += [
            f"acc1 {figures['acc1']:.2f} %, acc5 {figures['acc5']:.2f} %, expected calibration error "
            f"{figures['calibration_error']:.4f}"
        ]
    if "agreement" in figures:
        theirs = f"; its own acc1 {figures['teacher_acc1']:.2f} %" if "teacher_acc1" in figures else ""
        found.append(f"agrees with {figures['against']} on {figures['agreement']:.2f} %{theirs}")
    if "acc1" not in figures:
        most = sorted(((count, -k) for k, count in enumerate(figures["predicted"]) if count), reverse=True)[:MOST_SHOWN]
        width = max(len(names[-k]) for _, k in most)
        return [*found, "", "most frequent predictions", *(f"  {names[-k]:<{width}}  {count:5d}" for count, k in most)]
    counts = torch.tensor(figures["confusion"])
    tested = [(value, label) for label, value in enumerate(figures["class_acc1"]) if value is not None]
    few = len(names) <= MOST_SHOWN
    shown = tested if few else sorted(tested)[:MOST_SHOWN]
    found += ["", "acc1 by class" if few else f"acc1 of the {len(shown)} worst classes of {len(tested)}"]
    width = max(len(names[label]) for _, label in shown)
    found += [f"  {names[label]:<{width}}  {value:6.2f} %  of {int(counts[label].sum())}" for value, label in shown]
    wrong = counts - torch.diag(counts.diagonal())
    most = wrong.flatten().argsort(descending=True, stable=True)[:10].tolist()
    pairs = [
        (int(wrong.flatten()[k]), names[k // len(names)], names[k % len(names)]) for k in most if wrong.flatten()[k] > 0
    ]
    return (
        found
        + (["", "most frequent confusions"] if pairs else [])
        + [f"  {n:4d} x {a} classified as {b}" for n, a, b in pairs]
    )


if __name__ == "__main__":
    run_command(main)
