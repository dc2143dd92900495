"""Exports image banks to files for people and other tools, and imports class folders of images as banks.

python -m datafree.bank export RUN FOLDER                      class folders of PNG files
python -m datafree.bank export RUN FOLDER --format npy         arrays for calibration, normalized as the teacher's inputs
python -m datafree.bank export RUN FOLDER --format imagefolder PNG files with metadata.jsonl, for Hugging Face datasets
python -m datafree.bank import FOLDER BANK --dataset cifar10   a bank from class folders
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

from engine.data.datasets import DatasetInfo, dataset_info
from engine.data.image_bank import ImageBank, Manifest, find_bank, open_bank
from engine.data.pictures import class_files, read_images, warn_of_cropping
from engine.networks.build import load_teacher
from engine.networks.weights import choose_normalization
from engine.report.results import DATASET_FLAGS, dataset_flags, flags_of
from engine.runtime.errors import UserError, run_command
from engine.runtime.files import atomic_folder, require_new, write_json
from engine.runtime.flags import Parser, numbers
from engine.runtime.precision import choose_device
from engine.runtime.tensors import weights_digest
from registry import DATASETS, MODELS

FORMATS = ("png", "npy", "imagefolder")
BATCH = 256  # images per forward pass of the teacher


def export_folders(bank: ImageBank, folder: Path) -> int:
    """Writes every image as ``<folder>/<class id>/<position>.png``; returns the number of images.

    Args:
        bank: image bank.
        folder: folder to write, new or empty.
    """
    columns = bank.read_all()
    with atomic_folder(folder) as unfinished:
        for position, label in enumerate(tqdm(columns["labels"].tolist(), "export", unit="img")):
            save_png(columns["images"][position], unfinished / str(label) / f"{position:07d}.png")
    return len(columns["labels"])


def export_arrays(bank: ImageBank, folder: Path, normalization: tuple | None, shard_mb: int) -> int:
    """Writes ``images-<k>.npy`` (n, 3, H, W) and ``labels-<k>.npy`` (n,) int64; returns the number of images.

    ``about.json`` holds the bank's manifest, the layout and range of the values, and the number of images in each shard.

    Args:
        bank: image bank.
        folder: folder to write, new or empty.
        normalization: (mean, std), three values each, to write float32 images for a network without its own normalization;
            None to write uint8 images.
        shard_mb: largest size of a shard's images in MB (10^6 bytes); a shard has at least one image.
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
    """Writes ``<position>.png`` files and ``metadata.jsonl``, one line per image; returns the number of images.

    A line has file_name, label, class_name (null if unknown), method and external_prior. With a teacher it also has the
    teacher's five most probable classes as "teacher_top5": [{"label", "class_name", "probability"}].

    Args:
        bank: image bank.
        folder: folder to write, new or empty.
        names: class names in label order, or None.
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
    """Yields the teacher's five most probable classes, as (class, probability), for each of images (N, 3, H, W) uint8."""
    device = next(teacher.parameters()).device
    for start in range(0, len(images), BATCH):
        logits = teacher(images[start : start + BATCH].to(device).float() / 255).float()
        top = logits.softmax(dim=1).topk(min(5, logits.shape[1]), dim=1)
        for classes, probabilities in zip(top.indices.tolist(), top.values.tolist()):
            yield list(zip(classes, probabilities))


def save_png(image: torch.Tensor, file: Path) -> None:
    """Writes an image (3, H, W) uint8 as a PNG file and makes its folder if needed."""
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


def export(args: argparse.Namespace) -> None:
    """Runs the command ``export``.

    Raises:
        UserError: flags do not fit together, or the bank, dataset or teacher is missing or does not fit.
    """
    bank = open_bank(find_bank(args.bank))
    only_for(args, "npy", dtype="float32", shard_mb=256)
    only_for(args, "npy or imagefolder", teacher=None, teacher_ckpt=None, teacher_mean=None, teacher_std=None)
    if args.teacher_ckpt and not args.teacher:
        raise UserError("--teacher_ckpt is given without --teacher; give its network with --teacher")
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
    """Raises a UserError if one of these flags is not at its default although ``--format`` does not use it.

    Args:
        args: parsed command line.
        formats: the formats that use the flags, as "npy or imagefolder".
        defaults: default value of each flag.
    """
    given = [name for name, default in defaults.items() if getattr(args, name) != default]
    if given and args.format not in formats.split(" or "):
        raise UserError(f"--{given[0]} is only for --format {formats}; leave it out")


def describe(args: argparse.Namespace, bank: ImageBank) -> DatasetInfo:
    """The dataset of the bank: that of the flags, else of the run that contains the bank, else the one in its manifest."""
    manifest, run = bank.manifest, bank.path.absolute().parent
    flags = {"dataset": manifest.dataset, "data_root": "data"}
    if not args.dataset and (run / "args.json").exists():
        flags |= flags_of(run, DATASET_FLAGS | {"no_test?": bool})
    given = {"dataset": args.dataset, "data_root": args.data_root}
    flags |= {name: value for name, value in given.items() if value} | {"image_size": manifest.image_size}
    unseen = bool(flags.get("no_test"))
    info = dataset_info(DATASETS, *dataset_flags(flags), manifest.num_classes if unseen else None, unseen)
    if info.num_classes != manifest.num_classes:
        raise UserError(
            f"{bank.path} has {manifest.num_classes} classes, {info.name} in {flags['data_root']} has {info.num_classes}; "
            "give the --dataset and --data_root of the run that made the bank"
        )
    return info


def names_only(args: argparse.Namespace, bank: ImageBank) -> DatasetInfo | None:
    """The dataset that the bank's manifest names, or None if it is not known here and class names are left out."""
    try:
        return describe(args, bank)
    except UserError as error:
        print(f"class names are left out: {error}")
        return None


