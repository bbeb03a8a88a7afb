"""Switchable batch norm, add and activation: rsfast's kernels against eager and compiled PyTorch.

The rivals get what a list-of-tensors network gives them: one channels-last image per level, so no
split and no concatenation. Eager bfloat16 takes PyTorch's own kernels, eager float16 cuDNN's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.models import traffic
from bench.support.inputs import make_bn_inputs
from bench.support.installed import INSTALLED, apex_batch_norm, cudnn_batch_norm
from bench.support.record import as_packed, check_alike, record
from bench.support.shapes import (
    ARCHITECTURES,
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
from rsfast.kernels import switchable_bn_act, switchable_bn_act_reference

IMPLEMENTATIONS = ["eager", "compiled", "rsfast"] if ON_GPU else ["eager", "reference"]
_OPTIONAL = {"apex_groupbn", "cudnn_graph", "rsfast_cuda"}  # the last: one launch each way
IMPLEMENTATIONS += sorted(INSTALLED & _OPTIONAL) if ON_GPU else []


def layers(arch: str) -> Counter[BatchNormLayer]:
    """Those of a network that the operation computes, and how many there are of each.

    What is pooled at once is in bench_bn_act_max_pool.
    """
    found = batch_norm_layers(arch, RESOLUTIONS)
    return Counter({layer: count for layer, count in found.items() if not layer.pooled})


CASES = sorted({layer for arch in ARCHITECTURES for layer in layers(arch)}, key=str)


def moved_bytes(layer: BatchNormLayer, dtype: torch.dtype, direction: str) -> int:
    """What two kernels each way must move: 3 passes and 5 backward, a residual 1 and 1."""
    forward, backward = map(int, traffic.passes(layer))
    passes = forward + backward if direction == "forward_backward" else forward
    return passes * NUM_IMAGES * traffic.elements(layer) * dtype.itemsize


def eager(
    levels: list[Tensor],
    residuals: list[Tensor] | None,
    weights: list[Tensor],
    biases: list[Tensor],
    running: list[tuple[Tensor, Tensor]],
    activation: str | None,
) -> list[Tensor]:
    """Batch norm per level, then the addition, then the activation, as in the authors' way."""
    outputs = []
    for index, x in enumerate(levels):
        mean, var = running[index]
        y = F.batch_norm(x, mean, var, weights[index], biases[index], True, 0.1, 1e-5)
        if residuals is not None:
            y = y + residuals[index]
        if activation is not None:
            y = F.relu(y) if activation == "relu" else F.relu6(y)
        outputs.append(y)
    return outputs


def make_runs(
    layer: BatchNormLayer, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: outputs, then gradients, packed."""
    num_levels = len(layer.sizes)
    level_rows, banks = layer.level_rows(NUM_IMAGES), tuple(range(num_levels))
    options = {"residual": layer.residual, "device": DEVICE, "dtype": dtype}
    inputs = make_bn_inputs(level_rows, layer.channels, num_levels, **options)
    dy = inputs.pop("dy")
    wants_grads = direction == "forward_backward"
    packed = {name: inputs[name] for name in ("x", "weight", "bias", "residual")}
    packed = {name: t for name, t in packed.items() if t is not None}
    for tensor in packed.values():
        tensor.requires_grad_(wants_grads)

    def run_packed(function: Callable[..., Tensor], **backend: str) -> list[Tensor]:
        y = function(
            **inputs,
            level_rows=level_rows,
            banks=banks,
            activation=layer.activation,
            training=True,
            **backend,
        )
        return [y, *torch.autograd.grad(y, list(packed.values()), dy)] if wants_grads else [y]

    def exact() -> list[Tensor]:
        before = {name: t.detach().clone() for name, t in inputs.items() if t is not None}
        before = {n: t.double() if t.is_floating_point() else t for n, t in before.items()}
        leaves = [before[name].requires_grad_(wants_grads) for name in packed]
        y = switchable_bn_act_reference(
            **before,
            level_rows=level_rows,
            banks=banks,
            activation=layer.activation,
            training=True,
        )
        return [y, *torch.autograd.grad(y, leaves, dy.double())] if wants_grads else [y]

    def levels_of(rows: Tensor | None) -> list[Tensor] | None:
        if rows is None:
            return None
        levels = Pyramid(rows.detach(), layer.sizes, NUM_IMAGES).levels()
        return [level.requires_grad_(wants_grads) for level in levels]

    xs, residuals, dys = levels_of(inputs["x"]), levels_of(inputs["residual"]), levels_of(dy)
    weights, biases = (
        [row.detach().clone().requires_grad_(wants_grads) for row in inputs[name]]
        for name in ("weight", "bias")
    )
    running = list(zip(inputs["running_mean"].clone(), inputs["running_var"].clone(), strict=True))

    def run_levels(function: Callable[..., list[Tensor]], *arguments: Any) -> list[Any]:
        ys = function(*arguments)
        if not wants_grads:
            return [ys]
        leaves = [xs, weights, biases] + ([] if residuals is None else [residuals])
        grads = iter(torch.autograd.grad(ys, [t for leaf in leaves for t in leaf], dys))
        return [ys, *([next(grads) for _ in leaf] for leaf in leaves)]

    arguments = (xs, residuals, weights, biases, running, layer.activation)
    runs = {
        "exact": exact,
        "eager": lambda: run_levels(eager, *arguments),
        "reference": lambda: run_packed(switchable_bn_act_reference),
    }
    if ON_GPU:
        torch._dynamo.reset()  # after 8 shapes it would go on without compiling
        compiled = torch.compile(eager, dynamic=False, fullgraph=True)
        runs["compiled"] = lambda: run_levels(compiled, *arguments)
        runs["rsfast"] = lambda: run_packed(switchable_bn_act, backend="triton")
        if "rsfast_cuda" in INSTALLED:
            runs["rsfast_cuda"] = lambda: run_packed(switchable_bn_act, backend="cuda")
        apex = (
            apex_batch_norm(*arguments[:4], layer.activation)
            if "apex_groupbn" in INSTALLED
            else None
        )
        if apex is not None:
            runs["apex_groupbn"] = lambda: run_levels(apex)
        graph = None
        if "cudnn_graph" in INSTALLED and not wants_grads:
            graph = cudnn_batch_norm(*arguments)
        if graph is not None:
            runs["cudnn_graph"] = lambda: run_levels(graph)
    return runs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("layer", CASES, ids=str)
def test_switchable_bn_act(
    benchmark,
    copy_bandwidth: float,
    layer: BatchNormLayer,
    dtype: torch.dtype,
    direction: str,
    impl: str,
) -> None:
    runs = make_runs(layer, dtype, direction)
    if impl not in runs:
        pytest.skip(f"{impl} has no {direction} kernel for this layer in {dtype}")
    check_alike(runs, [impl], as_packed)
    group = f"switchable_bn_act/{layer}/{short_name(dtype)}/{direction}"
    record(benchmark, runs[impl], group, moved_bytes(layer, dtype, direction), copy_bandwidth)
