"""Learned quantisation: a value becomes one of the 2^K sums of a basis of K numbers.

    levels:  all sums of digit_j * v_j over the K numbers v_j of the basis, sorted, with digits in
             {0, 1}, or in {-1, 1} where values have a sign
    code:    c(x) = number of thresholds below x, the thresholds being half-way between neighbours
    refit:   v* = argmin over v of sum_x (x - sum_j digit_j(c(x)) v_j)^2 [+ d |v - v_old|^2]
    average: v <- 0.9 v + 0.1 v*, with the weights of the first updates corrected for there being
             nothing before them, as Adam does it: the first update replaces the initial value

Zhang et al., "LQ-Nets" (ECCV 2018), as the RS-Net paper uses it. The refit needs, of each code, how
many values have it and what they add up to; its K equations in K unknowns are solved in float64,
and an unknown that the values do not determine keeps its old value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DECAY",
    "DETERMINED",
    "MAX_BITS",
    "CodeSums",
    "check_bits",
    "digits_of",
    "keep_below",
    "move_basis",
    "quantise",
    "quantise_and_sum",
    "refit",
    "sorted_levels",
    "thresholds_of",
]

MAX_BITS = 4
DECAY = 0.9  # of the moving average
# Of a number's own square, below which what the others leave of it is rounding. At n values the
# least that integers leave is 1 / n.
DETERMINED = 1e-12
# Elements of a tile: on a CPU what its cache holds, several times over; elsewhere few enough that
# counts are exact in float32.
_CPU_TILE, _TILE = 2**17, 2**23


class CodeSums(NamedTuple):
    """Of the values that were quantised, by code."""

    counts: Tensor  # [2^K, ...] float64, how many have each code
    sums: Tensor  # [2^K, ...] float64, of them


def check_bits(name: str, bits: int) -> int:
    """Refuses a number of bits that no quantiser has.

    Raises:
        ValueError: naming it.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{name} must be 1 to {MAX_BITS}, got {bits!r}")
    return bits


def digits_of(bits: int, signed: bool, device: torch.device) -> Tensor:
    """[2^K, K] int64: the digits of each number from 0, the lowest first; -1 for 0 if signed.

    Made on the device: a copy from the host has no place in a captured step.
    """
    numbers, places = (torch.arange(n, device=device) for n in (2**bits, bits))
    digits = numbers.unsqueeze(1) >> places & 1
    return 2 * digits - 1 if signed else digits


