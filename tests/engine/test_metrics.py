"""The clock of the log lines."""

from __future__ import annotations

import time

import pytest
import torch

from rsfast.engine.metrics import StepClock


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows; to be changed by the test."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_first_step_of_all_is_not_timed_with_the_others(seconds: list[float]) -> None:
    clock = StepClock(torch.device("cpu"))
    for duration in (90.0, 1.0, 1.0, 1.0):
        clock.step()
        seconds[0] += duration
    assert clock.read() == 1.0
    for duration in (0.5, 0.5):
        clock.step()
        seconds[0] += duration
    assert clock.read() == 2.0


def test_a_reading_after_the_first_step_has_it_in(seconds: list[float]) -> None:
    clock = StepClock(torch.device("cpu"))
    clock.step()
    seconds[0] += 4.0
    assert clock.read() == 0.25
    clock.step()
    seconds[0] += 1.0
    assert clock.read() == 1.0


def test_what_is_before_a_start_is_not_timed(seconds: list[float]) -> None:
    clock = StepClock(torch.device("cpu"))
    seconds[0] += 100.0  # a validation
    clock.start()
    for _ in range(3):
        clock.step()
        seconds[0] += 1.0
    assert clock.read() == 1.0
