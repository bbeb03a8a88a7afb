"""Nothing holds the training step any more when the process group is left.

A captured step holds NCCL's communicators, and their end waits for the end of all graphs.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from rsfast import train
from rsfast.engine import TrainStep
from rsfast.runtime import distributed
from rsfast.training.run import Run
from run_helpers import stop_when

FLAGS = """--arch tiny:network --resolutions 16 8 --batch-size 2 --epochs 1 --steps-per-epoch 3
    --loader synthetic --workers 0 --log-every 1 --device cpu""".split()


@pytest.mark.parametrize(
    ("ending", "code"), [("normal", 0), ("a signal", 75), ("a signal in the validation", 75)]
)
def test_the_step_is_gone_when_the_group_is_left(
    ending: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[weakref.ref[TrainStep]] = []
    alive: list[TrainStep | None] = []
    train_epochs, validate, leave = train.train_epochs, train.validate_all, distributed.leave

    def remember(run: Run, interrupt: Any) -> Any:
        steps.append(weakref.ref(run.step))
        if ending == "a signal in the validation":
            monkeypatch.setattr(train, "validate_all", lambda *args: interrupted(interrupt, *args))
        return train_epochs(run, interrupt)

    def interrupted(interrupt: Any, *args: Any) -> Any:
        interrupt.requested = True
        return validate(*args)

    def check() -> None:
        gc.collect()  # of circles, as `leave` does first
        alive.extend(step() for step in steps)
        leave()

    monkeypatch.setattr(train, "train_epochs", remember)
    monkeypatch.setattr(distributed, "leave", check)
    if ending == "a signal":
        stop_when(monkeypatch, lambda run: run.steps_done == 2)
    assert train.main([*FLAGS, "--output", str(tmp_path / "run")]) == code
    assert alive == [None]
