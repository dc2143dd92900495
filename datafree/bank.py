"""Image banks to and from files for people and other tools.

python -m datafree.bank export RUN FOLDER                      class folders of PNG
python -m datafree.bank export RUN FOLDER --format npy         arrays to calibrate on, normalized as the teacher's inputs
python -m datafree.bank export RUN FOLDER --format imagefolder PNG with metadata.jsonl, as Hugging Face datasets reads it
python -m datafree.bank import FOLDER BANK --dataset cifar10
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine.data.bank import ImageBank, Manifest, find_bank, read_manifest
from engine.data.datasets import DatasetInfo, dataset_info
from engine.data.pictures import class_files, read_images, tell_of_cropping
from engine.networks.build import load_teacher
from engine.networks.weights import choose_normalization
from engine.runtime.errors import UserError, run_command
from engine.runtime.files import atomic_folder, require_new, weights_digest, write_json
from engine.runtime.flags import Parser
from engine.runtime.precision import choose_device
from registry import DATASETS, MODELS

FORMATS = ("png", "npy", "imagefolder")
BATCH = 256  # images the teacher sees together


def export_folders(bank: ImageBank, folder: Path) -> int:
    """Writes every image as ``folder/<class id>/<position>.png``, the folder new or empty; returns how many."""
    columns = bank.read_all()
    with atomic_folder(folder) as unfinished:
        for position, label in enumerate(tqdm(columns["labels"].tolist(), "export", unit="img")):
            save_png(columns["images"][position], unfinished / str(label) / f"{position:07d}.png")
    return len(columns["labels"])


def export_arrays(bank: ImageBank, folder: Path, normalization: tuple | None, shard_mb: int) -> int:
    """Writes ``images-<k>.npy`` (n, 3, H, W) and ``labels-<k>.npy`` (n,) int64, the folder new or empty; returns how many.

    ``about.json`` says whose images these are, in which range, and how many each shard holds.

    Args:
        normalization: (mean, std), each of three: float32, normalized by them, as a network without its own
            normalization takes images; None: uint8.
        shard_mb: MB (10^6 bytes) that the images of a shard have at most, but for one image that is larger.
    """
    columns, size = bank.read_all(), bank.manifest.image_size
    bytes_of_one = 3 * size**2 * (1 if normalization is None else 4)
    count = max(1, shard_mb * 10**6 // bytes_of_one)
    starts = range(0, len(columns["labels"]), count)
    shards = []
    with atomic_folder(folder) as unfinished:
        for number, start in enumerate(tqdm(starts, "export", unit="shard")):
            images = columns["images"][start : start + count]
            labels = columns["labels"][start : start + count]
            if normalization is not None:
                mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalization)
                images = (images.float() / 255 - mean) / std
            np.save(unfinished / f"images-{number:05d}.npy", images.numpy())
            np.save(unfinished / f"labels-{number:05d}.npy", labels.numpy())
            shards.append(len(labels))
        about: dict[str, Any] = {"layout": "NCHW, RGB", "dtype": "uint8" if normalization is None else "float32"}
        if normalization is not None:
            about |= {"normalized": "(image / 255 - mean) / std"} | dict(zip(("mean", "std"), map(list, normalization)))
        write_json(unfinished / "about.json", about | {"shards": shards} | vars(bank.manifest))
    return len(columns["labels"])


def export_imagefolder(bank: ImageBank, folder: Path, names: tuple[str, ...] | None, teacher) -> int:
    """Writes ``<position>.png`` and ``metadata.jsonl``, a line an image, the folder new or empty; returns how many.

    A line has file_name, label, class_name (None: not known), method, external_prior, and with a teacher its five most
    probable classes as "teacher_top5": [{"label", "class_name", "probability"}].

    Args:
        names: of the classes.
        teacher: ``models.classifier.Classifier``, or None.
    """
    columns, manifest = bank.read_all(), bank.manifest
    about = {"method": manifest.method, "external_prior": manifest.external_prior}
    tops = top_classes(teacher, columns["images"]) if teacher is not None else None

    def name(label: int) -> str | None:
        return names[label] if names else None

    with atomic_folder(folder) as unfinished, open(unfinished / "metadata.jsonl", "w") as file:
        for position, label in enumerate(tqdm(columns["labels"].tolist(), "export", unit="img")):
            file_name = f"{position:07d}.png"
            save_png(columns["images"][position], unfinished / file_name)
            line = {"file_name": file_name, "label": label, "class_name": name(label)} | about
            if tops is not None:
                top = next(tops)
                line["teacher_top5"] = [{"label": k, "class_name": name(k), "probability": round(p, 5)} for k, p in top]
            file.write(json.dumps(line) + "\n")
    return len(columns["labels"])


@torch.no_grad()
def top_classes(teacher, images) -> Iterator[list[tuple[int, float]]]:
    """For each of the images (N, 3, H, W) uint8 the teacher's five most probable classes, as (class, probability)."""
    device = next(teacher.parameters()).device
    for start in range(0, len(images), BATCH):
        logits = teacher(images[start : start + BATCH].to(device).float() / 255).float()
        top = logits.softmax(dim=1).topk(min(5, logits.shape[1]), dim=1)
        for classes, probabilities in zip(top.indices.tolist(), top.values.tolist()):
            yield list(zip(classes, probabilities))


