"""Quantised activations that move their basis: one launch over all levels and a tiny second one.

"reference" is PyTorch, level by level; so is what a CPU runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.support.record import as_packed, check_alike, record
from bench.support.shapes import (
    DTYPES,
    NUM_IMAGES,
    PASSES,
    RESOLUTIONS,
    QuantisedMap,
    quantised_maps,
    short_name,
)
from bench.support.timing import DEVICE, ON_GPU
from rsfast.kernels import lq_activation, lq_activation_reference

ARCH = "resnet18_lq"
IMPLEMENTATIONS = ("reference", "rsfast") if ON_GPU else ("reference",)


def layers(arch: str) -> Counter[QuantisedMap]:
    """The maps that a network quantises, and how many there are of each."""
    return quantised_maps(arch, RESOLUTIONS)


CASES = sorted(layers(ARCH), key=str)


def moved_bytes(layer: QuantisedMap, dtype: torch.dtype, direction: str) -> int:
    """The map in and out in each direction, and a bit for each element written and read."""
    elements = NUM_IMAGES * sum(h * w for h, w in layer.sizes) * layer.channels
    once = 2 * elements * dtype.itemsize
    return 2 * (once + elements // 8) if direction == "forward_backward" else once


def make_runs(
    layer: QuantisedMap, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: levels, then the gradient."""
    wants_grads = direction == "forward_backward"
    generator = torch.Generator(DEVICE).manual_seed(0)
    level_rows = [NUM_IMAGES * height * width for height, width in layer.sizes]
    shape = sum(level_rows), layer.channels
    x = torch.randn(shape, generator=generator, device=DEVICE).relu_().to(dtype)
    x.requires_grad_(wants_grads)
    dy = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    start = torch.tensor([0.45, 0.9], device=DEVICE)
    updates = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def run(function: Callable[..., Tensor], x: Tensor, **backend: Any) -> list[Tensor]:
        basis = start.to(torch.promote_types(x.dtype, start.dtype)).clone()
        moving = len(level_rows)
        y = function(x, basis, updates, level_rows, moving=moving, **backend)
        return [y, *torch.autograd.grad(y, x, dy.to(y.dtype))] if wants_grads else [y]

    exact = x.detach().double().requires_grad_(wants_grads)
    runs = {
        "exact": lambda: run(lq_activation_reference, exact),
        "reference": lambda: run(lq_activation_reference, x),
    }
    if ON_GPU:
        runs["rsfast"] = lambda: run(lq_activation, x, backend="triton")
    return runs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("layer", CASES, ids=str)
def test_lq_activation(
    benchmark,
    copy_bandwidth: float,
    layer: QuantisedMap,
    dtype: torch.dtype,
    direction: str,
    impl: str,
) -> None:
    runs = make_runs(layer, dtype, direction)
    check_alike(runs, [impl], as_packed)
    group = f"lq_activation/{layer}/{short_name(dtype)}/{direction}"
    record(benchmark, runs[impl], group, moved_bytes(layer, dtype, direction), copy_bandwidth)
