"""Image banks to and from class folders.

    python -m datafree.bank export RUN FOLDER       class folders of PNG, for people and other tools
    python -m datafree.bank import FOLDER BANK --dataset cifar10
"""

from pathlib import Path

from PIL import Image
from tqdm import tqdm

from engine.data.bank import ImageBank, Manifest, find_bank, read_manifest
from engine.data.datasets import dataset_info
from engine.data.image_files import class_files, read_images, tell_of_cropping
from engine.runtime.errors import UserError, run_command
from engine.runtime.files import atomic_folder, require_new
from engine.runtime.flags import Parser
from registry import DATASETS


def export_folders(bank: ImageBank, folder: Path) -> int:
    """Writes every image as ``folder/<class id>/<position>.png``, the folder new or empty; returns how many."""
    columns = bank.read_all()
    with atomic_folder(folder) as unfinished:
        for position, label in enumerate(tqdm(columns["labels"].tolist(), "export", unit="img")):
            file = unfinished / str(label) / f"{position:07d}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(columns["images"][position].permute(1, 2, 0).numpy()).save(file)
    return len(columns["labels"])


def main() -> None:
    """Command line of this module: export and import."""
    parser = Parser(prog="python -m datafree.bank", description="Image banks to and from class folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a bank as class folders of PNG")
    out.add_argument("bank", type=Path, help="a bank, or the run folder whose bank it is")
    out.add_argument("folder", type=Path, help="new or empty")
    into = commands.add_parser("import", help="make a bank of class folders of images, named by class number or name")
    into.add_argument("folder", type=Path)
    into.add_argument("bank", type=Path, help="new or empty")
    into.add_argument("--dataset", required=True, help="the dataset whose classes the folders are")
    into.add_argument("--data_root", default="data", help="folder of its data, of which no image is opened [data]")
    into.add_argument("--domain", default=None, help="of a dataset that has several")
    into.add_argument("--classes", default=None, help="of such a dataset: ten or all; unset: ten")
    into.add_argument("--image_size", type=int, default=None, help="px; unset: the dataset's")
    into.add_argument("--shard_size", type=int, default=4096, help="images a shard [4096]")
    args = parser.parse_args()
    if args.command == "export":
        path = find_bank(args.bank)
        bank = ImageBank(path, read_manifest(path), create=False)
        print(f"{export_folders(bank, args.folder)} images -> {args.folder}")
        return
    if args.shard_size < 1:
        raise UserError(f"--shard_size {args.shard_size} found, a whole number from 1 on wanted")
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
