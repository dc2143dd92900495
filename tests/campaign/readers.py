"""All readers of files, each with undamaged files, the patterns of those to change, and a function that reads them."""

import contextlib
import functools
import io
import math
import os
import pickle
import random
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import datafree_kd
import engine.loops.distill
import engine.loops.train
import train_scratch
from datafree.diffusion import patch_unet
from engine import report
from engine.data import splits
from engine.data.image_bank import open_bank
from engine.data.pictures import decode_image
from engine.networks.build import matching_models
from engine.networks.trained import open_trained
from engine.runtime.errors import resolve
from engine.runtime.run import Run, commit, earlier_value, read_lines, versions
from engine.runtime.stage_record import StageRecord
from engine.runtime.tensors import load_checkpoint, weights_digest
from registry import DATASETS, METHODS, MODELS
from tests.campaign.mutators import mutate
from tests.campaign.sandbox import ACCEPTED, EQUAL, Silent
from tests.conftest import CPU, TINY, TINY_TASK, build_network, dataset_info, load_teacher
from tests.data.trees import write_folders, write_npz


class Reader(NamedTuple):
    """One way to read files.

    folder: folder of undamaged files.
    files: patterns of the files to change.
    read: function (changed copy of the folder) -> what was read.
    expected: shards and weights that reading must give; None: it must give finite numbers.
    many: number of inputs for one process; fewer if reading takes long.
    """

    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    expected: Any = None
    many: int = 120


def is_finite(value: Any) -> bool:
    """Whether all numbers in a nested value are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def command(module: Any, words: str) -> None:
    """Runs an entry point in this process."""
    splits._train_split_forbidden = False
    with patch.object(sys, "argv", [f"{module.__name__}.py", *words.split()]):
        module.main()


def end_of(folder: Path) -> tuple[dict[str, bytes], str]:
    """The shards of a finished run, and the digest of its student."""
    shards = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}
    return shards, weights_digest(load_checkpoint(folder / "student.pth")["state_dict"])


def flags_of(method: str, teacher: Path, folder: Path) -> str:
    return f"--method {method} {TINY_TASK} --teacher_ckpt {teacher} {TINY[method]} --save_dir {folder}"


class Stop(BaseException):
    """Ends a run in place of a kill."""


@contextlib.contextmanager
def stopped_at(module: Any, number: int):
    """Context that ends a run after its ``number``-th checkpoint."""
    save, saved = module.save_checkpoint, []

    def counting(*arguments):
        save(*arguments)
        saved.append(1)
        if len(saved) == number:
            raise Stop

    with patch.object(module, "save_checkpoint", counting), contextlib.suppress(Stop):
        yield


def make_teacher(folder: Path) -> Path:
    """Writes random weights of a resnet8 as .pth and .safetensors; returns the path of the .pth file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    state = build_network("resnet8", 10).state_dict()
    torch.save({"state_dict": state, "arch": "resnet8", "mean": [0.5] * 3, "std": [0.5] * 3}, folder / "teacher.pth")
    save_file(state, folder / "teacher.safetensors")
    return folder / "teacher.pth"


def read_teacher(file: Path) -> Any:
    teacher = load_teacher("resnet8", dataset_info("digits"), CPU, str(file))
    teacher(torch.rand(2, 3, 16, 16))
    return teacher.network.state_dict(), list(teacher.normalization.mean)


def read_any(file: Path) -> Any:
    model = open_trained(MODELS, str(file), dataset_info("digits"))
    return model.network.state_dict(), model.about


def read_bank(folder: Path) -> Any:
    columns = open_bank(folder).read("synthesize")
    return columns["images"][:], columns["labels"]


def read_run(folder: Path) -> Any:
    earlier_value(folder, "amp")
    run = Run(folder, {})
    run.close()
    StageRecord(folder / "stages.json", {"synthesize": {}}).fact("synthesize", "images")
    return read_lines(folder / "metrics.jsonl"), read_lines(folder / "times.jsonl")


