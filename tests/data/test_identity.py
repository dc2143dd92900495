"""The identity of real data depends on the data, not on the folder that holds them."""

import re

import numpy as np
import pytest

from engine.data.splits import data_identity, forbid_train_split
from tests.conftest import dataset_info
from tests.data.trees import fails, write_folders, write_image, write_npz


def test_an_identity_is_of_the_data_and_not_of_their_place(tmp_path):
    """The same data under the same name elsewhere have the same identity; image files are read but not decoded."""
    write_folders(tmp_path / "a" / "pics", ["cat", "dog"])
    write_folders(tmp_path / "b" / "pics", ["cat", "dog"])
    found = [data_identity(dataset_info("folder", tmp_path / k / "pics", 8), "train", "test") for k in "ab"]
    assert found[0] == found[1]
    assert re.fullmatch(r"\(pics: 2 classes \w{12}, 8 px, 4 train images \w{12}, 4 test images \w{12}\)", found[0])
    (tmp_path / "a" / "pics" / "test" / "cat" / "0.png").write_bytes(b"no image")
    assert data_identity(dataset_info("folder", tmp_path / "a" / "pics", 8), "train", "test") != found[0]


def other_class(root):
    (root / "test" / "cat").rename(root / "test" / "cow")


def other_labels(root):
    (root / "test" / "cat" / "0.png").rename(root / "test" / "dog" / "7.png")


def other_pixels(root):
    write_image(root / "test" / "dog" / "1.png", (1, 2, 3))


def one_more(root):
    write_image(root / "test" / "dog" / "2.png", (1, 2, 3))


@pytest.mark.parametrize("change", [other_class, other_labels, other_pixels, one_more])
def test_other_data_have_another_identity(change, tmp_path):
    write_folders(tmp_path, ["cat", "dog"], ["test"])
    before = dataset_info("folder", tmp_path)
    made, measured = data_identity(before), data_identity(before, "test")
    change(tmp_path)
    after = dataset_info("folder", tmp_path)
    assert data_identity(after, "test") != measured
    assert (data_identity(after) == made) == (change is not other_class), "images that are made depend on no real image"


def test_arrays_have_an_identity_by_labels_and_pixels(tmp_path):
    arrays = write_npz(tmp_path, "foo")
    first = data_identity(dataset_info("foo", tmp_path), "test")
    np.savez_compressed(tmp_path / "foo.npz", **arrays)
    assert data_identity(dataset_info("foo", tmp_path), "test") == first, "whatever the archive's own bytes"
    arrays["x_test"][3, 0, 0] ^= 1
    np.savez(tmp_path / "foo.npz", **arrays)
    assert data_identity(dataset_info("foo", tmp_path), "test") != first
    assert data_identity(dataset_info("foo", tmp_path, image_size=4)) != data_identity(dataset_info("foo", tmp_path))


def test_a_data_free_run_cannot_ask_for_the_train_splits_identity():
    info = dataset_info("digits")
    forbid_train_split()
    assert "602 test images" in data_identity(info, "test")
    with fails("data-free"):
        data_identity(info, "train")
