"""Measures of a classifier's predictions."""

import pytest
import torch

from engine.loops.measures import calibration_error, class_accuracy, confusion


def test_measures_in_closed_form():
    labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    counts = confusion(labels, predicted, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert class_accuracy(counts)[:3].tolist() == [50, 100, 0] and class_accuracy(counts)[3].isnan()
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert calibration_error(sure, torch.tensor([0, 0])) == 0 and calibration_error(sure, torch.tensor([0, 1])) == 0.5
    mixed = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert calibration_error(mixed, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
