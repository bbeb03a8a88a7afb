"""The quantisers: levels, refit and moving average by hand, gradients, and what moves when."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from rsfast import Pyramid
from rsfast.kernels.common.basis import (
    DECAY,
    CodeSums,
    move_basis,
    quantise,
    quantise_and_sum,
    refit,
    sorted_levels,
)
from rsfast.models.lq import LQActivation, LQConv2d, LQWeight

DAMPING = 1e-4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def half_normal(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).clamp_min(0.0)


def sums_of(x: Tensor, levels: Tensor) -> CodeSums:
    _, found = quantise_and_sum(x.unsqueeze(0), levels.unsqueeze(1))
    assert found is not None
    return CodeSums(*(part.squeeze(1) for part in found))


def refit_to(x: Tensor, basis: Tensor) -> Tensor:
    """The refit of an activation's basis to all values."""
    levels, digits = sorted_levels(basis, signed=False)
    return refit(basis, digits, sums_of(x, levels))


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_all_sums_of_the_basis_in_order(signed: bool) -> None:
    basis = torch.tensor([0.5, 1.75, -0.25], dtype=torch.float64)
    levels, digits = sorted_levels(basis, signed)
    low = -1 if signed else 0
    expected = [a * 0.5 + b * 1.75 - c * 0.25 for a in (low, 1) for b in (low, 1) for c in (low, 1)]
    assert levels.tolist() == sorted(expected)
    torch.testing.assert_close(digits @ basis, levels)


