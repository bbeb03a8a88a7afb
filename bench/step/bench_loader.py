"""Images per second of the loaders, from JPEG files to packed pyramids, on the built-in set.

One round is a number of batches with the loader already running. The rate is given per core and in
all; `python -m bench.step` sets what a training step takes beside it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from bench.support.shapes import PAPER_RESOLUTIONS
from bench.support.timing import ON_GPU
from rsfast.data import Batch, Loader, train_loader
from rsfast.data.builtin import builtin_root

BATCH, BATCHES = (256, 20) if ON_GPU else (16, 4)
CORES = len(os.sched_getaffinity(0))
HAS_DALI = importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None
# (backend, where it decodes)
CASES = [("pil", "cpu")] + ([("dali", "cpu")] if HAS_DALI else [])
CASES += [("dali", "cuda")] if HAS_DALI and ON_GPU else []


def make_loader(
    backend: str,
    device: str,
    batch: int = BATCH,
    resolutions: tuple[int, ...] = PAPER_RESOLUTIONS,
    **options: Any,
) -> Loader:
    root = None if backend == "synthetic" else builtin_root()
    options = {"workers": CORES, **options}
    return train_loader(root, resolutions, batch, backend=backend, device=device, **options)


def endless(epoch: Callable[[], Iterable[Batch]]) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from epoch()


def make_run(backend: str, device: str, **options: Any) -> Callable[[], None]:
    """Takes a round's batches from a loader that runs already, with such options."""
    loader = make_loader(backend, device, BATCH, **options)
    batches = endless(lambda: loader)
    assert next(batches).images.num_images == BATCH

    def take() -> None:
        for _ in range(BATCHES):
            next(batches)

    return take


def rates(seconds: float) -> dict[str, float]:
    """Of a round that took so long."""
    rate = BATCH * BATCHES / seconds
    return {"images_per_s": rate, "images_per_s_per_core": rate / CORES, "cores": CORES}


@pytest.mark.parametrize(("backend", "device"), CASES, ids=lambda value: value)
def test_loader(benchmark, backend: str, device: str) -> None:
    take = make_run(backend, device)
    benchmark.group = "loader"
    benchmark.pedantic(take, rounds=5 if ON_GPU else 3, warmup_rounds=1)
    if benchmark.stats:
        benchmark.extra_info |= rates(benchmark.stats.stats.median)