def read_data(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        splits._train_split_forbidden = False
        info = dataset_info(name, folder, 8)
        return splits.load_split(info, "test", CPU, workers=0).images, splits.load_split(
            info, "train", CPU, workers=0
        ).labels

    return read


def read_prior(file: Path) -> Any:
    network, about = patch_unet.load_patch_prior(file)
    size = about["image_size"]
    if size <= 64:
        network(torch.zeros(1, 3, size, size), torch.ones(1), torch.zeros(1, dtype=torch.long))
    return network.state_dict()


def write_report(folder: Path) -> Any:
    arguments = report.parse([str(folder), "--wide", "--rounds"])
    return report.table(arguments)


def write_page(folder: Path) -> Any:
    from engine.report.page import contents

    return str(contents(report.group(report.collect([folder]))))


def go_on(method: str, teacher: Path) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        command(datafree_kd, flags_of(method, teacher, folder))
        return end_of(folder)

    return read


def go_on_training(folder: Path) -> Any:
    command(train_scratch, f"{SCRATCH} --save_dir {folder} --output {folder}/out/weights.pth")
    return weights_digest(load_checkpoint(folder / "out/weights.pth")["state_dict"])


SCRATCH = "--model resnet8 --dataset digits --epochs 3 --batch_size 256 --gpu -1 --amp no"


def build(root: Path, teacher: Path, slow: bool = True) -> dict[str, Reader]:
    """Builds all readers, by name, and writes their files below ``root``.

    Args:
        teacher: checkpoint that ``make_teacher`` wrote.
        slow: whether to build the readers that are whole commands too.
    """
    readers = {
        "teacher": Reader(teacher.parent, ("teacher.pth",), lambda folder: read_teacher(folder / "teacher.pth"), many=40),
        "teacher, safetensors": Reader(
            teacher.parent, ("teacher.safetensors",), lambda folder: read_teacher(folder / "teacher.safetensors"), many=40
        ),
    }
    whole = root / "csd"
    command(datafree_kd, flags_of("csd", teacher, whole))
    prior = root / "prior"
    prior.mkdir()
    about = {"num_classes": 10, "image_size": 16, "patch": 2, "channels": (8, 16), "attention": True}
    network = patch_unet.PatchUNet(*about.values())
    patch_unet.save_patch_prior(
        prior / "prior.safetensors", network, about | {"class_names": list("0123456789"), "name": "small"}
    )
    data = root / "data"
    data.mkdir()
    write_npz(data, "mine", classes=np.array(["a", "b", "c"]))
    pictures = root / "pictures"
    pictures.mkdir()
    for mode in ("RGB", "P", "L", "RGBA", "I;16"):
        Image.new(mode, (9, 7), 3).save(pictures / f"{mode.replace(';', '')}.png")
    write_folders(root / "tree", ("a", "b"))
    domains = root / "domainnet"
    write_folders(domains / "domainnet" / "sketch", ("zebra", "aircraft_carrier"), splits=("x",))
    numbers = list(DATASETS["domainnet"]["ten"].values())
    for split in ("train", "test"):
        (domains / "domainnet" / f"sketch_{split}.txt").write_text(
            "".join(f"sketch/x/{name}/0.png {number}\n" for name, number in zip(("zebra", "aircraft_carrier"), numbers))
        )
    lines = root / "lines"
    lines.mkdir()
    report.write_lines(lines / "results.jsonl", report.collect([whole]))
    exported = root / "exported"
    with patch.object(sys, "argv", ["export", str(whole), str(exported)]):
        from engine import export

        export.main()
    readers |= {
        "student": Reader(whole, ("student.pth",), lambda folder: read_any(folder / "student.pth"), many=40),
        "bank": Reader(whole / "bank", ("manifest.json", "*.safetensors", "sha256.txt"), read_bank),
        "run folder": Reader(whole, ("stages.json", "args.json", "metrics.jsonl", "times.jsonl"), read_run),
        "report": Reader(whole, ("result.json", "metrics.jsonl"), write_report),
        "result lines": Reader(lines, ("results.jsonl",), lambda folder: write_report(folder / "results.jsonl")),
        "prior": Reader(prior, ("prior.safetensors",), lambda folder: read_prior(folder / "prior.safetensors"), many=40),
        "npz": Reader(data, ("mine.npz",), read_data("mine")),
        "images": Reader(
            pictures, ("*.png",), lambda folder: [decode_image(file, 8) for file in sorted(folder.glob("*.png"))]
        ),
        "tree": Reader(root / "tree", ("test/a/*.png", "train/b/*.png"), read_data("folder")),
        "list": Reader(domains, ("domainnet/*.txt",), read_data("domainnet_sketch")),
        "exported folder": Reader(
            exported, ("config.json", "model.safetensors"), lambda folder: read_any(Path(f"local-dir:{folder}")), many=40
        ),
    }
    if not slow:
        return readers
    readers["page"] = Reader(
        whole, ("result.json", "confusion.json", "metrics.jsonl", "args.json", "bank/*.safetensors"), write_page, many=1
    )
    kept = ("bank/*", "variants/*", "*.json", "*.pth", "*.jsonl", "*.safetensors", "sha256.txt")
    for method, number in (("dda", 1), ("fast", 1), ("cmi", 1), ("dafl", 1)):
        end, broken = root / f"{method}_whole", root / method
        command(datafree_kd, flags_of(method, teacher, end))
        with stopped_at(engine.loops.distill, number):
            command(datafree_kd, flags_of(method, teacher, broken))
        readers[f"{method}, going on"] = Reader(broken, kept, go_on(method, teacher), end_of(end), 1)
    readers["csd, done"] = Reader(whole, kept, go_on("csd", teacher), end_of(whole), 1)
    for folder, number in (("scratch_whole", 99), ("scratch", 2)):
        with stopped_at(engine.loops.train, number):
            go_on_training(root / folder)
    digest = weights_digest(load_checkpoint(root / "scratch_whole/out/weights.pth")["state_dict"])
    readers["train_scratch, going on"] = Reader(root / "scratch", kept, go_on_training, digest, 1)
    return readers


def warm(files: bool) -> None:
    """Imports modules and fills caches, so that the forked processes need not do it again.

    Args:
        files: whether to import what only readers of files need too.
    """
    import diffusers.models.unets.unet_2d  # noqa: F401
    import sklearn.datasets
    import torch.utils.tensorboard  # noqa: F401

    for place in METHODS.values():
        resolve(place)
    versions(), commit()
    sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)
    splits.load_split(dataset_info("digits"), "test", CPU)
    if files:
        import matplotlib.backends.backend_svg  # noqa: F401
        import timm  # noqa: F401

        import engine.report.page  # noqa: F401

        matching_models(MODELS, {}, 10), Image.init()