def test_a_value_takes_the_nearest_level_and_what_is_not_finite_stays_visible() -> None:
    levels = torch.tensor([0.0, 1.0, 3.0, 4.0])
    x = torch.tensor([-9.0, 0.4, 0.6, 1.9, 2.1, 3.4, 3.6, 99.0])
    assert quantise(x, levels).tolist() == [0.0, 0.0, 1.0, 1.0, 3.0, 3.0, 4.0, 4.0]
    assert quantise(torch.tensor([math.inf, -math.inf, math.nan]), levels).isnan().all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_weight_on_its_levels_is_reproduced_and_its_basis_stays(bits: int) -> None:
    quantizer = LQWeight(5, 3, bits).double()
    with torch.no_grad():
        quantizer.basis.mul_(torch.linspace(0.5, 2.0, 5))
    before = quantizer.basis.clone()
    levels, _ = sorted_levels(before, signed=True)  # [2^K, C_out]
    codes = torch.randint(2**bits, (5, 7 * 9), generator=generator())
    weight = levels.t().gather(1, codes).view(5, 7, 3, 3)
    for _ in range(3):
        torch.testing.assert_close(quantizer(weight), weight, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(quantizer.basis, before, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_activations_on_their_levels_are_reproduced_and_their_basis_stays(bits: int) -> None:
    quantizer = LQActivation(bits).double()
    before = quantizer.basis.clone()
    levels, _ = sorted_levels(before, signed=False)
    x = levels[torch.randint(2**bits, (4, 3, 8, 8), generator=generator())]
    for _ in range(3):
        torch.testing.assert_close(quantizer(x), x, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(quantizer.basis, before, rtol=1e-10, atol=1e-12)


def test_two_bits_of_a_normal_weight_come_near_the_best_four_levels() -> None:
    """Of which Lloyd and Max say that they leave 0.1175 of a normal variable's variance."""
    weight = torch.empty(128, 256, 3, 3)
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator())
    quantizer = LQWeight(128, 3, 2)
    for _ in range(20):
        quantizer(weight)
    left = (quantizer.eval()(weight) - weight).square().sum() / weight.square().sum()
    assert left.item() == pytest.approx(0.1175, rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("damping", [0.0, DAMPING, 10.0])
def test_the_refit_of_activations_is_the_dense_least_squares_solution(
    bits: int, damping: float
) -> None:
    basis = LQActivation(bits).double().basis
    x = half_normal(4000) * (3.0 if bits > 2 else 1.0)  # so that no level is without values
    levels, digits = sorted_levels(basis, signed=False)
    found = refit(basis, digits, sums_of(x, levels), damping)
    torch.testing.assert_close(found, dense(x, levels, digits, basis, damping), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_refit_of_weights_is_that_of_each_output_channel_alone(bits: int) -> None:
    quantizer = LQWeight(6, 3, bits).double()
    basis = quantizer.basis.clone()
    weight = normal(6, 20, 3, 3) * basis.abs().sum(0).view(6, 1, 1, 1)
    quantizer(weight)  # the first update replaces the basis by its refit
    levels, digits = sorted_levels(basis, signed=True)
    for channel in range(6):
        own = levels[:, channel], digits[:, :, channel], basis[:, channel]
        expected = dense(weight[channel].flatten(), *own, DAMPING)
        torch.testing.assert_close(quantizer.basis[:, channel], expected, rtol=0, atol=1e-10)


def dense(x: Tensor, levels: Tensor, digits: Tensor, basis: Tensor, damping: float) -> Tensor:
    """By the matrix of all values' digits, with a row for each number of the damped basis."""
    codes = (x.unsqueeze(1) > 0.5 * (levels[1:] + levels[:-1])).sum(1)
    pull = math.sqrt(damping)
    matrix = torch.cat([digits[codes], pull * torch.eye(len(basis), dtype=x.dtype)])
    right = torch.cat([x, pull * basis])
    return torch.linalg.lstsq(matrix, right.unsqueeze(1), driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [0.0, 0.3, 1e-30, 1e6, -2.0])
def test_values_that_do_not_determine_the_basis_leave_it_finite(bits: int, value: float) -> None:
    quantizer = LQActivation(bits)
    before = quantizer.basis.clone()
    x = torch.full((2, 3, 4, 4), value)
    for _ in range(5):
        assert quantizer(x).isfinite().all()
    assert quantizer.basis.isfinite().all()
    levels, digits = sorted_levels(before, signed=False)
    code = int((torch.tensor(value) > 0.5 * (levels[1:] + levels[:-1])).sum())
    untouched = digits[code] == 0  # numbers that no value is made of
    assert torch.equal(quantizer.basis[untouched], before[untouched])


def test_what_the_values_leave_open_stays_and_the_rest_is_fitted() -> None:
    """Of 3 bits, values that have the lowest digit, or that and the highest."""
    basis = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    x = torch.tensor([1.2, 1.2, 5.4], dtype=torch.float64)
    torch.testing.assert_close(
        refit_to(x, basis), torch.tensor([1.2, 2.0, 4.2], dtype=torch.float64)
    )


def test_the_first_update_replaces_the_basis_and_the_second_is_the_debiased_average() -> None:
    quantizer = LQActivation(2).double()
    targets, average, weights = [], 0.0, 0.0
    for seed in range(4):
        x = half_normal(3, 4, 8, 8, seed=seed) * (1.0 + seed)
        targets.append(refit_to(x, quantizer.basis))
        quantizer(x)
        average = DECAY * average + (1 - DECAY) * targets[-1]
        weights = DECAY * weights + (1 - DECAY)
        torch.testing.assert_close(quantizer.basis, average / weights, rtol=1e-12, atol=0.0)
        assert quantizer.updates.item() == seed + 1
        if not seed:
            torch.testing.assert_close(quantizer.basis, targets[0], rtol=1e-12, atol=0.0)
    assert 1 - weights == pytest.approx(DECAY**4)


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_target_taken_in_several_times_is_one_update_with_their_joint_weight(times: int) -> None:
    basis, target = normal(3), normal(3, seed=1)
    at_once, in_turn = basis.clone(), basis.clone()
    for moved, calls in ((at_once, [times]), (in_turn, [1] * times)):
        updates = torch.tensor(2)
        for call in calls:
            move_basis(moved, updates, target, call)
        assert updates.item() == 2 + times
    torch.testing.assert_close(at_once, in_turn, rtol=1e-12, atol=0.0)


def test_a_weight_is_moved_once_for_each_level_that_it_meets() -> None:
    weight = normal(4, 3, 3, 3)
    one, three = (LQWeight(4, 3, 2).double() for _ in range(2))
    for quantizer, num_levels in ((one, 1), (three, 3)):
        quantizer(weight * 0.1, num_levels)
        quantizer(weight, num_levels)
    assert (one.updates.item(), three.updates.item()) == (2, 6)
    quantizer = LQWeight(4, 3, 2).double()
    for moved in (weight * 0.1, weight):
        levels, digits = sorted_levels(quantizer.basis, signed=True)
        _, by_code = quantise_and_sum(moved, levels)
        assert by_code is not None
        target = refit(quantizer.basis, digits, by_code, DAMPING)
        for _ in range(3):
            move_basis(quantizer.basis, quantizer.updates, target)
    torch.testing.assert_close(three.basis, quantizer.basis, rtol=1e-12, atol=0.0)
    assert not torch.allclose(one.basis, three.basis, rtol=1e-3)


def test_a_frozen_weight_keeps_its_basis() -> None:
    conv = LQConv2d(3, 4, 3, bits=2)
    conv(normal(2, 3, 8, 8).float())
    assert conv.quantizer.updates == 1
    before = conv.quantizer.basis.clone()
    conv.weight.requires_grad_(False)
    conv(normal(2, 3, 8, 8).float())
    assert conv.quantizer.updates == 1
    assert torch.equal(conv.quantizer.basis, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_plain_module_gives_every_value_the_same_level(dtype: torch.dtype) -> None:
    quantizer = LQActivation(2).eval()
    x = half_normal(50_000).to(dtype)
    assert torch.equal(quantizer.as_plain_module()(x), quantizer(x))


def levels_of(seed: int = 0) -> list[Tensor]:
    """Of one pyramid, each on a scale of its own."""
    return [half_normal(2, 4, r, r, seed=seed + r) * r / 8 for r in (12, 8, 6)]


@pytest.mark.parametrize("largest_only", [False, True])
def test_a_pyramid_is_quantised_with_one_basis_which_its_levels_then_move_in_turn(
    largest_only: bool,
) -> None:
    quantizer = LQActivation(2).double()
    quantizer.largest_only = largest_only
    quantizer(levels_of()[0])
    basis, updates = quantizer.basis.clone(), quantizer.updates.clone()
    parts = levels_of(1)
    found = quantizer(Pyramid.pack(parts)).levels()
    levels, _ = sorted_levels(basis, signed=False)
    targets = [refit_to(part, basis) for part in parts]
    for ours, part in zip(found, parts, strict=True):
        assert torch.equal(ours, quantise(part, levels))
    for target in targets[:1] if largest_only else targets:
        move_basis(basis, updates, target)
    torch.testing.assert_close(quantizer.basis, basis, rtol=1e-12, atol=0.0)
    assert quantizer.updates == updates


@pytest.mark.parametrize("kind", [LQWeight, LQActivation])
def test_evaluation_moves_nothing(kind: type[nn.Module]) -> None:
    quantizer = kind(4, 3, 2) if kind is LQWeight else kind(2)
    before = copy.deepcopy(quantizer.state_dict())
    values = normal(4, 3, 3, 3).float().abs()
    quantizer.eval()(values)
    with torch.no_grad():
        quantizer(values)
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    quantizer.train()(values)
    assert quantizer.updates == 1


@pytest.mark.parametrize("kind", ["weight", "activation", "activation of a pyramid"])
def test_gradients_are_those_of_the_straight_through_rule(kind: str) -> None:
    """Which are those of the loss by what it sees, found by small steps there; 0 above the top."""
    if kind == "weight":
        quantizer: nn.Module = LQWeight(4, 3, 2).double()
        x = normal(4, 2, 3, 3)
    else:
        quantizer = LQActivation(2).double()
        x = normal(2, 3, 5, 5) * 2.0  # values below 0 and above the top level, too
    parts = [x, x[:, :, :3, :3] * 1.5] if kind.endswith("pyramid") else [x]
    parts = [part.clone().requires_grad_() for part in parts]
    top = sorted_levels(quantizer.basis, signed=False)[0][-1]  # type: ignore[arg-type]

    def loss_of(seen: Tensor) -> Tensor:
        return (seen.sin() * torch.arange(seen.numel()).view_as(seen)).sum()

    seen = quantizer(Pyramid.pack(parts)).levels() if len(parts) > 1 else [quantizer(parts[0])]
    sum(loss_of(part) for part in seen).backward()
    step = 1e-6
    above = 0
    for part, values in zip(parts, seen, strict=True):
        moved = values.detach().flatten()
        for n in range(0, moved.numel(), 3):
            nudge = torch.zeros_like(moved)
            nudge[n] = step
            ends = [loss_of((moved + sign * nudge).view_as(values)) for sign in (1, -1)]
            expected = ((ends[0] - ends[1]) / (2 * step)).item()
            if kind != "weight" and part.flatten()[n] > top:
                expected, above = 0.0, above + 1
            assert part.grad.flatten()[n].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (above > 0) == (kind != "weight")
