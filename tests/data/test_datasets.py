"""Real data: a tiny dataset in every layout, exact batches, the forbidden train split, and one line for every mistake."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from registry import DATASETS
from tests.conftest import ROOT, dataset_info
from tests.data.trees import fails, load, write_folders, write_image, write_npz

SHARED = ROOT.parent / "shared"


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"folder", "domainnet"}))
def test_every_row_describes_its_dataset_without_data(name, tmp_path):
    info = dataset_info(name, tmp_path)
    row = DATASETS[name]
    assert (info.name, info.num_classes, info.image_size) == (name, row["num_classes"], row["size"])
    assert info.class_names is None or len(set(info.class_names)) in (
        info.num_classes,
        998,
    )  # ImageNet has two cranes and two maillots
    assert len(info.mean) == len(info.std) == 3 and info.flip is row["flip"]
    assert not list(tmp_path.iterdir())


def test_class_names():
    assert dataset_info("cifar10").class_names[0::9] == ("airplane", "truck")
    names = dataset_info("cifar100").class_names
    assert len(names) == 100 and list(names) == sorted(names) and names[8] == "bicycle" and names[99] == "worm"
    assert dataset_info("imagenet").class_names[0] == "tench"


def test_padding_scales_with_the_image_size():
    assert dataset_info("cifar10").crop_padding == 4
    assert dataset_info("cifar10", image_size=64).crop_padding == 8


def test_unknown_names_list_the_known(tmp_path):
    with fails("unknown dataset 'cifer10'", "cifar10", "cifer10.npz"):
        dataset_info("cifer10", tmp_path)
    with fails("no domains", "--domain"):
        dataset_info("cifar10", tmp_path, domain="sketch")


def test_an_archive_comes_before_the_download(tmp_path):
    arrays = write_npz(tmp_path, "cifar10", (6, 32, 32, 3), [[0], [1], [2], [0], [1], [9]])  # Keras's (N, 1) labels
    info = dataset_info("cifar10", tmp_path)
    assert info.class_names[0] == "airplane" and info.mean == DATASETS["cifar10"]["mean"]
    for split in ("train", "test"):
        loaded = load(info, split)
        assert np.array_equal(loaded.images.permute(0, 2, 3, 1), arrays[f"x_{split}"])
        assert loaded.labels.tolist() == [0, 1, 2, 0, 1, 9] and loaded.num_classes == 10


@pytest.mark.parametrize("name, shape", [("svhn", (6, 32, 32, 3)), ("mnist", (6, 28, 28)), ("mnist", (6, 28, 28, 1))])
def test_archives_of_registered_names(name, shape, tmp_path):
    write_npz(tmp_path, name, shape)
    split = load(dataset_info(name, tmp_path))
    assert split.images.shape == (6, 3, 32, 32)
    assert name == "svhn" or torch.equal(split.images[:, 0], split.images[:, 2])


def test_an_unregistered_archive_is_a_dataset(tmp_path):
    write_npz(tmp_path, "foo", (6, 8, 12, 3))
    info = dataset_info("foo", tmp_path)
    assert (info.num_classes, info.image_size, info.crop_padding, info.class_names) == (3, 8, 1, None)
    assert info.mean == info.std == (0.5, 0.5, 0.5)
    assert load(info).images.shape == (6, 3, 8, 8)  # the centre of 8 x 12
    write_npz(tmp_path, "named", classes=np.array(["a", "b", "c", "d"]))
    assert dataset_info("named", tmp_path).class_names == ("a", "b", "c", "d")
    assert dataset_info("named", tmp_path).num_classes == 4
    assert load(dataset_info("named", tmp_path, image_size=4)).images.shape == (6, 3, 4, 4)
    write_npz(tmp_path, "latin", classes=np.array([b"\xe9", b"b", b"c"]))
    assert dataset_info("latin", tmp_path).class_names == ("\ufffd", "b", "c")
    write_npz(tmp_path, "empty", classes=np.array([]))
    assert dataset_info("empty", tmp_path).num_classes == 3
    write_npz(tmp_path, "empty", classes=np.array([]), y_test=np.zeros(0, int))
    with fails("number of classes is unknown"):
        dataset_info("empty", tmp_path)
    write_npz(tmp_path, "count", classes=np.int64(10))
    with fails("classes has shape", "one name per class"):
        dataset_info("count", tmp_path)


def test_describing_and_testing_never_open_the_train_arrays(tmp_path):
    whole = write_npz(tmp_path, "foo")
    np.savez(tmp_path / "foo.npz", **{key: whole[key] for key in ("x_test", "y_test")})
    info = dataset_info("foo", tmp_path)
    assert len(load(info)) == 6
    with fails("foo.npz", "has no array x_train"):
        load(info, "train")


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"y_test": np.array([0, 1, 2, 0, 1, 10])}, ["cifar10.npz", "labels lie in 0..10", "0..9"]),
        ({"y_test": np.array([0, 1, -2, 0, 1, 1])}, ["cifar10.npz", "-2..1"]),
        ({"y_test": np.zeros(5, int)}, ["6 test images", "5 labels"]),
        ({"y_test": np.zeros(6)}, ["y_test is float64", "integers"]),
        ({"y_test": np.zeros((6, 10), int)}, ["y_test", "6, 10"]),
        ({"x_test": np.zeros((6, 8, 8, 3), np.float32)}, ["x_test is float32", "uint8"]),
        ({"x_test": np.zeros((6, 3, 8, 8), np.uint8)}, ["6, 3, 8, 8", r"\(N, H, W, 3\)"]),
        ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)}, ["no test images"]),
        ({"x_test": np.array([object()] * 6)}, ["cifar10.npz", "never loaded"]),
    ],
)
def test_wrong_archives(arrays, words, tmp_path):
    write_npz(tmp_path, "cifar10", **arrays)
    with fails(*words):
        load(dataset_info("cifar10", tmp_path))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"half", b"encrypted"])
def test_damaged_archives(content, tmp_path):
    write_npz(tmp_path, "foo")
    path = tmp_path / "foo.npz"
    whole = path.read_bytes()
    said = re.sub(rb"(PK\x01\x02....)\x00", lambda found: found[1] + b"\x01", whole, flags=re.DOTALL)  # in the directory
    path.write_bytes({b"half": whole[:900], b"encrypted": said}.get(content, content))
    assert path.read_bytes() != whole
    with fails("foo.npz cannot be read", "give a complete .npz"):
        dataset_info("foo", tmp_path)


def test_a_flipped_byte_in_an_archive(tmp_path):
    write_npz(tmp_path, "foo")
    info = dataset_info("foo", tmp_path)
    path = tmp_path / "foo.npz"
    content = bytearray(path.read_bytes())
    position = content.index(b"x_test.npy") + 400
    content[position] ^= 255
    path.write_bytes(content)
    with fails("foo.npz cannot be read", "CRC"):
        load(info)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist"])
def test_without_network_the_line_says_what_to_put_where(name, tmp_path, monkeypatch):
    from urllib.error import URLError

    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with fails(f"{name} is not complete", "cannot be downloaded", f"{name}.npz", DATASETS[name]["source"]):
        load(dataset_info(name, tmp_path))


def test_numeric_class_folders_are_sorted_by_value(tmp_path):
    names = [str(i) for i in range(12)]
    write_folders(tmp_path, names)
    info = dataset_info("folder", tmp_path, image_size=8)
    assert info.num_classes == 12 and info.class_names == tuple(names)
    for split in ("train", "test"):
        loaded = load(info, split)
        assert loaded.labels.tolist() == [i for i in range(12) for _ in range(2)]
        assert torch.equal(loaded.images[:, 0, 0, 0].long(), 10 * loaded.labels)


def test_class_folders_with_val_other_sizes_and_other_files(tmp_path):
    write_folders(tmp_path, ["b", "c"], ("train", "val"))
    write_image(tmp_path / "val" / "b" / "deep" / "wide.jpg", (0, 0, 0), (40, 20))
    Image.new("L", (9, 30), 200).save(tmp_path / "val" / "c" / "grey.png")
    (tmp_path / "val" / "c" / "notes.txt").write_text("not an image")
    (tmp_path / "val" / ".cache").mkdir()
    info = dataset_info("folder", tmp_path)
    assert info.class_names == ("b", "c") and info.image_size == 64
    split = load(info)
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1] and split.images.shape == (6, 3, 64, 64)
    assert (split.images[5] == 200).all()


def test_wrong_folders(tmp_path):
    with fails("no test images", "<class>", "--data_root"):
        dataset_info("folder", tmp_path)
    with fails(f"{tmp_path}/nowhere does not exist", "<class>", "--data_root"):
        dataset_info("folder", tmp_path / "nowhere")
    write_folders(tmp_path, ["a"])
    with fails("test has one class folder, 'a'", "two wanted"):
        dataset_info("folder", tmp_path)
    write_folders(tmp_path, ["a", "b"])
    with fails("train is itself a split: give its parent"):
        dataset_info("folder", tmp_path / "train")
    with fails(f"give --dataset folder --data_root {tmp_path}"):
        dataset_info(str(tmp_path))
    info = dataset_info("folder", tmp_path)
    (tmp_path / "train" / "b").rename(tmp_path / "train" / "B")
    with fails("train and the test split have different class folders", "'B'", "make an empty one"):
        load(info, "train")
    write_folders(tmp_path, ["a", "b", "c"], ["train"])
    with fails("train and the test split have different class folders", "'B', 'c'"):
        load(info, "train")
    with fails("imagenet does not exist", "val"):
        load(dataset_info("imagenet", tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(workers, tmp_path):
    write_folders(tmp_path, ["a", "b"])
    path = tmp_path / "test" / "b" / "1.png"
    write_image(path, (1, 2, 3), (64, 64))
    path.write_bytes(path.read_bytes()[:60])
    with fails("1.png cannot be decoded", "replace or remove it"):
        load(dataset_info("folder", tmp_path), workers=workers)


def test_imagenet_crops_the_centre_of_256(tmp_path):
    write_image(tmp_path / "imagenet" / "val" / "n01" / "a.jpg", (255, 255, 255), (512, 256))
    info = replace(dataset_info("imagenet", tmp_path), num_classes=1)
    assert info.crop_fraction == 0.875 and (load(info).images > 250).all()


def test_class_folders_of_the_shared_sketches():
    root = SHARED / "data" / "pacs_sketch"
    if not root.is_dir():
        pytest.skip("the shared folder beside the repository is not here")
    info = dataset_info("folder", root, image_size=32)
    assert info.num_classes == 7 and info.class_names[0] == "dog" and info.class_names[-1] == "person"
    split = load(info)
    assert len(split.labels.unique()) == 7 and split.images.float().std() > 10


def write_tiny(root, count=200):
    wnids = [f"n{i:08d}" for i in range(count)]
    for label, wnid in enumerate(wnids):
        write_image(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", (label, label, label))
        write_image(root / "val" / "images" / f"val_{count - label}.JPEG", (label, label, label))
    lines = [f"val_{count - label}.JPEG\t{wnid}\t0\t0\t63\t63" for label, wnid in enumerate(wnids)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(reversed(lines)) + "\n")
    (root / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
    (root / "words.txt").write_text("\n".join(f"{wnid}\tword {i}, synonym" for i, wnid in enumerate(wnids)) + "\n")


def test_tiny_imagenet_as_published_and_as_class_folders(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    write_tiny(root)
    info = dataset_info("tiny_imagenet", tmp_path, image_size=8)
    assert info.class_names[:2] == ("word 0", "word 1") and info.num_classes == 200
    for split in ("train", "test"):
        loaded = load(info, split)
        assert sorted(loaded.labels.tolist()) == list(range(200))
        assert (loaded.images[:, 0, 0, 0].long() - loaded.labels).abs().max() <= 2  # JPEG
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG n00000000\n")
    with fails("val_annotations.txt:1", "a tab"):
        load(info)
    (root / "val" / "val_annotations.txt").write_text("val_1.JPEG\tn00000000\n")
    with fails("val_annotations.txt has 1 classes, tiny_imagenet has 200"):
        load(info)
    (root / "val").rename(root / "published")
    (root / "train").rename(root / "val")
    assert load(info).labels.tolist() == list(range(200))


def write_domainnet(root, domain="sketch"):
    root = root / "domainnet"
    numbers = {"airplane": 1, "axe": 11, "bracelet": 39, "ambulance": 4}
    for split in ("train", "test"):
        lines = []
        for name, number in numbers.items():
            write_image(root / domain / name / f"{split} 1.png", (number, 0, 0))
            lines.append(f"{domain}/{name}/{split} 1.png {number}")
        (root / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n\n")


def test_domainnet_takes_ten_classes_or_all(tmp_path):
    write_domainnet(tmp_path)
    ten = dataset_info("domainnet", tmp_path, image_size=8, domain="sketch")
    assert ten == dataset_info("domainnet_sketch", tmp_path, image_size=8)
    assert (ten.name, ten.num_classes, ten.class_names[2]) == ("domainnet_sketch", 10, "axe")
    for split in ("train", "test"):
        loaded = load(ten, split)
        assert loaded.labels.tolist() == [0, 2, 9] and loaded.images[:, 0, 0, 0].tolist() == [1, 11, 39]
    everything = dataset_info("domainnet", tmp_path, domain="sketch", classes="all")
    assert everything.num_classes == 345 and everything.class_names[4] == "ambulance" and everything.image_size == 224
    assert load(everything).labels.tolist() == [1, 11, 39, 4]


def test_wrong_domainnet(tmp_path):
    with fails("--domain is missing", "clipart, infograph"):
        dataset_info("domainnet", tmp_path)
    with fails("unknown --domain 'scetch'", "sketch"):
        dataset_info("domainnet", tmp_path, domain="scetch")
    with fails("--classes five"):
        dataset_info("domainnet", tmp_path, domain="sketch", classes="five")
    info = dataset_info("domainnet", tmp_path, domain="sketch")
    with fails("sketch_test.txt does not exist", "path label"):
        load(info)
    write_domainnet(tmp_path)
    listing = tmp_path / "domainnet" / "sketch_test.txt"
    listing.write_text(listing.read_text() + "sketch/axe/absent.png 11\n")
    with fails("absent.png does not exist"):
        load(info)
    listing.write_text("sketch/axe/1.png\n")
    with fails("sketch_test.txt:1", "path label"):
        load(info)


def test_names_of_datasets(tmp_path):
    """A folder tree has the name of its folder, an archive that of its file. --name overrides it with a free name."""
    for name in ("pics", "my pictures!", "cifar10"):
        write_folders(tmp_path / name, ["a", "b"], ["test"])
    names = [dataset_info("folder", tmp_path / name).name for name in ("pics", "my pictures!", "cifar10", "pics/../pics/")]
    assert names == ["pics", "my_pictures_", "folder_cifar10", "pics"]
    assert dataset_info("folder", tmp_path / "pics", alias="photos").name == "photos"
    assert dataset_info("folder", tmp_path / "pics", alias="folder").name == "folder"
    write_npz(tmp_path, "foo")
    named = dataset_info("foo", tmp_path, alias="bar")
    assert dataset_info("foo", tmp_path).name == "foo" and named.name == "bar" and len(load(named)) == 6
    with fails("--name cifar10 is the name of another dataset"):
        dataset_info("foo", tmp_path, alias="cifar10")
    for wrong in ("a/b", "", "-x", "a b"):
        with fails("--name", "only letters, digits"):
            dataset_info("foo", tmp_path, alias=wrong)


def test_labels_that_begin_at_one_are_refused(tmp_path):
    write_npz(tmp_path, "ones", labels=(1, 2, 3, 4, 1, 2))
    with fails("ones.npz: the test labels lie in 1..4, 0..C-1 wanted", "'classes'"):
        dataset_info("ones", tmp_path)
