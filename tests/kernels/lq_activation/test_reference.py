"""Quantised activations in plain PyTorch, against formulas in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rsfast.kernels import lq_activation, lq_activation_levels
from rsfast.kernels.common import basis as basis_module
from rsfast.kernels.common.basis import quantise, quantise_and_sum, sorted_levels

BASES = [(0.7,), (0.45, 0.9), (0.3, 0.2, 0.9), (0.11, 0.19, 0.42, 0.77), (0.8, -0.3)]


def values(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).relu().to(dtype)


def state(basis: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return torch.tensor(basis, dtype=torch.float64), torch.zeros((), dtype=torch.int64)


def nearest(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The level next to each value, and its digits [K, n]."""
    digits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(basis))), dtype=x.dtype)
    distance = (x.flatten()[:, None] - digits @ basis).abs()
    chosen = digits[distance.argmin(1)]
    return (chosen @ basis).view(x.shape), chosen.t()


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_each_value_becomes_the_level_next_to_it(basis: tuple[float, ...]) -> None:
    vector, updates = state(basis)
    x = values(13, 7)
    y = lq_activation(x, vector, updates, (8, 5))
    torch.testing.assert_close(y, nearest(x, vector)[0], rtol=1e-12, atol=1e-12)
    assert updates == 0


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_the_first_refit_is_that_of_dense_least_squares(basis: tuple[float, ...]) -> None:
    vector, updates = state(basis)
    x = values(60, 7)
    _, digits = nearest(x, vector)
    (want,) = torch.linalg.lstsq(digits.t(), x.flatten()[:, None]).solution.unbind(1)
    lq_activation(x, vector, updates, (60,), moving=1)
    torch.testing.assert_close(vector, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_the_gradient_is_that_of_cutting_at_the_top_level(basis: tuple[float, ...]) -> None:
    vector, updates = state(basis)
    top = sorted_levels(vector, signed=False)[0][-1].item()
    x, dy = values(9, 7).requires_grad_(), values(9, 7) - 0.3
    (dx,) = torch.autograd.grad(lq_activation(x, vector, updates, (9,)), x, dy)
    step = 1e-6
    higher, lower = ((x + sign * step).clamp(max=top) for sign in (1, -1))
    torch.testing.assert_close(dx, dy * (higher - lower).detach() / (2 * step))


def test_at_the_top_level_the_gradient_still_passes() -> None:
    vector, updates = state((0.5, 1.0))
    x = torch.tensor([[1.5, 1.5 + 1e-12]], dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(lq_activation(x, vector, updates, (1,)).sum(), x)
    assert dx.tolist() == [[1.0, 0.0]]


def test_half_precision_is_compared_exactly_with_float32_thresholds() -> None:
    threshold = torch.tensor([0.0, 1.0 + 2**-20])  # bfloat16 has 1, and nothing in between
    x = torch.tensor([[0.5, 0.5078125]]).bfloat16()
    y = lq_activation(x, threshold[1:], torch.zeros((), dtype=torch.int64), (1,))
    assert y.tolist() == [[0.0, 1.0]]
    dx_at = torch.tensor([[1.0]]).bfloat16().requires_grad_()
    top = torch.tensor([1.0 - 2**-20])  # would round to 1
    y = lq_activation(dx_at, top, torch.zeros((), dtype=torch.int64), (1,))
    assert torch.autograd.grad(y.sum(), dx_at)[0].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
@pytest.mark.parametrize("groups", [1, 6])
def test_tiles_of_any_size_give_the_same(
    groups: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = values(groups, 5, 3, 3, dtype=dtype)
    vector = torch.rand(2, groups, generator=torch.Generator().manual_seed(1))
    levels, _ = sorted_levels(vector, signed=True)
    monkeypatch.setattr(basis_module, "_CPU_TILE", size)
    y, by_code = quantise_and_sum(x, levels)
    want = quantise(x.float() if dtype == torch.bfloat16 else x, levels[..., None, None, None])
    assert y.dtype == dtype
    assert torch.equal(y, want.to(dtype))
    assert by_code is not None
    for code, level in enumerate(levels):
        mine = want == level[:, None, None, None].to(want.dtype)
        assert by_code.counts[code].tolist() == mine.sum((1, 2, 3)).tolist()
        total = torch.where(mine, x.double(), 0.0).sum((1, 2, 3))
        torch.testing.assert_close(by_code.sums[code], total, rtol=1e-5, atol=1e-5)


def test_strides_are_kept_and_do_not_matter() -> None:
    x = values(2, 5, 4, 3)
    vector, updates = state((0.45, 0.9))
    (want,) = lq_activation_levels([x], vector, updates)
    other = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    (y,) = lq_activation_levels([other], vector, updates)
    assert y.stride() == other.stride()
    assert torch.equal(y, want)
    dy = values(2, 5, 4, 3) - 0.3
    (dx,) = torch.autograd.grad(y, other, dy)
    assert torch.equal(dx, dy * (x <= vector.sum()))


def test_levels_move_the_basis_in_turn_and_all_are_quantised_with_the_first() -> None:
    parts = [values(30, 4), 2 * values(20, 4), values(1, 4)]
    vector, updates = state((0.45, 0.9))
    outputs = lq_activation_levels(parts, vector, updates, moving=2)
    start, _ = state((0.45, 0.9))
    for x, y in zip(parts, outputs, strict=True):
        torch.testing.assert_close(y, nearest(x, start)[0])
    targets = [
        torch.linalg.lstsq(nearest(x, start)[1].t(), x.flatten()[:, None]).solution[:, 0]
        for x in parts[:2]
    ]
    want = targets[0] + 0.1 / (1 - 0.9**2) * (targets[1] - targets[0])
    torch.testing.assert_close(vector, want, rtol=1e-10, atol=1e-10)
    assert updates == 2


def test_a_level_without_values_changes_nothing() -> None:
    vector, updates = state((0.45, 0.9))
    x = values(0, 4).requires_grad_()
    (y,) = lq_activation_levels([x], vector, updates, moving=1)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == dx.shape == (0, 4)
    assert vector.tolist() == [0.45, 0.9]


def test_values_that_are_no_numbers_with_a_point_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every one of parts must be floating point, got torch.i"):
        lq_activation_levels([torch.zeros(3, dtype=torch.int64)], *state((1.0,)))
