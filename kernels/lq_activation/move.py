"""Triton kernels that move the basis of :mod:`rsfast.kernels.lq_activation.op`: one program each.

They compute what :mod:`rsfast.kernels.common.basis` does, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.basis import DECAY, DETERMINED
from rsfast.kernels.common.launch import OPTIONS, on_device_of
from rsfast.kernels.lq_activation.tiles import codes_of, load_levels, share_rows_out

__all__ = ["BLOCK_P", "CONSTANTS", "code_sums", "move", "size_of"]

BLOCK_P = 64  # programs whose results are added up at a time
CONSTANTS = {"DECAY": DECAY, "DETERMINED": DETERMINED}


@triton.jit
def _code_sums(
    counts_ptr,  # [2^K, P] int32 of values above each threshold, all first
    sums_ptr,  # [2^K, P] float32, likewise
    wanted,  # level
    level_rows,
    share_rows,
    groups,  # of channels, each with a program
    num_programs,  # P
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """(counts, sums) [2^K] float64, by code, of a level."""
    first = 0
    programs = 0
    earlier = 0
    for level in tl.static_range(L):
        own = tl.cdiv((level_rows[level] >> 1) - 1, share_rows) * groups
        first = tl.where(level == wanted, earlier, first)
        programs = tl.where(level == wanted, own, programs)
        earlier += own
    code = tl.arange(0, 2**K)[:, None]
    lanes = tl.arange(0, BLOCK_P)[None, :]
    counts = tl.zeros((2**K, BLOCK_P), tl.float64)
    sums = tl.zeros((2**K, BLOCK_P), tl.float64)
    for start in range(0, programs, BLOCK_P):
        mask = start + lanes < programs
        mask_above = mask & (code + 1 < 2**K)
        places = code * num_programs + first + start + lanes
        above = places + num_programs
        counts += tl.load(counts_ptr + places, mask=mask, other=0).to(tl.float64)
        counts -= tl.load(counts_ptr + above, mask=mask_above, other=0).to(tl.float64)
        sums += tl.load(sums_ptr + places, mask=mask, other=0.0).to(tl.float64)
        sums -= tl.load(sums_ptr + above, mask=mask_above, other=0.0).to(tl.float64)
    return tl.sum(counts, 1), tl.sum(sums, 1)


@triton.jit(do_not_specialize=["share_rows", "groups", "num_programs"])
def _lq_code_sums_kernel(
    counts_ptr,  # [2^K, P] int32
    sums_ptr,  # [2^K, P] float32
    by_code_ptr,  # [levels that move, 2, 2^K] float64: counts and sums, fully overwritten
    level_rows,
    share_rows,
    groups,
    num_programs,
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    level = tl.program_id(0)
    by_code_ptr += level * 2 * 2**K + tl.arange(0, 2**K)
    counts, sums = _code_sums(
        counts_ptr,
        sums_ptr,
        level,
        level_rows,
        share_rows,
        groups,
        num_programs,
        L,
        K,
        BLOCK_P,
    )
    tl.store(by_code_ptr, counts)
    tl.store(by_code_ptr + 2**K, sums)


@triton.jit
def _solve(
    matrix,  # [SIZE, SIZE] float64, positive semidefinite
    right,  # [SIZE] float64
    K: tl.constexpr,  # equations; the rest is 0
    SIZE: tl.constexpr,
    DETERMINED: tl.constexpr,
):
    """[SIZE]: the elimination of kernels/common/basis.py; what is not determined is 0."""
    row = tl.arange(0, SIZE)[:, None]
    col = tl.arange(0, SIZE)[None, :]
    place = tl.arange(0, SIZE)
    diagonal = tl.sum(tl.where(row == col, matrix, 0.0), 0)
    inverses = tl.zeros((SIZE,), tl.float64)
    for k in tl.static_range(K):
        pivots = tl.sum(tl.where(row == k, matrix, 0.0), 0)
        pivot = tl.sum(tl.where(place == k, pivots, 0.0), 0)
        determined = pivot > DETERMINED * tl.sum(tl.where(place == k, diagonal, 0.0), 0)
        inverse = tl.where(determined, 1.0 / tl.where(determined, pivot, 1.0), 0.0)
        column = tl.sum(tl.where(col == k, matrix, 0.0), 1)
        factor = tl.where(place > k, column * inverse, 0.0)
        pivot_right = tl.sum(tl.where(place == k, right, 0.0), 0)
        matrix -= factor[:, None] * pivots[None, :]
        right -= factor * pivot_right
        inverses = tl.where(place == k, inverse, inverses)
    solution = tl.zeros((SIZE,), tl.float64)
    for k in tl.static_range(K - 1, -1, -1):
        upper = tl.sum(tl.where((row == k) & (col > k), matrix, 0.0), 0)
        rest = right - tl.sum(upper * solution, 0)
        solution = tl.where(place == k, rest * inverses, solution)
    return solution


@triton.jit(do_not_specialize=["share_rows", "groups", "num_programs"])
def _lq_move_kernel(
    counts_ptr,  # [2^K, P] int32; None where by_code_ptr is given
    sums_ptr,  # [2^K, P] float32; likewise
    by_code_ptr,  # [MOVING, 2, 2^K] float64, counts and sums of all ranks, or None
    basis_ptr,  # [K] float32, moved
    updates_ptr,  # [] int64, MOVING is added
    level_rows,
    share_rows,
    groups,
    num_programs,
    L: tl.constexpr,
    K: tl.constexpr,
    MOVING: tl.constexpr,
    FROM_PARTIAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DECAY: tl.constexpr,
    DETERMINED: tl.constexpr,
):
    number = tl.arange(0, 2**K)
    place = tl.arange(0, SIZE)
    codes = codes_of(load_levels(basis_ptr, K), K)
    number_of_code = tl.sum(tl.where(codes[None, :] == number[:, None], number[None, :], 0), 1)
    digits = ((number_of_code[:, None] >> place[None, :]) & 1).to(tl.float64)
    basis = tl.load(basis_ptr + place, mask=place < K, other=0.0).to(tl.float64)
    updates = tl.load(updates_ptr)
    for level in tl.static_range(MOVING):
        if FROM_PARTIAL:
            counts, sums = _code_sums(
                counts_ptr,
                sums_ptr,
                level,
                level_rows,
                share_rows,
                groups,
                num_programs,
                L,
                K,
                BLOCK_P,
            )
        else:
            counts = tl.load(by_code_ptr + 2 * level * 2**K + number)
            sums = tl.load(by_code_ptr + (2 * level + 1) * 2**K + number)
        both = digits[:, :, None] * digits[:, None, :]
        normal = tl.sum(both * counts[:, None, None], 0)
        right = tl.sum(digits * sums[:, None], 0) - tl.sum(normal * basis[None, :], 1)
        change = _solve(normal, right, K, SIZE, DETERMINED)
        before = tl.full((), 1.0, tl.float64)  # DECAY ** updates
        for bit in tl.static_range(10):  # beyond, it is 0 beside 1
            power = before * (DECAY ** (2**bit))
            before = tl.where(((tl.minimum(updates, 1023) >> bit) & 1) != 0, power, before)
        basis += change * ((1.0 - DECAY) / (1.0 - before * DECAY))
        basis = basis.to(tl.float32).to(tl.float64)  # as it is kept from level to level
        updates += 1
    tl.store(basis_ptr + place, basis.to(tl.float32), mask=place < K)
    tl.store(updates_ptr, updates)


def size_of(bits: int) -> int:
    """Of the matrix in which K equations are solved, a power of two."""
    return 2 if bits < 3 else 4


def _shape(
    level_rows: Sequence[int], num_channels: int, bits: int
) -> tuple[tuple[object, ...], dict[str, int]]:
    """What the kernels are told of the forward launch, as arguments and as constants."""
    shares = share_rows_out(level_rows, num_channels, bits)
    rows, _, share_rows = shares.levels
    groups, total = shares.grid
    constants = {"L": len(level_rows), "K": bits, "BLOCK_P": BLOCK_P}
    return (rows, share_rows, groups, groups * total), constants


def code_sums(
    counts: Tensor, sums: Tensor, level_rows: Sequence[int], num_channels: int, moving: int
) -> Tensor:
    """[moving, 2, 2^K] float64, counts and sums by code of each level that moves. One launch."""
    bits = len(counts).bit_length() - 1
    by_code = sums.new_empty(moving, 2, len(counts), dtype=torch.float64)
    shape, constants = _shape(level_rows, num_channels, bits)
    with on_device_of(counts):
        _lq_code_sums_kernel[(moving,)](counts, sums, by_code, *shape, **constants, **OPTIONS)
    return by_code


def move(
    counts: Tensor,
    sums: Tensor,
    by_code: Tensor | None,
    basis: Tensor,
    updates: Tensor,
    level_rows: Sequence[int],
    num_channels: int,
    moving: int,
) -> None:
    """Moves `basis` and `updates`; by `by_code` if that is given, else by the rest. One launch."""
    bits = len(basis)
    partial = (counts, sums) if by_code is None else (None, None)
    shape, constants = _shape(level_rows, num_channels, bits)
    with on_device_of(basis):
        _lq_move_kernel[(1,)](
            *partial,
            by_code,
            basis,
            updates,
            *shape,
            **constants,
            MOVING=moving,
            FROM_PARTIAL=by_code is None,
            SIZE=size_of(bits),
            **CONSTANTS,
            **OPTIONS,
        )
