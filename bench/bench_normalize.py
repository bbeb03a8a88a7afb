"""Bytes to normalised, padded pixels: rsfast's kernel against eager and compiled PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.record import check_alike, record
from bench.timing import DEVICE
from rsfast.kernels import normalize, normalize_reference

ON_GPU = DEVICE.type == "cuda"
NUM_IMAGES, RESOLUTIONS = (256, (224, 192, 160, 128, 96)) if ON_GPU else (2, (64, 48, 32))
DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32,)
CHANNELS = (3, 4, 8)
IMPLEMENTATIONS = ("reference", "compiled", "rsfast") if ON_GPU else ("reference",)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_normalize(
    benchmark, copy_bandwidth: float, dtype: torch.dtype, channels: int, impl: str
) -> None:
    runs = make_runs(dtype, channels)
    check_alike(runs, [impl], list)
    group = f"normalize/C{channels}/{str(dtype).removeprefix('torch.')}/forward"
    record(benchmark, runs[impl], group, moved_bytes(dtype, channels), copy_bandwidth)
