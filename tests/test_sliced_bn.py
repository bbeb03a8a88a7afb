"""Batch norm slice by slice is batch norm; the benchmark's rival has to be right, too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.inputs import make_bn_inputs
from bench.shapes import RESOLUTIONS, batch_norm_layers
from kernel_helpers import CPU_OR_GPU
from rsfast.kernels import switchable_bn_act_reference

LEVEL_ROWS = (70, 40, 9, 5)


def test_slices_cover_everything_once_and_fit() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from bench.sliced_bn import L2_BYTES, slices

    for layer in batch_norm_layers("resnet50", RESOLUTIONS):
        rows = layer.level_rows(256)
        found = slices(rows, layer.channels, 2, L2_BYTES)
        area = sum((last - first) * (end - begin) for (first, last), (begin, end) in found)
        assert area == len(rows) * layer.channels
        for (first, last), (begin, end) in found:
            size = 2 * sum(rows[first:last]) * (end - begin)
            too_large = 2 * 64 * rows[first] > L2_BYTES
            assert (begin, end) == (0, layer.channels) if too_large else size <= L2_BYTES
    halves = [((0, 1), (0, 64)), ((0, 1), (64, 128))]
    assert slices((8, 4, 2), 128, 1, 12 * 64) == [*halves, ((1, 3), (0, 128))]


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize(
    ("activation", "residual"), [("relu", False), (None, True), ("relu6", True)]
)
# All in one; levels apart and channels apart; too little for any; slices of 576 channels, for which
# blocks of 128 would be taken.
@pytest.mark.parametrize(
    ("channels", "room"), [(192, math.inf), (192, 4 * 64 * 75), (192, 4), (1152, 4 * 576 * 12)]
)
def test_outputs_gradients_and_statistics_are_those_of_the_reference(
    channels: int, room: float, activation: str | None, residual: bool, device: str
) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from bench.sliced_bn import switchable_bn_act_in_slices

    options = {"residual": residual, "device": device, "dtype": torch.float64}
    level_rows = LEVEL_ROWS if channels < 1152 else (12, 5)
    banks = range(len(level_rows))
    inputs = make_bn_inputs(level_rows, channels, len(banks), **options)
    settings = {"level_rows": level_rows, "banks": banks, "activation": activation}

    def run(function: Any, dtype: torch.dtype, **more: Any) -> dict[str, Tensor]:
        own = {
            name: t.to(dtype) if t.is_floating_point() else t.clone()
            for name, t in inputs.items()
            if t is not None
        }
        own = {name: t.clone() for name, t in own.items()}
        dy = own.pop("dy")
        names = [name for name in ("x", "weight", "bias", "residual") if name in own]
        leaves = [own[name].requires_grad_() for name in names]
        y = function(**own, **settings, training=True, **more)
        grads = torch.autograd.grad(y, leaves, dy)
        found = {"y": y.detach(), **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}
        return found | {n: own[n] for n in own if n.startswith(("running", "num"))}

    exact = run(switchable_bn_act_reference, torch.float64)
    room = 2**62 if room == math.inf else int(room)
    ours = run(switchable_bn_act_in_slices, torch.float32, room=room)
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        torch.testing.assert_close(
            ours[name].double(), want.double(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
        )


def test_shared_sets_are_refused() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from bench.sliced_bn import switchable_bn_act_in_slices

    inputs = make_bn_inputs((4, 4), 64, 1)
    inputs.pop("dy")
    with pytest.raises(ValueError, match="slices are for training with one set per level"):
        switchable_bn_act_in_slices(**inputs, level_rows=(4, 4), banks=(0, 0))
