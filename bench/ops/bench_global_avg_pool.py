"""Global average pooling: rsfast's kernel against eager and compiled PyTorch, level by level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.support.record import as_packed, check_alike, record
from bench.support.shapes import (
    ARCHITECTURES,
    DTYPES,
    NUM_IMAGES,
    PASSES,
    RESOLUTIONS,
    pooled_map,
    short_name,
)
from bench.support.timing import DEVICE, ON_GPU
from rsfast import Pyramid
from rsfast.kernels import global_avg_pool, global_avg_pool_reference

IMPLEMENTATIONS = ("eager", "compiled", "rsfast") if ON_GPU else ("eager", "reference")


def moved_bytes(arch: str, dtype: torch.dtype, direction: str) -> int:
    """One read or write of the map in each direction; the means hardly count."""
    layer = pooled_map(arch, RESOLUTIONS)
    size = sum(layer.level_rows(NUM_IMAGES)) * layer.channels * dtype.itemsize
    return size * (2 if direction == "forward_backward" else 1)


def eager(levels: list[Tensor]) -> list[Tensor]:
    return [level.mean((2, 3)) for level in levels]


def make_runs(
    arch: str, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: means, then the gradient."""
    layer = pooled_map(arch, RESOLUTIONS)
    level_rows = layer.level_rows(NUM_IMAGES)
    wants_grads = direction == "forward_backward"
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows = torch.randn(sum(level_rows), layer.channels, generator=generator, device=DEVICE)
    rows = rows.to(dtype).requires_grad_(wants_grads)
    shape = len(layer.sizes) * NUM_IMAGES, layer.channels
    dy = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    levels = Pyramid(rows.detach(), layer.sizes, NUM_IMAGES).levels()
    levels = [level.requires_grad_(wants_grads) for level in levels]

    def run_packed(function: Callable[..., Tensor], **backend: str) -> list[Tensor]:
        y = function(rows, level_rows, NUM_IMAGES, **backend)
        return [y, *torch.autograd.grad(y, rows, dy)] if wants_grads else [y]

    def exact() -> list[Tensor]:
        x = rows.detach().double().requires_grad_(wants_grads)
        y = global_avg_pool_reference(x, level_rows, NUM_IMAGES)
        return [y, *torch.autograd.grad(y, x, dy.double())] if wants_grads else [y]

    def run_levels(function: Callable[..., list[Tensor]]) -> list[Any]:
        ys = function(levels)
        if not wants_grads:
            return [ys]
        return [ys, list(torch.autograd.grad(ys, levels, dy.split(NUM_IMAGES)))]

    runs = {
        "exact": exact,
        "eager": lambda: run_levels(eager),
        "reference": lambda: run_packed(global_avg_pool_reference),
    }
    if ON_GPU:
        torch._dynamo.reset()  # after 8 shapes it would go on without compiling
        compiled = torch.compile(eager, dynamic=False, fullgraph=True)
        runs["compiled"] = lambda: run_levels(compiled)
        runs["rsfast"] = lambda: run_packed(global_avg_pool, backend="triton")
    return runs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_global_avg_pool(
    benchmark,
    copy_bandwidth: float,
    arch: str,
    dtype: torch.dtype,
    direction: str,
    impl: str,
) -> None:
    runs = make_runs(arch, dtype, direction)
    check_alike(runs, [impl], as_packed)
    group = f"global_avg_pool/{arch}/{short_name(dtype)}/{direction}"
    record(benchmark, runs[impl], group, moved_bytes(arch, dtype, direction), copy_bandwidth)
