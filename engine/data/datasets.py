"""Describes datasets: classes, image size and normalization, without opening an image."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.runtime.errors import UserError, lookup, resolve

# Class names in label order, used in prompts, label embeddings and tables.


DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100 = (
    "apple", "aquarium fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
    "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
    "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur",
    "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
    "lamp", "lawn mower", "leopard", "lion", "lizard", "lobster", "man", "maple tree", "motorcycle", "mountain",
    "mouse", "mushroom", "oak tree", "orange", "orchid", "otter", "palm tree", "pear", "pickup truck", "pine tree",
    "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
    "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
    "squirrel", "streetcar", "sunflower", "sweet pepper", "table", "tank", "telephone", "television", "tiger", "tractor",
    "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow tree", "wolf", "woman", "worm",
)  # fmt: skip


def imagenet(folder: Path) -> tuple[str, ...]:
    """The 1000 class names in the metadata of torchvision's weights; downloads nothing."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def tiny_imagenet(folder: Path) -> tuple[str, ...] | None:
    """First synonym of each class in ``words.txt``, sorted by WordNet id; None if the lists are missing."""
    if not ((folder / "wnids.txt").is_file() and (folder / "words.txt").is_file()):
        return None
    lines = (folder / "words.txt").read_text(errors="replace").splitlines()
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(
        words.get(wnid, wnid).split(",")[0] for wnid in sorted((folder / "wnids.txt").read_text(errors="replace").split())
    )


