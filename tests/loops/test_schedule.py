"""The student's learning rate."""

import dataclasses

import pytest

from engine.loops.distill import Schedule


def test_learning_rate_is_a_function_of_the_step():
    schedule = Schedule(
        epochs=4, ep_steps=20, kd_steps=10, batch_size=1, lr=0.2, momentum=0.9, weight_decay=0, warmup_epochs=1
    )
    ends_above = dataclasses.replace(schedule, lr_min=0.05)
    assert [ends_above.learning_rate(k) for k in (0, 20, 50, 80)] == pytest.approx([0.01, 0.2, 0.125, 0.05])
    assert schedule.rounds == 8 and schedule.learning_rate(0) == pytest.approx(0.01)
    assert schedule.learning_rate(19) == pytest.approx(0.2) == schedule.learning_rate(20)
    assert schedule.learning_rate(50) == pytest.approx(0.1) and schedule.learning_rate(79) < 1e-3
