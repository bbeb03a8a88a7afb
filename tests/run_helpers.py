"""Stopping a run, comparing the folders that two have left, and checkpoints without a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rsfast import create_model, train
from rsfast.files.unpickle import load_dict
from rsfast.losses import MultiResolutionDistillation
from rsfast.training import checkpoint
from rsfast.training.run import Run

__all__ = ["assert_equal", "assert_same_run", "log_of", "network_payload", "stop_when"]


def network_payload() -> dict[str, Any]:
    """What a checkpoint holds of a network, without a run."""
    torch.manual_seed(0)
    model = create_model("resnet18", (48, 32), 3)
    model.input_mean, model.input_std = (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)
    model.val_crop, model.exif = "none", "honour"
    model.levels, model.picked_from = "nearest", 64
    model.class_names = ("a", "b", "c")
    loss = MultiResolutionDistillation(2)
    return {**checkpoint.model_payload(model), "loss": loss.state_dict()}


def log_of(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] != "start"]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def assert_same_run(ours: Path, whole: Path) -> None:
    """Weights, momentum, statistics, random numbers, log and summary, bit for bit."""
    found, expected = (load_dict(output / "last.pt") for output in (ours, whole))
    for content in (found, expected):
        for name in ("config", "config_hash"):  # hold the output folder
            content.pop(name)
    assert_equal(found, expected, "last.pt")
    assert log_of(ours) == log_of(whole)
    assert (ours / "summary.csv").read_bytes() == (whole / "summary.csv").read_bytes()
    best = [load_dict(output / "model_best.pt")["model"] for output in (ours, whole)]
    assert_equal(*best, "model_best.pt")


def assert_equal(found: Any, expected: Any, name: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), name
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_equal(found[key], value, f"{name} {key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), name
        for index, value in enumerate(expected):
            assert_equal(found[index], value, f"{name} {index}")
    else:
        assert found == expected, name


def stop_when(monkeypatch: pytest.MonkeyPatch, due: Callable[[Run], bool]) -> None:
    """Asks the run to stop, as a signal would, once `due` holds after a step."""
    save_if_due = train.save_if_due

    def with_signal(run: Run, interrupt: Any) -> None:
        if due(run):
            interrupt.requested = True
        save_if_due(run, interrupt)

    monkeypatch.setattr(train, "save_if_due", with_signal)
