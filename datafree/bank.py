"""Image banks to and from class folders.

    python -m datafree.bank export BANK FOLDER      class folders of PNG, for people and other tools
    python -m datafree.bank import FOLDER BANK --dataset cifar10
"""

import argparse
import os
import shutil
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from engine.data.bank import ImageBank, Manifest, read_manifest
from engine.data.datasets import dataset_info
from engine.data.image_files import class_files, read_images
from engine.runtime.errors import UserError, run_command
from registry import DATASETS


def export_folders(bank: ImageBank, folder: Path) -> int:
    """Writes every image as ``folder/<class id>/<position>.png``; returns how many."""
    columns = bank.read_all()
    for position, label in enumerate(tqdm(columns["labels"].tolist(), "export", unit="img")):
        file = Path(folder) / str(label) / f"{position:07d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(columns["images"][position].permute(1, 2, 0).numpy()).save(file)
    return len(columns["labels"])


def main() -> None:
    """Command line of this module: export and import."""
    parser = argparse.ArgumentParser(prog="python -m engine.data.bank", description="Image banks to and from class folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a bank as class folders of PNG")
    out.add_argument("bank", type=Path)
    out.add_argument("folder", type=Path)
    into = commands.add_parser("import", help="make a bank of class folders of images")
    into.add_argument("folder", type=Path)
    into.add_argument("bank", type=Path)
    into.add_argument("--dataset", required=True, help="the dataset whose classes the folders are")
    into.add_argument("--image_size", type=int, default=None, help="px (default: the dataset's)")
    into.add_argument("--shard_size", type=int, default=4096, help="images a shard")
    args = parser.parse_args()
    if args.command == "export":
        bank = ImageBank(args.bank, read_manifest(args.bank), create=False)
        print(f"{export_folders(bank, args.folder)} images -> {args.folder}")
        return
    info = dataset_info(DATASETS, args.dataset, image_size=args.image_size)
    if args.bank.exists():
        raise UserError(f"{args.bank} is there already; give a new folder")
    files, labels = class_files(args.folder)
    classes = int(labels.max()) + 1
    if classes > info.num_classes:
        raise UserError(f"{args.folder} has {classes} classes, {info.name} has {info.num_classes}")
    unfinished = args.bank.with_name(f"{args.bank.name}.tmp")  # whole or absent: a damaged image may come late
    shutil.rmtree(unfinished, ignore_errors=True)
    bank = ImageBank(unfinished, Manifest(info.name, info.num_classes, info.image_size))
    for round, start in enumerate(range(0, len(files), args.shard_size)):
        part = slice(start, start + args.shard_size)
        bank.append("synthesize", round, read_images(files[part], info.image_size), labels[part])
    os.replace(unfinished, args.bank)
    print(f"{len(files)} images of {classes} classes -> {args.bank}")


if __name__ == "__main__":
    run_command(main)
