"""Switchable batch norm on the kernels against the float64 reference, for its tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_helpers import max_error, to_float64
from rsfast.kernels import switchable_bn_act, switchable_bn_act_reference

__all__ = [
    "ALL_VARIANTS",
    "HALVES",
    "SMOOTH_VARIANTS",
    "STATE",
    "VARIANTS",
    "VECTOR_SHAPES",
    "assert_as_good_as_pytorch",
    "float32_operands",
    "run",
]

STATE = ("running_mean", "running_var", "num_batches_tracked")
VARIANTS = [
    pytest.param(None, False, id="plain"),
    pytest.param("relu", False, id="relu"),
    pytest.param("relu6", False, id="relu6"),
    pytest.param(None, True, id="add"),
    pytest.param("relu", True, id="add-relu"),
    pytest.param("relu6", True, id="add-relu6"),
]

# Those of the Triton kernels: the ones above are also in CUDA C++.
SMOOTH_VARIANTS = [
    pytest.param("silu", False, id="silu"),
    pytest.param("hardswish", False, id="hardswish"),
    pytest.param("silu", True, id="add-silu"),
    pytest.param("hardswish", True, id="add-hardswish"),
]
ALL_VARIANTS = [*VARIANTS, *SMOOTH_VARIANTS]

HALVES = [pytest.param(getattr(torch, name), id=name) for name in ("float16", "bfloat16")]
# Rows of each level, their sets, channels, 8 at a time: one row, one set for all levels, sets out
# of order and unused, narrow and uneven slices, all levels at once.
VECTOR_SHAPES = [
    pytest.param((1,), (1,), 8, id="1-C8"),
    pytest.param((3,), (0,), 24, id="3-C24"),
    pytest.param((65, 33, 1), (2, 0, 1), 72, id="65+33+1-C72"),
    pytest.param((90, 60, 30), (0, 0, 0), 64, id="90+60+30-C64-one-set"),
    pytest.param((130, 7), (1, 0), 136, id="130+7-C136"),
    pytest.param((64, 36, 16, 4, 2, 2, 1, 1), (0, 1, 2, 0, 1, 2, 0, 1), 32, id="8-levels-C32"),
]


def run(function: Any, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """y, every gradient, and the state afterwards; `inputs` stay as they are."""
    inputs = {name: None if t is None else t.detach().clone() for name, t in inputs.items()}
    dy = inputs.pop("dy")
    wanted = ["x", "weight", "bias"] + ["residual"] * (inputs["residual"] is not None)
    leaves = [inputs[name].requires_grad_() for name in wanted]
    y = function(**inputs, **options)
    grads = torch.autograd.grad(y, leaves, dy)
    results = {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {"y": y.detach(), **results, **{name: inputs[name] for name in STATE}}


def assert_as_good_as_pytorch(
    inputs: dict[str, Any], backend: str = "triton", **options: Any
) -> None:
    """Results of a backend are at most twice as far from float64 as PyTorch's, and a rounding."""
    exact = run(switchable_bn_act_reference, to_float64(inputs), **options)
    eager = run(switchable_bn_act_reference, inputs, **options)
    ours = run(switchable_bn_act, inputs, backend=backend, **options)
    operands = float32_operands(inputs, options)
    for name, want in exact.items():
        if name == "num_batches_tracked":
            assert torch.equal(ours[name], want)
            continue
        assert ours[name].dtype == eager[name].dtype
        assert torch.isfinite(ours[name]).all(), name
        step = torch.finfo(ours[name].dtype).eps * want.abs().max().item()
        step += torch.finfo(torch.float32).eps * operands.get(name, 0.0)
        bound = 2 * max_error(eager[name], want) + step
        error = max_error(ours[name], want)
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


def float32_operands(inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Sizes of what the results are sums of, which float32 rounds once.

    PyTorch's CPU kernels add up in float64 and so do not show this rounding.
    """
    levels = zip(
        inputs["x"].double().split(options["level_rows"]),
        inputs["dy"].double().split(options["level_rows"]),
        options["banks"],
        strict=True,
    )
    sizes = dict.fromkeys(("dx", "dweight", "dbias", "running_mean"), 0.0)
    for x, dy, bank in levels:
        mean, var = inputs["running_mean"][bank], inputs["running_var"][bank]
        if options["training"]:
            mean, var = x.mean(0), x.var(0, correction=0)
        invstd = torch.rsqrt(var.double() + 1e-5)
        # A mean in float32 is off by a rounding, in deviations:
        offset = (mean.abs() * invstd).max().item()
        sizes["running_mean"] = max(sizes["running_mean"], 0.1 * mean.abs().max().item())
        weighted = dy.abs() * ((x - mean) * invstd).abs()
        sizes["dbias"] += dy.abs().sum(0).max().item()
        sizes["dweight"] += weighted.sum(0).max().item() + offset * dy.abs().sum(0).max().item()
        scale = (inputs["weight"][bank].double().abs() * invstd).max().item()
        sizes["dx"] = max(sizes["dx"], scale * (1 + offset) * dy.abs().max().item())
    return sizes