def changed_file(reader: Reader, folder: Path, seed: int) -> Callable[[], str]:
    """Returns an input: a function that changes one file in a copy of a reader's files and reads the copy."""

    def call() -> str:
        draw = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        assert reader.folder.is_dir()  # otherwise each input would end in an error of one line
        shutil.copytree(reader.folder, folder, ignore=shutil.ignore_patterns("events.*", "pictures"))
        files = sorted({file for pattern in reader.files for file in folder.glob(pattern) if file.is_file()})
        file = draw.choice(files)
        listed = draw.random() < 0.5 or file.name == "sha256.txt"
        if not listed:  # like a run of an earlier version: only the structure is checked
            for found in folder.rglob("sha256.txt"):
                found.unlink()
        how = mutate(file, draw) if draw.random() > 0.03 else file.unlink() or "deleted"
        found = reader.read(folder)
        if reader.expected is None:
            if not is_finite(found):
                raise Silent(f"{file.name}, {how}: NaN or infinity was accepted")
            return ACCEPTED
        if found == reader.expected:
            return EQUAL
        if not listed and how != "deleted":
            return ACCEPTED
        raise Silent(f"{file.relative_to(folder)}, {how}: taken, and the end is another")

    return call


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def hostile(folder: Path, canary: Path) -> list[tuple[str, Callable[[], str]]]:
    """Inputs with files and flags that would make ``canary`` if any of their code ran."""
    folder.mkdir()
    payload = Payload(canary)
    found: list[tuple[str, Callable[[], str]]] = []
    readers = {"teacher": read_teacher, "student": read_any, "checkpoint": load_checkpoint}
    raw = {
        "pickle": pickle.dumps(payload),
        "pickle in a dict": pickle.dumps({"state_dict": payload}),
        "text pickle": f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode(),
        "builtins": f"c__builtin__\neval\n(S'open({str(canary)!r},\"w\")'\ntR.".encode(),
    }
    for name, data in raw.items():
        (folder / f"{name}.pth").write_bytes(data)
        with zipfile.ZipFile(folder / f"zip of {name}.pth", "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    for legacy in (True, False):
        torch.save(
            {"state_dict": payload, "a": payload}, folder / f"saved {legacy}.pth", _use_new_zipfile_serialization=legacy
        )
    torch.save(
        {"state_dict": build_network("resnet8", 10).state_dict(), "arch": "os:system", "num_classes": 10},
        folder / "arch.pth",
    )
    code = folder / "net.py"
    code.write_text(f"open({str(canary)!r}, 'w')\n")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "arch": f"{code}:net", "num_classes": 10}, folder / "file.pth")
    for file in sorted(folder.glob("*.pth")):
        found += [(f"{name} of {file.name}", lambda r=read, f=file: r(f) and ACCEPTED) for name, read in readers.items()]
    buffer = io.BytesIO()
    np.save(buffer, np.array([payload], dtype=object), allow_pickle=True)
    for key in ("x_test", "y_test", "classes"):
        (root := folder / f"npz {key}").mkdir()
        write_npz(root, "mine")
        with zipfile.ZipFile(root / "mine.npz", "a") as archive, warnings.catch_warnings(action="ignore"):  # a repeated name
            archive.writestr(f"{key}.npy", buffer.getvalue())
        found.append((f"npz {key}", lambda r=root: read_data("mine")(r) and ACCEPTED))
    specs = (
        f"resnet8(num_classes=open('{canary}','w'))",
        f"os:open(path='{canary}',flags=65)",
        f"builtins:open(file='{canary}',mode='w')()",
        f"resnet8(**[open('{canary}','w')])",
        f"local-dir:$(touch {canary})",
        f"resnet8;touch {canary}",
        f"torch:load(f='{folder}/pickle.pth')",
    )
    for spec in specs[:1] + specs[3:]:  # without factories, which a flag may name and which are run
        found.append(
            (f"--teacher {spec[:20]}", lambda s=spec: load_teacher(s, dataset_info("digits"), CPU, os.devnull) and ACCEPTED)
        )
    for spec in ("os:system", f"{code}:net", "resnet8(depth=open('x','w'))"):
        (root := folder / f"exported {len(found)}").mkdir()
        (root / "config.json").write_text(
            f'{{"architecture": "{spec}", "library_name": "datafree_kd", "num_classes": 10, "input_size": [3, 16, 16], "mean": [0,0,0], '
            f'"std": [1,1,1], "model_args": {{"command": "touch {canary}"}}}}'
        )
        found.append((f"exported {spec[:20]}", lambda r=root: read_any(Path(f"local-dir:{r}")) and ACCEPTED))
    return found
