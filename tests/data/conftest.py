"""Tests in this folder read all digits."""

import pytest

from tests.conftest import all_digits


@pytest.fixture(autouse=True)
def every_digit(monkeypatch):
    monkeypatch.setattr("engine.data.readers.read_digits", all_digits)
