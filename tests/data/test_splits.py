"""Splits: exact batches from memory and from files, and the forbidden training split."""

import pytest
import torch

from engine.data import image_bank
from engine.data.splits import StreamedSplit, allow_train_split, forbid_train_split
from tests.conftest import dataset_info
from tests.data.trees import fails, load, write_folders


def test_digits_are_split_in_thirds_the_same_way_each_time():
    info = dataset_info("digits")
    train, test = load(info, "train"), load(info, "test")
    assert len(train) + len(test) == 1797 and abs(len(test) - 599) <= 5
    for split in (train, test):
        counts = split.labels.bincount()
        assert len(counts) == 10 and counts.min() > 0.94 * counts.max() - 4
        assert split.images.shape == (len(split), 3, 16, 16) and split.images.dtype == torch.uint8
    assert torch.equal(test.images, load(info, "test").images)
    both = torch.cat([train.images, test.images]).float() / 255
    assert torch.allclose(both.mean((0, 2, 3)), torch.tensor(info.mean), atol=2e-3)
    assert torch.allclose(both.std((0, 2, 3)), torch.tensor(info.std), atol=2e-3)
    assert load(dataset_info("digits", image_size=8)).images.amax() == 255


@pytest.fixture(params=["memory", "streamed", "streamed by workers"])
def ten_classes(request, tmp_path, monkeypatch):
    write_folders(tmp_path, [str(i) for i in range(10)], each=1)
    if request.param != "memory":
        monkeypatch.setattr(image_bank, "memory_limit", lambda device: 0)
    split = load(dataset_info("folder", tmp_path, image_size=8), workers=2 if "workers" in request.param else 0)
    assert isinstance(split, StreamedSplit) == (split.images is None) == (request.param != "memory")
    return split


def test_batches_follow_the_given_order(ten_classes):
    state = torch.get_rng_state()
    order = torch.tensor([3, 9, 0, 3, 7, 1, 5])
    batches = list(ten_classes.batches(3, order))
    assert [labels.tolist() for _, labels in batches] == [[3, 9, 0], [3, 7, 1], [5]]
    for images, labels in batches:
        assert images.dtype == torch.float32 and images.shape == (len(labels), 3, 8, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images[:, 0, 0, 0], (10 * labels).float() / 255)
    assert (
        torch.cat([labels for _, labels in ten_classes.batches(4)]).tolist()
        == list(range(10))
        == ten_classes.labels.tolist()
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_streamed_errors_are_one_line(tmp_path, monkeypatch):
    write_folders(tmp_path, ["a", "b"])
    monkeypatch.setattr(image_bank, "memory_limit", lambda device: 0)
    split = load(dataset_info("folder", tmp_path), workers=2)
    (tmp_path / "test" / "b" / "0.png").write_bytes(b"")
    with fails("0.png cannot be decoded"):
        list(split.batches(2))


def test_memory_limit_is_a_part_of_the_machine():
    assert 0 < image_bank.memory_limit(torch.device("cpu")) < 2**45


def test_a_data_free_run_cannot_open_the_train_split():
    info = dataset_info("digits")
    forbid_train_split()
    assert len(load(info, "test"))
    with fails("data-free", "train split of digits"):
        load(info, "train")
    with allow_train_split():
        assert len(load(info, "train"))
    with fails("data-free"):
        load(info, "train")
