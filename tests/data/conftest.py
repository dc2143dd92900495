"""Tests in this folder may open the training images, unless they forbid it themselves, and they read all digits."""

import pytest

import engine.data.splits as data
from tests.conftest import all_digits


@pytest.fixture(autouse=True)
def open_train_split(monkeypatch):
    monkeypatch.setattr(data, "_train_split_forbidden", False)
    monkeypatch.setattr("engine.data.readers.read_digits", all_digits)
