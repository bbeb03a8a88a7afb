"""Threads and processes by default, and what a loader is told about decoding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rsfast.config import TrainConfig
from rsfast.data import default_workers, train_loader, val_loader
from rsfast.data.decoding import Decoding, decoding


@pytest.mark.parametrize(
    ("cores", "local_ranks", "workers"),
    [
        (1, None, 1),
        (12, None, 12),
        (200, None, 32),
        (112, "8", 14),
        (7, "2", 3),
        (4, "8", 1),
        (224, "8", 28),
    ],
)
def test_workers_are_the_cores_of_the_rank(
    cores: int, local_ranks: str | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    assert default_workers() == workers
    assert decoding().workers == workers


@pytest.mark.parametrize(("workers", "share"), [(0, 0.9), (7, 0.9), (8, 0.65), (32, 0.65)])
def test_the_jpeg_decoder_of_the_gpu_takes_more_where_threads_are_few(
    workers: int, share: float
) -> None:
    assert decoding(workers) == Decoding(workers, share, dont_use_mmap=False)


def test_what_is_given_is_taken() -> None:
    assert decoding(3, 0.0, True) == Decoding(3, 0.0, True)
    assert decoding(0, 1.0) == Decoding(0, 1.0, False)


@pytest.mark.parametrize("make", [train_loader, val_loader])
@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("workers", -1, r"workers must be in \[0, 1025\), got -1"),
        ("hw_decoder_load", 1.5, r"hw_decoder_load must be in \[0, 1\], got 1\.5"),
        ("hw_decoder_load", -0.1, r"hw_decoder_load must be in \[0, 1\], got -0\.1"),
        ("hw_decoder_load", float("nan"), r"hw_decoder_load must be in \[0, 1\], got nan"),
    ],
)
def test_a_bad_value_is_named(
    make, argument: str, value: float, rule: str, image_root: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{rule}$"):
        make(image_root, (24,), 2, backend="pil", **{argument: value})


@pytest.mark.parametrize("value", [1.5, -0.1])
def test_the_setting_has_the_same_bounds(value: float) -> None:
    with pytest.raises(ValueError, match=r"^hw_decoder_load must be in \[0, 1\], got"):
        TrainConfig(hw_decoder_load=value)
    assert TrainConfig(hw_decoder_load=1.0).hw_decoder_load == 1.0
