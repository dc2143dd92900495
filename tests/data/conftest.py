"""In this room every test may open the training images, unless it forbids that itself, and reads all of the digits."""

import pytest

import engine.data.splits as data
from tests.conftest import all_digits


@pytest.fixture(autouse=True)
def open_train_split(monkeypatch):
    monkeypatch.setattr(data, "_train_split_forbidden", False)
    monkeypatch.setattr("engine.data.readers.read_digits", all_digits)