def save_png(image: torch.Tensor, file: Path) -> None:
    """(3, H, W) uint8."""
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


def export(args: argparse.Namespace) -> None:
    """The command ``export``.

    Raises:
        UserError: flags that do not go together, or a bank, dataset or teacher that is not as it should be.
    """
    path = find_bank(args.bank)
    bank = ImageBank(path, read_manifest(path), create=False)
    only_for(args, "npy", dtype="float32", shard_mb=256)
    only_for(args, "npy or imagefolder", teacher=None, teacher_ckpt=None, teacher_mean=None, teacher_std=None)
    if args.teacher_ckpt and not args.teacher:
        raise UserError("--teacher_ckpt is given without --teacher; name the network too")
    require_new(args.folder)
    if args.format == "png":
        count = export_folders(bank, args.folder)
    elif args.format == "npy":
        normalization = None if args.dtype == "uint8" else normalization_of(args, bank)
        count = export_arrays(bank, args.folder, normalization, args.shard_mb)
    else:
        info = describe(args, bank) if args.teacher else names_only(args, bank)
        count = export_imagefolder(bank, args.folder, info and info.class_names, teacher_of(args, bank, info))
    print(f"{count} images -> {args.folder}")


def only_for(args: argparse.Namespace, formats: str, **defaults: Any) -> None:
    """Raises a UserError where one of these flags is not at its default and the format has no use for it."""
    given = [name for name, default in defaults.items() if getattr(args, name) != default]
    if given and args.format not in formats.split(" or "):
        raise UserError(f"--{given[0]} is for --format {formats}; leave it out")


def describe(args: argparse.Namespace, bank: ImageBank) -> DatasetInfo:
    """The dataset that the bank's manifest names."""
    manifest = bank.manifest
    info = dataset_info(DATASETS, manifest.dataset, args.data_root, manifest.image_size)
    if info.num_classes != manifest.num_classes:
        raise UserError(
            f"{bank.path} has {manifest.num_classes} classes, {info.name} in {args.data_root} has {info.num_classes}; give "
            "the --data_root of the run that made it"
        )
    return info


def names_only(args: argparse.Namespace, bank: ImageBank) -> DatasetInfo | None:
    """The same, or None where the dataset is not known here: images go out without the names of their classes."""
    try:
        return describe(args, bank)
    except UserError as error:
        print(f"without class names: {error}")
        return None


def teacher_of(args: argparse.Namespace, bank: ImageBank, info: DatasetInfo | None):
    """The teacher that the flags name, or None.

    Raises:
        UserError: it is not the one that the bank was made with.
    """
    if not args.teacher:
        return None
    device = choose_device(args.gpu)
    teacher = load_teacher(MODELS, args.teacher, info, device, args.teacher_ckpt, args.teacher_mean, args.teacher_std)
    found, wanted = weights_digest(teacher.network.state_dict()), bank.manifest.teacher_digest
    if wanted and found != wanted:
        raise UserError(
            f"{bank.path} was made with the teacher {bank.manifest.teacher} (weights {wanted}), --teacher is {args.teacher} "
            f"(weights {found}); give that teacher"
        )
    return teacher