def sorted_levels(basis: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """All sums of a basis, ascending, and the digits of each.

    Args:
        basis: [K, ...], one basis for each of the trailing places.
        signed: whether digits are -1 and 1, or 0 and 1.

    Returns:
        Levels [2^K, ...] and digits [2^K, K, ...], in the dtype of the basis.
    """
    bits = len(basis)
    digits = digits_of(bits, signed, basis.device).to(basis.dtype)
    digits = digits.view(2**bits, bits, *[1] * (basis.dim() - 1))
    levels = digits[:, 0] * basis[0]
    for j in range(1, bits):  # in this order in the kernels, too
        levels = levels + digits[:, j] * basis[j]
    levels, order = levels.sort(dim=0, stable=True)
    spread = digits.expand(2**bits, *basis.shape)
    return levels, spread.gather(0, order.unsqueeze(1).expand_as(spread))


def thresholds_of(levels: Tensor) -> Tensor:
    """[2^K - 1, ...]: half-way between neighbouring levels."""
    return 0.5 * (levels[:-1] + levels[1:])


def quantise(x: Tensor, levels: Tensor) -> Tensor:
    """The level of each value, in the dtype of the levels; NaN for one that is not finite.

    Of few operations, so that exported networks have few; :func:`quantise_and_sum` is faster.

    Args:
        x: any shape that one entry of `levels` broadcasts to.
        levels: [2^K, ...] ascending.
    """
    x = x.to(torch.promote_types(x.dtype, levels.dtype))  # thresholds are not to be rounded
    y = levels[0].expand_as(x)
    for level, threshold in zip(levels[1:], thresholds_of(levels), strict=True):
        y = torch.where(x > threshold, level, y)
    return torch.add(y, x, alpha=0)  # so that an overflow is not hidden


def quantise_and_sum(
    x: Tensor, levels: Tensor, *, summed: bool = True
) -> tuple[Tensor, CodeSums | None]:
    """As :func:`quantise`, and the counts and sums by code, in one pass.

    Tile by tile, so that a CPU does all with a value while it is in the cache, and with masks of
    numbers instead of truth values: those are compared, and chosen by, one at a time.

    Args:
        x: [G, ...] floating point, G groups of values with levels of their own.
        levels: [2^K, G] ascending.
        summed: whether anyone asks for the counts and sums.

    Returns:
        The levels, like `x`, and [2^K, G] sums, added up in float64 over tiles; NaN where a value
        is.
    """
    order = (0, *sorted(range(1, x.dim()), key=x.stride, reverse=True))  # as it lies in memory
    laid_out = x.permute(order)
    rows = laid_out.reshape(len(x), -1)
    y = torch.empty_like(rows)
    wide = torch.promote_types(x.dtype, levels.dtype)
    steps = torch.stack([levels[1:], thresholds_of(levels)], 1).to(wide).unsqueeze(3)
    lowest = levels[0].to(wide).unsqueeze(1)
    scratch = rows.new_empty(3, _tile_size(rows), dtype=wide)
    # Of what is above each threshold, everything first: sums and counts.
    above = x.new_zeros(2 * len(levels), len(x), dtype=torch.float64)
    above[1].fill_(rows.shape[1])  # an assignment would copy it from the host
    for own, columns in _tiles(rows):
        own_steps = [pair.unbind() for pair in steps[:, :, own].unbind()]
        found: list[Tensor] = []
        for piece in columns:
            part = rows[own, piece]
            # Memory that is taken anew is slower than all that is done with it.
            mask, chosen, copy = scratch[:, : part.numel()].view(3, *part.shape).unbind()
            if part.dtype != wide:
                part = copy.copy_(part)
            chosen.copy_(lowest[own])
            if summed:
                found.append(part.sum(1))
            for level, threshold in own_steps:
                torch.gt(part, threshold, out=mask)
                chosen.lerp_(level, mask)  # 0 and 1 round nothing
                if summed:
                    count = mask.sum(1)
                    found += mask.mul_(part).sum(1), count
            torch.add(chosen, part, alpha=0, out=y[own, piece])
        if found:
            by_tile = torch.stack(found).view(len(columns), -1, found[0].shape[0])
            above[0, own] = by_tile[:, 0].sum(0, dtype=torch.float64)
            above[2:, own] = by_tile[:, 1:].sum(0, dtype=torch.float64)
    back = [order.index(dim) for dim in range(x.dim())]
    by_code = None
    if summed:
        above[:-2] -= above[2:].clone()
        by_code = CodeSums(above[1::2], above[::2])
    return y.view(laid_out.shape).permute(back), by_code


def keep_below(dy: Tensor, x: Tensor, top: Tensor) -> Tensor:
    """dy where x is not above the top level, else 0, or NaN where that dy is not finite.

    Args:
        dy: like `x`, with any strides.
        x: floating point.
        top: [].
    """
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    laid_out = x.permute(order)
    rows, upstream = (t.permute(order).reshape(1, -1) for t in (x, dy))
    dx = torch.empty_like(upstream)
    wide = torch.promote_types(x.dtype, top.dtype)
    scratch = rows.new_empty(1, _tile_size(rows), dtype=dy.dtype)
    copies = rows.new_empty(1, _tile_size(rows), dtype=wide)
    for own, columns in _tiles(rows):
        for piece in columns:
            part = rows[own, piece]
            if part.dtype != wide:
                part = copies[:, : part.shape[1]].copy_(part)
            mask = torch.le(part, top, out=scratch[:, : part.shape[1]])
            torch.mul(upstream[own, piece], mask, out=dx[own, piece])
    return dx.view(laid_out.shape).permute([order.index(dim) for dim in range(x.dim())])


def _tile_size(rows: Tensor) -> int:
    """The most elements of a tile; fewer only where a row, or all of it, has fewer."""
    return max(1, min(rows.numel(), _CPU_TILE if rows.device.type == "cpu" else _TILE))


def _tiles(rows: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Rows of a matrix, and pieces of them: several whole rows, or some of one."""
    size = _tile_size(rows)
    height, width = rows.shape
    tall = max(1, size // max(1, width))
    pieces = [slice(left, left + size) for left in range(0, width, size)]
    for top in range(0, height, tall):
        yield slice(top, top + tall), pieces


def refit(basis: Tensor, digits: Tensor, by_code: CodeSums, damping: float = 0.0) -> Tensor:
    """The basis that the values with these codes are best written in.

    Args:
        basis: [K, ...] that gave the codes.
        digits: [2^K, K, ...] of each code.
        by_code: of the values.
        damping: d of the module's equations.

    Returns:
        [K, ...] float64. A number that the values do not determine is the old one.
    """
    bits, basis, digits = len(basis), basis.double(), digits.double()
    counts, sums = by_code
    weighted = digits * counts.unsqueeze(1)  # [2^K, K, ...]
    normal = (weighted.unsqueeze(2) * digits.unsqueeze(1)).sum(0)  # [K, K, ...]
    # Of the change, so that what is not determined stays: (B B^T + d) (v* - v) = B x - B B^T v.
    right = (digits * sums.unsqueeze(1)).sum(0) - (normal * basis).sum(1)
    rows = [list(row.unbind()) for row in normal]
    if damping:
        for i in range(bits):
            rows[i][i] = rows[i][i] + damping
    return basis + torch.stack(_solve(rows, list(right.unbind())))


def _solve(matrix: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """Gaussian elimination of a positive semidefinite system.

    Where a pivot is rounding, what is left of its row and column is, too: that unknown is 0.
    """
    size = len(right)
    rows = [list(row) for row in matrix]
    right = list(right)
    inverses: list[Tensor] = []
    for k in range(size):
        determined = rows[k][k] > DETERMINED * matrix[k][k]
        inverses.append(torch.where(determined, 1.0 / rows[k][k], 0.0))
        for i in range(k + 1, size):
            factor = rows[i][k] * inverses[k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
            right[i] = right[i] - factor * right[k]
    solution = [torch.zeros_like(right[0])] * size
    for k in reversed(range(size)):
        known = sum(rows[k][j] * solution[j] for j in range(k + 1, size))
        solution[k] = (right[k] - known) * inverses[k]
    return solution


def move_basis(basis: Tensor, updates: Tensor, target: Tensor, times: int = 1) -> None:
    """Takes a refitted basis into the moving average, in place and without reading on the host.

    Args:
        basis: [K, ...], changed.
        updates: [] int64, of those taken in before; changed.
        target: [K, ...], v*.
        times: how often the same target is taken in.
    """
    before = DECAY ** updates.double()
    share = (1.0 - DECAY**times) / (1.0 - before * DECAY**times)
    basis.copy_(torch.lerp(basis.double(), target, share))
    updates.add_(times)
