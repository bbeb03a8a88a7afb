"""Bytes to normalised, padded pixels: rsfast's kernel against eager and compiled PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.support.record import check_alike, record
from bench.support.shapes import NUM_IMAGES, RESOLUTIONS, short_name
from bench.support.timing import DEVICE, ON_GPU
from rsfast.data import NORMALIZATIONS
from rsfast.kernels import normalize, normalize_reference

DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32,)
CHANNELS = (3, 4, 8)
IMPLEMENTATIONS = ("reference", "compiled", "rsfast") if ON_GPU else ("reference",)
IMAGENET = NORMALIZATIONS["imagenet"]


def moved_bytes(dtype: torch.dtype, channels: int) -> int:
    """Three bytes read and all channels written per pixel."""
    pixels = NUM_IMAGES * sum(r * r for r in RESOLUTIONS)
    return pixels * (3 + channels * dtype.itemsize)


def make_runs(dtype: torch.dtype, channels: int) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same pixels."""
    rows = NUM_IMAGES * sum(r * r for r in RESOLUTIONS)
    generator = torch.Generator(DEVICE).manual_seed(0)
    options = {"generator": generator, "dtype": torch.uint8, "device": DEVICE}
    x = torch.randint(0, 256, (rows, 3), **options)
    options = {"dtype": dtype, "channels": channels}
    runs = {
        "exact": lambda: [
            normalize_reference(x, *IMAGENET, dtype=torch.float64, channels=channels)
        ],
        "reference": lambda: [normalize_reference(x, *IMAGENET, **options)],
    }
    if ON_GPU:
        torch._dynamo.reset()  # after 8 shapes it would go on without compiling
        compiled = torch.compile(normalize_reference, dynamic=False, fullgraph=True)
        runs["compiled"] = lambda: [compiled(x, *IMAGENET, **options)]
        runs["rsfast"] = lambda: [normalize(x, *IMAGENET, **options, backend="triton")]
    return runs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_normalize(
    benchmark, copy_bandwidth: float, dtype: torch.dtype, channels: int, impl: str
) -> None:
    runs = make_runs(dtype, channels)
    check_alike(runs, [impl], list)
    group = f"normalize/C{channels}/{short_name(dtype)}/forward"
    record(benchmark, runs[impl], group, moved_bytes(dtype, channels), copy_bandwidth)
