"""Shared memory that is too small for what workers prefetch is an error before they start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsfast.data import Loader, train_loader, val_loader
from rsfast.data.sharing import check_shared_memory

MIB = 2**20


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretends that so many bytes of shared memory are there, and so many free."""

    def pretend(total: int, free: int) -> None:
        usage = shutil._ntuple_diskusage(total, total - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    return pretend


@pytest.mark.parametrize(
    ("free", "workers", "works"),
    [(64, 1, False), (64, 0, True), (304, 1, True), (303, 1, False), (8192, 30, True)],
)
def test_workers_are_refused_whose_batches_do_not_fit(
    free: int, workers: int, works: bool, shared: Callable
) -> None:
    """Of 256 images at the five published resolutions."""
    batch = 256 * 3 * sum(r * r for r in (224, 192, 160, 128, 96))
    shared(16384 * MIB, free * MIB)
    if works:
        check_shared_memory(workers, batch, 99)
        return
    with pytest.raises(ValueError, match=f"got {free} MiB free of 16384 MiB; ") as caught:
        check_shared_memory(workers, batch, 99)
    assert "1 workers prefetch 2 batches of 101 MiB each, 304 MiB" in str(caught.value)
    for remedy in ("--shm-size", "--ipc=host", "--workers 0", "--loader dali"):
        assert remedy in str(caught.value)


def test_all_ranks_of_a_machine_share_the_whole(
    shared: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared(60, 45)
    check_shared_memory(2, 9, 5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="times 2 processes of torchrun"):
        check_shared_memory(2, 9, 5)


def test_a_system_without_that_folder_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", folder)

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    check_shared_memory(8, 2**40, 1)


@pytest.mark.parametrize("make", [train_loader, val_loader], ids=["train", "val"])
def test_loaders_are_refused_when_they_are_made(
    make: Callable[..., Loader], image_root: Path, shared: Callable
) -> None:
    def loader_of(**arguments: Any) -> Loader:
        return make(image_root, (96, 64), 1, backend="pil", **arguments)

    batch, steps = 3 * (96**2 + 64**2), len(loader_of(workers=0))
    assert steps > 7
    shared(MIB * 8, 5 * batch)
    loader_of(workers=2)
    shared(MIB * 8, 5 * batch - 1)
    with pytest.raises(ValueError, match="must fit their batches into the shared memory"):
        loader_of(workers=2)
    loader_of(workers=1)
    loader_of(workers=0)
    shared(MIB * 8, steps * batch)
    loader_of(workers=64)  # there are no more batches