# Defaults for a NAME.npz that is not in the registry; everything else is read from the file.
UNREGISTERED = {
    "reader": "engine.data.readers:read_npz",
    "describe": "engine.data.readers:describe_npz",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "flip": True,
}
# Defaults for a dataset that is not in the registry and has no file; its images are never opened.
UNSEEN = {name: UNREGISTERED[name] for name in ("mean", "std", "flip")} | {"reader": ""}


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset that are known without opening an image.

    ``crop_padding`` is in pixels of ``image_size``. ``classes`` lists the names on disk of the labels 0, 1, … (folder
    names, or label numbers of a subset); it is empty if the labels are used as stored. ``crop_fraction`` is the share of the
    shorter side that the centre crop of an image file keeps. ``prompt`` is the prompt of a class for a text-to-image model;
    ``{label}`` stands for the class name. ``archive`` is the file in ``data_root`` that is preferred to any other source.
    ``size_given`` tells whether a flag chose the image size.
    """

    name: str
    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...] | None
    flip: bool
    crop_padding: int
    data_root: str
    reader: str
    source: str = ""
    archive: str = ""
    domain: str | None = None
    classes: tuple = ()
    crop_fraction: float = 1.0
    prompt: str = "a photo of a {label}"
    size_given: bool = False

    @property
    def folder(self) -> Path:
        """The folder of a dataset of image files."""
        return Path(self.data_root, self.source)

    def adapted_to_model(
        self, spec: str, config: dict[str, Any], keep_size: bool = False, weights: str = ""
    ) -> "DatasetInfo":
        """Returns the dataset with the image size and class names of a model's own configuration.

        Args:
            spec: name of the model, for error messages.
            config: num_classes, image_size and class_names of the model (None: the model has no class names).
            keep_size: whether to keep the dataset's image size, because a flag sets it.
            weights: flags that give ``train_scratch.py`` the model and its weights; unset: those for a public model.
        Raises:
            UserError: the model has another number of classes, or the same classes in another order.
        """
        names, size = config.get("class_names"), config["image_size"]
        if config["num_classes"] != self.num_classes:
            raise UserError(
                f"{spec} has {config['num_classes']} classes, {self.name} has {self.num_classes}; give a dataset with its "
                f"classes, or train a head for those of {self.name}: python train_scratch.py "
                f"{weights or f'--model {spec} --pretrained'} --dataset ..."
            )
        if names and self.class_names and set(names) == set(self.class_names) and list(names) != list(self.class_names):
            label = next(k for k, (a, b) in enumerate(zip(names, self.class_names)) if a != b)
            raise UserError(
                f"class {label} is '{names[label]}' in {spec} and '{self.class_names[label]}' in {self.name}: both have "
                "the same classes in another order; number the dataset's classes as the model does (folders 0, 1, ...; "
                "labels of an npz)"
            )
        changes: dict[str, Any] = {"class_names": tuple(names)} if names else {}
        if not keep_size:
            changes |= {"image_size": size, "crop_padding": round(self.crop_padding * size / self.image_size)}
        return replace(self, **changes)

    def for_checkpoint(self) -> dict[str, Any]:
        """Facts that a checkpoint stores so that its network can be used without this dataset; plain values."""
        return {
            "dataset": self.name,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "class_names": None if self.class_names is None else list(self.class_names),
            "mean": list(self.mean),
            "std": list(self.std),
        }


def dataset_info(
    table: dict[str, dict[str, Any]],
    name: str,
    data_root: str | Path = "data",
    image_size: int | None = None,
    domain: str | None = None,
    classes: str | None = None,
    alias: str | None = None,
    num_classes: int | None = None,
    unseen: bool = False,
) -> DatasetInfo:
    """Describes a dataset without opening an image.

    ``DATA_ROOT/NAME.npz`` is preferred to a download. It also defines a dataset whose name is not in the registry.

    Args:
        table: ``registry.DATASETS``.
        name: a name in ``table``, ``<name>_<domain>`` for a dataset with domains, or the name of an npz file.
        image_size: image size in px; None: the dataset's own.
        domain: name of the domain, for a dataset with domains.
        classes: 'ten' (default) or 'all', for a dataset with domains.
        alias: name of the dataset in checkpoints, run folders and tables; None: its own name, or that of its folder.
        num_classes: expected number of classes. With ``unseen`` and ``image_size`` it describes a dataset that is not here.
        unseen: whether no image of the dataset will be opened.
    Raises:
        UserError: unknown name, domain or classes, or a file that describes the dataset is missing.
    """
    base, _, suffix = name.rpartition("_")
    if suffix in table.get(base, {}).get("domains", ()):
        name, domain = base, suffix
    root = Path(data_root)
    has_archive = (root / f"{name}.npz").is_file()
    if unseen and name not in table and not has_archive:
        if not (num_classes and image_size):
            raise UserError(
                f"unknown dataset '{name}'; with --no_test, an unknown dataset needs --num_classes and --image_size"
            )
        row = UNSEEN | {"num_classes": num_classes, "size": image_size}
    else:
        row = _row(table, name, root, has_archive)
    if (domain or classes) and "domains" not in row:
        raise UserError(f"dataset '{name}' has no domains; leave out {'--domain' if domain else '--classes'}")
    if alias is not None and not re.fullmatch(r"\w[\w.-]*", alias):
        raise UserError(
            f"--name {alias} found, only letters, digits, '_', '-' and '.' wanted, without '-' or '.' at the beginning, "
            "because file names contain it"
        )
    if alias in table and alias != name:
        raise UserError(f"--name {alias} is the name of another dataset; give a new name")

    if "describe" in row:
        row = row | resolve(row["describe"])(row, root, name, domain, classes)
    if num_classes is not None and num_classes != row["num_classes"]:
        raise UserError(f"--num_classes {num_classes}: {name} has {row['num_classes']} classes; leave it out")
    class_names = row.get("class_names")
    if isinstance(class_names, str):
        class_names = resolve(class_names)
    if callable(class_names):
        class_names = class_names(root / row["source"])
    size = image_size or row["size"]
    own_name = row.get("name", name)
    if own_name in table and own_name != name:  # a folder that has the name of a registered dataset
        own_name = f"{name}_{own_name}"
    return DatasetInfo(
        name=alias or own_name,
        num_classes=row["num_classes"],
        image_size=size,
        mean=row["mean"],
        std=row["std"],
        class_names=class_names,
        flip=row["flip"],
        crop_padding=round(row["crop_padding"] * size / row["size"]) if "crop_padding" in row else size // 8,
        data_root=str(data_root),
        reader=row["reader"],
        source=row.get("source", ""),
        archive=f"{name}.npz",
        domain=row.get("domain"),
        classes=row.get("classes", ()),
        crop_fraction=row.get("crop_fraction", 1.0),
        prompt=row.get("prompt", DatasetInfo.prompt),
        size_given=image_size is not None,
    )


def _row(table: dict[str, dict[str, Any]], name: str, root: Path, has_archive: bool) -> dict:
    """The dataset's row of ``table``; if ``NAME.npz`` exists and the row has no describer, the row reads that file."""
    if name not in table and has_archive:
        return UNREGISTERED
    try:
        row = lookup(table, name, "dataset")
    except UserError as error:
        if Path(name).is_dir():
            raise UserError(f"--dataset {name} is a folder; give --dataset folder --data_root {name}") from None
        raise UserError(f"{error}; or put {name}.npz into {root}") from None
    return row | {"reader": UNREGISTERED["reader"]} if has_archive and "describe" not in row else row