def normalization_of(args: argparse.Namespace, bank: ImageBank) -> tuple:
    """(mean, std): those of --teacher_mean and --teacher_std, else of the --teacher's checkpoint, else the dataset's."""
    if args.teacher:
        chosen = teacher_of(args, bank, describe(args, bank)).normalization
        return chosen.mean, chosen.std
    info = None if args.teacher_mean and args.teacher_std else describe(args, bank)
    chosen = choose_normalization(info, args.teacher_mean, args.teacher_std, prefix="--teacher_")
    return chosen.mean, chosen.std


def rgb(text: str) -> tuple[float, ...]:
    """ "0.5,0.5,0.5" -> three floats."""
    values = tuple(float(value) for value in text.split(","))
    if len(values) != 3:
        raise ValueError
    return values


def main() -> None:
    """Command line of this module: export and import."""
    parser = Parser(prog="python -m datafree.bank", description="Image banks to and from files.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a bank as class folders of PNG, arrays, or images with metadata")
    out.add_argument("bank", type=Path, help="a bank, or the run folder whose bank it is")
    out.add_argument("folder", type=Path, help="new or empty")
    out.add_argument("--format", choices=FORMATS, default="png", help="png: class folders; npy; imagefolder [png]")
    out.add_argument(
        "--dtype",
        choices=("float32", "uint8"),
        default="float32",
        help="of npy: float32, normalized as --teacher_mean and _std, else teacher or dataset say [float32]",
    )
    out.add_argument("--shard_mb", type=int, least=1, default=256, help="of npy: MB a shard at most [256]")
    out.add_argument("--data_root", default="data", help="folder of the dataset, of which no image is opened [data]")
    out.add_argument("--teacher", default=None, help="of npy: normalize as it does; of imagefolder: its top five classes")
    out.add_argument("--teacher_ckpt", default=None, help="its weights; unset: where datafree_kd.py looks")
    out.add_argument("--teacher_mean", type=rgb, default=None, help="r,g,b; unset: its checkpoint's, else the dataset's")
    out.add_argument("--teacher_std", type=rgb, default=None, help="see --teacher_mean")
    out.add_argument(
        "--gpu", type=int, least=-1, default=None, help="of the teacher; -1 for the CPU; unset: GPU 0 if there is one"
    )
    into = commands.add_parser("import", help="make a bank of class folders of images, named by class number or name")
    into.add_argument("folder", type=Path)
    into.add_argument("bank", type=Path, help="new or empty")
    into.add_argument("--dataset", required=True, help="the dataset whose classes the folders are")
    into.add_argument("--data_root", default="data", help="folder of its data, of which no image is opened [data]")
    into.add_argument("--domain", default=None, help="of a dataset that has several")
    into.add_argument("--classes", default=None, help="of such a dataset: ten or all; unset: ten")
    into.add_argument("--image_size", type=int, least=1, most=4096, default=None, help="px; unset: the dataset's")
    into.add_argument("--shard_size", type=int, least=1, default=4096, help="images a shard [4096]")
    args = parser.parse_args()
    if args.command == "export":
        export(args)
        return
    info = dataset_info(DATASETS, args.dataset, args.data_root, args.image_size, args.domain, args.classes)
    require_new(args.bank)
    files, labels = class_files(args.folder, info.class_names or ())
    classes = len(labels.unique())
    if int(labels.max()) >= info.num_classes:
        last = info.num_classes - 1
        raise UserError(f"{args.folder} has a class {int(labels.max())}, {info.name} has the classes 0 to {last}")
    tell_of_cropping(str(args.folder), info.image_size, files)
    with atomic_folder(args.bank) as unfinished:  # a damaged image may come late
        bank = ImageBank(unfinished, Manifest(info.name, info.num_classes, info.image_size))
        for round, start in enumerate(range(0, len(files), args.shard_size)):
            part = slice(start, start + args.shard_size)
            bank.append("synthesize", round, read_images(files[part], info.image_size), labels[part])
    print(f"{len(files)} images of {classes} classes -> {args.bank}")


if __name__ == "__main__":
    run_command(main)