def teacher_of(args: argparse.Namespace, bank: ImageBank, info: DatasetInfo | None):
    """Loads the teacher that the flags name; None without ``--teacher``.

    Raises:
        UserError: the bank was made with another teacher.
    """
    if not args.teacher:
        return None
    device = choose_device(args.gpu)
    teacher = load_teacher(MODELS, args.teacher, info, device, args.teacher_ckpt, args.teacher_mean, args.teacher_std)
    found, wanted = weights_digest(teacher.network.state_dict()), bank.manifest.teacher_digest
    if wanted and found != wanted:
        raise UserError(
            f"{bank.path} was made with the teacher {bank.manifest.teacher} (weights {wanted}), but --teacher is "
            f"{args.teacher} (weights {found}); give the teacher of the bank"
        )
    return teacher


def normalization_of(args: argparse.Namespace, bank: ImageBank) -> tuple:
    """(mean, std) of --teacher_mean and --teacher_std, else of the checkpoint of --teacher, else of the dataset."""
    if args.teacher:
        chosen = teacher_of(args, bank, describe(args, bank)).normalization
        return chosen.mean, chosen.std
    info = None if args.teacher_mean and args.teacher_std else describe(args, bank)
    chosen = choose_normalization(info, args.teacher_mean, args.teacher_std, prefix="--teacher_")
    return chosen.mean, chosen.std


def main() -> None:
    """Runs the command line of this module: export or import."""
    parser = Parser(prog="python -m datafree.bank", description="Exports image banks to files, and imports them.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a bank as class folders of PNG files, arrays, or images with metadata")
    out.add_argument("bank", type=Path, help="folder of the image bank, or of the run that has it")
    out.add_argument("folder", type=Path, help="folder to write, new or empty")
    out.add_argument(
        "--format",
        choices=FORMATS,
        default="png",
        help="png: class folders of PNG files; npy: arrays; imagefolder: PNG files with metadata.jsonl [png]",
    )
    out.add_argument(
        "--dtype",
        choices=("float32", "uint8"),
        default="float32",
        help="npy: float32, normalized as the teacher's inputs (see --teacher_mean), or uint8, not normalized [float32]",
    )
    out.add_argument("--shard_mb", type=int, least=1, default=256, help="npy: largest size of a shard in MB [256]")
    out.add_argument(
        "--dataset",
        help="dataset of the bank, as in datafree_kd.py; unset: that of its run, else the one that the bank names",
    )
    out.add_argument(
        "--data_root", help="folder of the dataset; none of its images is opened; unset: that of the bank's run, else data"
    )
    out.add_argument(
        "--teacher",
        help="teacher, a network as in datafree_kd.py; npy: images are normalized for it; imagefolder: its five most "
        "probable classes are added to the metadata",
    )
    out.add_argument("--teacher_ckpt", help="checkpoint of --teacher; unset: the file that datafree_kd.py would use")
    out.add_argument(
        "--teacher_mean",
        type=numbers,
        help="r,g,b, mean of the teacher's normalization; unset: that of its checkpoint, else the dataset's",
    )
    out.add_argument(
        "--teacher_std",
        type=numbers,
        above=0,
        help="r,g,b, std of the teacher's normalization; unset: that of its checkpoint, else the dataset's",
    )
    out.add_argument(
        "--gpu",
        type=int,
        least=-1,
        help="index of the GPU that runs the teacher, -1 for the CPU; unset: GPU 0 if there is one",
    )
    into = commands.add_parser("import", help="make a bank from class folders of images, named by class number or name")
    into.add_argument("folder", type=Path, help="folder of the class folders")
    into.add_argument("bank", type=Path, help="folder of the image bank to write, new or empty")
    into.add_argument("--dataset", required=True, help="dataset whose classes the class folders are")
    into.add_argument("--data_root", default="data", help="folder of the dataset; none of its images is opened [data]")
    into.add_argument("--name", help="name of the dataset; unset: as in datafree_kd.py, whose --name it must be")
    into.add_argument("--domain", help="domain, for a dataset that has several")
    into.add_argument("--classes", help="classes of a dataset that has domains: ten (its usual subset) or all; unset: ten")
    into.add_argument(
        "--image_size", type=int, least=1, most=4096, help="size of the bank's images in px; unset: the dataset's"
    )
    into.add_argument("--shard_size", type=int, least=1, default=4096, help="images per shard [4096]")
    args = parser.parse_args()
    if args.command == "export":
        export(args)
        return
    about = args.dataset, args.data_root, args.image_size, args.domain, args.classes, args.name
    info = dataset_info(DATASETS, *about)
    require_new(args.bank)
    files, labels = class_files(args.folder, info.class_names or ())
    classes = len(labels.unique())
    if int(labels.max()) >= info.num_classes:
        last = info.num_classes - 1
        raise UserError(
            f"{args.folder} has a class {int(labels.max())}, {info.name} has the classes 0 to {last}; give another --dataset"
        )
    warn_of_cropping(str(args.folder), info.image_size, files)
    with atomic_folder(args.bank) as unfinished:  # a damaged image may be found late and would leave half a bank
        bank = ImageBank(unfinished, Manifest(info.name, info.num_classes, info.image_size))
        for round, start in enumerate(range(0, len(files), args.shard_size)):
            part = slice(start, start + args.shard_size)
            bank.append("synthesize", round, read_images(files[part], info.image_size), labels[part])
    print(f"{len(files)} images of {classes} classes, {info.image_size} px -> {args.bank}")


if __name__ == "__main__":
    run_command(main)
