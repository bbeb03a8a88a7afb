"""Switchable batch norm: against formulas in float64, and its bookkeeping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rsfast.kernels import switchable_bn_act, switchable_bn_act_levels

ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: y.clamp(min=0),
    "relu6": lambda y: y.clamp(0, 6),
    "silu": lambda y: y / (1 + torch.exp(-y)),
    "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6,
}
LEVELS = [((24,), (0,)), ((24, 10), (0, 1)), ((31, 1, 2), (2, 0, 1)), ((9, 6, 3), (0, 0, 0))]


def make_inputs(
    level_rows: tuple[int, ...],
    channels: int,
    dtype: torch.dtype = torch.float64,
    num_banks: int = 3,
    scale: float = 1.0,
    shift: float = 0.0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": (scale * normal(sum(level_rows), channels) + shift).to(dtype),
        "weight": (1 + 0.3 * normal(num_banks, channels)).to(params),
        "bias": normal(num_banks, channels).to(params),
        "running_mean": normal(num_banks, channels).to(params),
        "running_var": (0.5 + normal(num_banks, channels) ** 2).to(params),
        "num_batches_tracked": torch.zeros(num_banks, dtype=torch.int64),
    }


def by_hand(
    inputs: dict[str, Tensor],
    level_rows: tuple[int, ...],
    banks: tuple[int, ...],
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    training: bool = True,
) -> Tensor:
    """The formula of the module docstring, without touching the running statistics."""
    levels = []
    for rows, bank in zip(inputs["x"].split(level_rows), banks, strict=True):
        mean, var = inputs["running_mean"][bank], inputs["running_var"][bank]
        if training:
            mean = rows.mean(0)
            var = ((rows - mean) ** 2).mean(0)
        normed = (rows - mean) / torch.sqrt(var + 1e-5)
        levels.append(normed * inputs["weight"][bank] + inputs["bias"][bank])
    y = torch.cat(levels)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS), ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize(("level_rows", "banks"), LEVELS, ids=str)
def test_output_and_gradients_match_the_formula(
    level_rows: tuple[int, ...],
    banks: tuple[int, ...],
    with_residual: bool,
    activation: str | None,
    training: bool,
) -> None:
    inputs = make_inputs(level_rows, channels=5)
    residual = torch.randn(sum(level_rows), 5, dtype=torch.float64) if with_residual else None
    options = {"residual": residual, "activation": activation, "training": training}
    wanted = [inputs["x"], inputs["weight"], inputs["bias"]]
    wanted += [residual] if residual is not None else []
    for tensor in wanted:
        tensor.requires_grad_()
    exact = by_hand(inputs, level_rows, banks, **options)
    dy = torch.randn_like(exact)
    exact_grads = torch.autograd.grad(exact, wanted, dy)

    y = switchable_bn_act(**inputs, level_rows=level_rows, banks=banks, **options)
    grads = torch.autograd.grad(y, wanted, dy)

    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, exact_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 3, 65])
def test_odd_channel_counts(channels: int) -> None:
    inputs = make_inputs((31, 7), channels)
    exact = by_hand(inputs, (31, 7), (0, 1))
    y = switchable_bn_act(**inputs, level_rows=(31, 7), banks=(0, 1), training=True)
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, 1e4), (1e-3, 0.0)], ids=str)
def test_float32_is_as_good_as_pytorch(scale: float, shift: float) -> None:
    inputs = make_inputs((64, 24), 16, torch.float32, scale=scale, shift=shift)
    exact = by_hand({k: v.double() for k, v in inputs.items()}, (64, 24), (0, 1))
    eager = torch.cat(
        [
            torch.nn.functional.batch_norm(
                rows, None, None, inputs["weight"][bank], inputs["bias"][bank], True
            )
            for bank, rows in enumerate(inputs["x"].split((64, 24)))
        ]
    )
    y = switchable_bn_act(**inputs, level_rows=(64, 24), banks=(0, 1), training=True)
    ours, theirs = ((out.double() - exact).abs().max() for out in (y, eager))
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps


def test_running_statistics_follow_pytorch_over_several_steps() -> None:
    inputs = make_inputs((12, 8), 4)
    norms = [torch.nn.BatchNorm1d(4).double() for _ in range(3)]
    for bank, norm in enumerate(norms):
        norm.running_mean.copy_(inputs["running_mean"][bank])
        norm.running_var.copy_(inputs["running_var"][bank])
    for step in range(4):
        x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        inputs["x"] = x
        switchable_bn_act(**inputs, level_rows=(12, 8), banks=(2, 0), training=True)
        norms[2](x[:12])
        norms[0](x[12:])
    for bank, norm in enumerate(norms):
        torch.testing.assert_close(inputs["running_mean"][bank], norm.running_mean)
        torch.testing.assert_close(inputs["running_var"][bank], norm.running_var)
        assert inputs["num_batches_tracked"][bank] == norm.num_batches_tracked


def test_one_row_is_its_own_mean_and_has_no_variance() -> None:
    inputs = make_inputs((1,), 4)
    before_var = inputs["running_var"].clone()
    y = switchable_bn_act(**inputs, level_rows=(1,), banks=(1,), training=True)
    torch.testing.assert_close(y[0], inputs["bias"][1])
    torch.testing.assert_close(inputs["running_var"][1], 0.9 * before_var[1])
    assert inputs["num_batches_tracked"].tolist() == [0, 1, 0]


def test_constant_channel_gives_the_bias_and_finite_gradients() -> None:
    inputs = make_inputs((16,), 3)
    inputs["x"] = torch.full((16, 3), 7.0, dtype=torch.float64, requires_grad=True)
    y = switchable_bn_act(**inputs, level_rows=(16,), banks=(0,), training=True)
    torch.testing.assert_close(y, inputs["bias"][0].expand(16, 3))
    (dx,) = torch.autograd.grad(y, inputs["x"], torch.randn_like(y))
    assert torch.isfinite(dx).all()


def test_evaluation_leaves_the_statistics_alone() -> None:
    inputs = make_inputs((8, 4), 3)
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = {name: inputs[name].clone() for name in names}
    switchable_bn_act(**inputs, level_rows=(8, 4), banks=(0, 1), training=False)
    assert all(torch.equal(inputs[name], before[name]) for name in names)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize(("level_rows", "banks"), LEVELS, ids=str)
def test_levels_of_their_own_give_the_same_bits_as_packed_ones(
    level_rows: tuple[int, ...], banks: tuple[int, ...], with_residual: bool, training: bool
) -> None:
    packed, apart = (make_inputs(level_rows, channels=5) for _ in range(2))
    residual = torch.randn(sum(level_rows), 5, dtype=torch.float64) if with_residual else None
    options = {"activation": "relu", "training": training}
    y = switchable_bn_act(
        **packed, level_rows=level_rows, banks=banks, residual=residual, **options
    )
    levels = [rows.clone() for rows in apart.pop("x").split(level_rows)]
    own = [rows.clone() for rows in residual.split(level_rows)] if with_residual else None
    outputs = switchable_bn_act_levels(levels, **apart, banks=banks, residual=own, **options)
    assert torch.equal(torch.cat(outputs), y)
    assert all(torch.equal(apart[name], packed[name]) for name in apart)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, "levels must be at least one tensor"),
        ({"levels": [torch.zeros(3, 4).t()] * 2}, "levels must be contiguous floating point"),
        ({"levels": [torch.zeros(4, 3), torch.zeros(4, 2)]}, "levels must have one number of"),
        ({"banks": (0,)}, "banks must name one of 3 banks for each of 2 levels"),
        ({"residual": [torch.zeros(4, 3)]}, "residual must have a tensor for each of 2 levels"),
        ({"residual": [torch.zeros(4, 3)] * 2}, "residual must be"),
        ({"activation": "gelu"}, "activation must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_levels_are_named(change: dict[str, Any], message: str) -> None:
    inputs = make_inputs((4, 2), 3)
    levels = list(inputs.pop("x").split((4, 2)))
    with pytest.raises(ValueError, match=message):
        switchable_bn_act_levels(**{**inputs, "levels": levels, "banks": (0, 1), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x must be contiguous"),
        ({"x": torch.zeros(3, 20, dtype=torch.float64).t()}, "x must be contiguous"),
        ({"weight": torch.ones(3, 4)}, "weight must be"),
        ({"level_rows": (12, 9)}, "level_rows must add up to the 20 rows"),
        ({"banks": (0, 3)}, "banks must name one of 3 banks"),
        ({"banks": (0,)}, "banks must name one of 3 banks"),
        ({"residual": torch.zeros(20, 4, dtype=torch.float64)}, "residual must be"),
        ({"residual": torch.zeros(20, 3)}, "residual must be"),
        ({"activation": "gelu"}, "activation must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {**make_inputs((12, 8), 3), "level_rows": (12, 8), "banks": (0, 1), **change}
    with pytest.raises(ValueError, match=message):
        switchable_bn_act(**arguments)
