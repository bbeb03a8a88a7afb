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

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DECAY",
    "MAX_BITS",
    "CodeSums",
    "check_bits",
    "code_sums",
    "digits_of",
    "move_basis",
    "quantise",
    "refit",
    "sorted_levels",
    "thresholds_of",
]

MAX_BITS = 4
DECAY = 0.9  # of the moving average
# Of a number's own square, below which what the others leave of it is rounding. At n values the
# least that integers leave is 1 / n.
_DETERMINED = 1e-12


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

    Args:
        x: any shape that one entry of `levels` broadcasts to.
        levels: [2^K, ...] ascending.
    """
    y = levels[0].expand_as(x)
    for level, threshold in zip(levels[1:], thresholds_of(levels), strict=True):
        y = torch.where(x > threshold, level, y)
    return torch.add(y, x, alpha=0)  # so that an overflow is not hidden


def code_sums(x: Tensor, levels: Tensor, dims: list[int]) -> CodeSums:
    """Counts and sums by code, over some dimensions.

    Args:
        x: as for :func:`quantise`.
        levels: likewise.
        dims: of `x`, that are summed over.
    """
    wide = x.double()
    sums = [wide.sum(dims)]
    zero = torch.zeros_like(sums[0])
    counts = [torch.full_like(zero, x.numel() // zero.numel())]
    for threshold in thresholds_of(levels):
        above = x > threshold
        counts.append(above.sum(dims).double())
        sums.append(torch.where(above, wide, 0.0).sum(dims))
    return CodeSums(*(-torch.diff(torch.stack([*part, zero]), dim=0) for part in (counts, sums)))


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
    normal = [
        [(digits[:, i] * digits[:, j] * counts).sum(0) for j in range(bits)] for i in range(bits)
    ]
    # Of the change, so that what is not determined stays: (B B^T + d) (v* - v) = B x - B B^T v.
    right = [
        (digits[:, i] * sums).sum(0) - sum(normal[i][j] * basis[j] for j in range(bits))
        for i in range(bits)
    ]
    for i in range(bits):
        normal[i][i] = normal[i][i] + damping
    return basis + torch.stack(_solve(normal, right))


def _solve(matrix: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """Gaussian elimination of a positive semidefinite system.

    Where a pivot is rounding, what is left of its row and column is, too: that unknown is 0.
    """
    size = len(right)
    rows = [list(row) for row in matrix]
    right = list(right)
    inverses: list[Tensor] = []
    for k in range(size):
        determined = rows[k][k] > _DETERMINED * matrix[k][k]
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
