"""In this room every test may open the training images, unless it forbids that itself."""

import pytest

import engine.data.splits as data


@pytest.fixture(autouse=True)
def open_train_split(monkeypatch):
    monkeypatch.setattr(data, "_train_split_forbidden", False)
