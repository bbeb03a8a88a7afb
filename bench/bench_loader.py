"""Images per second of the loaders, from JPEG files to packed pyramids, on the built-in set.

One round is a number of batches with the loader already running. The rate stands in the JSON per
core and in all, to be held against what `bench.train_step` says the step takes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from itertools import chain, repeat

import pytest

from bench.shapes import PAPER_RESOLUTIONS
from bench.timing import ON_GPU
from rsfast.data import Batch, Loader, train_loader
from rsfast.data.builtin import builtin_root

BATCH, BATCHES = (256, 20) if ON_GPU else (16, 4)
CORES = len(os.sched_getaffinity(0))
HAS_DALI = importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None
# (backend, where it decodes)
CASES = [("pil", "cpu")] + ([("dali", "cpu")] if HAS_DALI else [])
CASES += [("dali", "cuda")] if HAS_DALI and ON_GPU else []


def make_loader(backend: str, device: str) -> Loader:
    return train_loader(
        builtin_root(),
        PAPER_RESOLUTIONS,
        BATCH,
        backend=backend,
        workers=CORES,
        device=device,
    )


def endless(loader: Loader) -> Iterator[Batch]:
    return chain.from_iterable(repeat(loader))


@pytest.mark.parametrize(("backend", "device"), CASES, ids=lambda value: value)
def test_loader(benchmark, backend: str, device: str) -> None:
    batches = endless(make_loader(backend, device))
    assert next(batches).images.num_images == BATCH

    def take() -> None:
        for _ in range(BATCHES):
            next(batches)

    benchmark.group = "loader"
    benchmark.pedantic(take, rounds=5 if ON_GPU else 3, warmup_rounds=1)
    if benchmark.stats:
        rate = BATCH * BATCHES / benchmark.stats.stats.median
        benchmark.extra_info |= {
            "images_per_s": rate,
            "images_per_s_per_core": rate / CORES,
            "cores": CORES,
        }
