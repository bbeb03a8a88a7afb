"""Batch norm, activation and max pooling of a ResNet's stem: together, or one after another.

All of them compute the statistics of the batch. "separate" is what a network runs whose pooling
does not join its batch norm: rsfast's kernels for batch norm and activation, PyTorch's pooling
level by level, and packing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.support.inputs import make_bn_inputs
from bench.support.record import check_alike, record
from bench.support.shapes import (
    DTYPES,
    NUM_IMAGES,
    PASSES,
    RESOLUTIONS,
    BatchNormLayer,
    batch_norm_layers,
    short_name,
)
from bench.support.timing import DEVICE, ON_GPU
from rsfast import Pyramid
from rsfast.kernels import (
    bn_act_max_pool,
    bn_act_max_pool_reference,
    conv2d_sizes,
    switchable_bn_act,
)

IMPLEMENTATIONS = ("separate", "reference", "rsfast") if ON_GPU else ("separate", "reference")
# The same in every ResNet.
(STEM,) = (layer for layer in batch_norm_layers("resnet50", RESOLUTIONS) if layer.pooled)


def pooled_rows(layer: BatchNormLayer) -> int:
    """Rows of all levels behind the pooling."""
    return NUM_IMAGES * sum(h * w for h, w in conv2d_sizes(layer.sizes, 3, 2, 1))


def moved_bytes(layer: BatchNormLayer, dtype: torch.dtype, direction: str) -> int:
    """Forward the map twice, the pooled one and a byte of index for each of its elements.

    Backward the map twice, the pooled one's gradient and index twice, and the map's gradient.
    """
    pixels = sum(layer.level_rows(NUM_IMAGES))
    maps, ends = (5, 3) if direction == "forward_backward" else (2, 1)
    pooled = ends * pooled_rows(layer) * (dtype.itemsize + 1)
    return layer.channels * (maps * pixels * dtype.itemsize + pooled)


def make_runs(
    layer: BatchNormLayer, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: output, then gradients."""
    banks = tuple(range(len(layer.sizes)))
    level_rows = layer.level_rows(NUM_IMAGES)
    wants_grads = direction == "forward_backward"
    inputs = make_bn_inputs(level_rows, layer.channels, len(banks), device=DEVICE, dtype=dtype)
    dy = inputs.pop("dy")[: pooled_rows(layer)]
    del inputs["residual"]
    options = {"activation": layer.activation, "training": True}

    def finish(y: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        leaves = [inputs[name] for name in ("x", "weight", "bias")]
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))] if wants_grads else [y]

    def run(
        function: Callable[..., Tensor], inputs: Mapping[str, Tensor], **backend: str
    ) -> list[Tensor]:
        y = function(
            **inputs, sizes=layer.sizes, num_images=NUM_IMAGES, banks=banks, **options, **backend
        )
        return finish(y, inputs)

    def exact() -> list[Tensor]:
        wide = {name: t.detach().clone() for name, t in inputs.items()}
        wide = {name: t.double() if t.is_floating_point() else t for name, t in wide.items()}
        return run(bn_act_max_pool_reference, _leaves(wide, wants_grads))

    def separate() -> list[Tensor]:
        backend = "triton" if ON_GPU else "torch"
        z = switchable_bn_act(
            **inputs, level_rows=level_rows, banks=banks, **options, backend=backend
        )
        pooled: Any = F.max_pool2d(Pyramid(z, layer.sizes, NUM_IMAGES), 3, 2, 1)
        return finish(pooled.rows, inputs)

    _leaves(inputs, wants_grads)
    runs = {
        "exact": exact,
        "separate": separate,
        "reference": lambda: run(bn_act_max_pool_reference, inputs),
    }
    if ON_GPU:
        runs["rsfast"] = lambda: run(bn_act_max_pool, inputs, backend="triton")
    return runs


def _leaves(inputs: dict[str, Tensor], wants_grads: bool) -> dict[str, Tensor]:
    for name in ("x", "weight", "bias"):
        inputs[name].requires_grad_(wants_grads)
    return inputs


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
