"""Batch norm, activation and max pooling of a ResNet's stem: in one pass, or one after another.

All of them are handed the moments. "separate" is what a network with its batch norm in place runs:
rsfast's kernel for batch norm and activation, PyTorch's pooling level by level, and packing.
"reference", like "separate" on a CPU, computes the moments once more.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.inputs import make_bn_inputs
from bench.record import check_alike, record
from bench.shapes import (
    DTYPES,
    NUM_IMAGES,
    PASSES,
    RESOLUTIONS,
    BatchNormLayer,
    batch_norm_layers,
    short_name,
)
from bench.timing import DEVICE, ON_GPU
from rsfast import Pyramid
from rsfast.kernels import apply_bn_act, batch_moments, bn_act_max_pool, bn_act_max_pool_reference
from rsfast.models.layers import MaxPool2d

IMPLEMENTATIONS = ("separate", "reference", "rsfast") if ON_GPU else ("separate", "reference")
# The same in every ResNet: the largest of its maps, before pooling.
STEM = max(batch_norm_layers("resnet50", RESOLUTIONS), key=lambda norm: norm.sizes)


def moved_bytes(layer: BatchNormLayer, dtype: torch.dtype, direction: str) -> int:
    """Forward the map, the pooled one and a byte of index for each of its elements.

    Backward the map twice, the pooled one's gradient and index twice, and the map's gradient.
    """
    pixels = sum(layer.level_rows(NUM_IMAGES))
    pooled = NUM_IMAGES * sum(-(-h // 2) * -(-w // 2) for h, w in layer.sizes)
    maps, ends = (4, 3) if direction == "forward_backward" else (1, 1)
    return layer.channels * (maps * pixels * dtype.itemsize + ends * pooled * (dtype.itemsize + 1))


def make_runs(
    layer: BatchNormLayer, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: output, then gradients."""
    banks = tuple(range(len(layer.sizes)))
    level_rows = layer.level_rows(NUM_IMAGES)
    wants_grads = direction == "forward_backward"
    options = {"device": DEVICE, "dtype": dtype}
    inputs = make_bn_inputs(level_rows, layer.channels, len(banks), **options)
    running = [inputs[n] for n in ("running_mean", "running_var", "num_batches_tracked")]
    moments = batch_moments(inputs["x"], *running, level_rows, banks)
    leaves = [inputs[name].requires_grad_(wants_grads) for name in ("x", "weight", "bias")]
    pooled = NUM_IMAGES * sum(-(-h // 2) * -(-w // 2) for h, w in layer.sizes)
    dy = inputs["dy"][:pooled]
    pool = MaxPool2d(3, stride=2, padding=1)

    def run(function: Callable[..., Tensor], leaves: list[Tensor], **backend: str) -> list[Tensor]:
        known = [tensor.to(leaves[1].dtype) for tensor in moments]
        settings = layer.sizes, NUM_IMAGES, banks
        y = function(*leaves, *known, *settings, activation=layer.activation, **backend)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))] if wants_grads else [y]

    def exact() -> list[Tensor]:
        wide = [tensor.detach().double().requires_grad_(wants_grads) for tensor in leaves]
        return run(bn_act_max_pool_reference, wide)

    def separate() -> list[Tensor]:
        options = {"activation": layer.activation, "backend": "triton" if ON_GPU else "torch"}
        z = apply_bn_act(*leaves, *moments, level_rows, banks, **options)
        y = pool(Pyramid(z, layer.sizes, NUM_IMAGES)).rows
        return [y, *torch.autograd.grad(y, leaves, dy)] if wants_grads else [y]

    runs = {
        "exact": exact,
        "separate": separate,
        "reference": lambda: run(bn_act_max_pool_reference, leaves),
    }
    if ON_GPU:
        runs["rsfast"] = lambda: run(bn_act_max_pool, leaves, backend="triton")
    return runs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("layer", [STEM], ids=str)
def test_bn_act_max_pool(
    benchmark,
    copy_bandwidth: float,
    layer: BatchNormLayer,
    dtype: torch.dtype,
    direction: str,
    impl: str,
) -> None:
    runs = make_runs(layer, dtype, direction)
    check_alike(runs, [impl], list)
    group = f"bn_act_max_pool/{layer}/{short_name(dtype)}/{direction}"
    record(benchmark, runs[impl], group, moved_bytes(layer, dtype, direction), copy_bandwidth)
