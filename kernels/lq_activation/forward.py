"""Forward Triton kernels of :mod:`rsfast.kernels.lq_activation.op`, which holds the equations."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.launch import on_device_of
from rsfast.kernels.common.tiles import find_share, wave_options
from rsfast.kernels.lq_activation.tiles import (
    NUM_PROGRAMS,
    codes_of,
    load_levels,
    share_rows_out,
)
from rsfast.kernels.switchable_bn_act.tiles import mask_tile

__all__ = ["OPTIONS", "forward"]

OPTIONS = {bits: wave_options(programs) for bits, programs in NUM_PROGRAMS.items()}


@triton.jit
def _per_thread(
    values,  # [BLOCK_M, BLOCK_C]
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_M, BLOCK_C / 8] sums of eight neighbours, which in 16 bits one thread has."""
    return tl.sum(tl.reshape(values, (BLOCK_M, BLOCK_C // 8, 8)), 2)


@triton.jit
def _per_thread_bits(
    kept,  # [BLOCK_M, BLOCK_C]
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_M, BLOCK_C / 8] uint8, a bit for each of eight neighbours."""
    bits = tl.reshape(kept.to(tl.int32), (BLOCK_M, BLOCK_C // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit(do_not_specialize=["share_rows"])
def _lq_activation_fwd_kernel(
    x_ptr,  # [M, C]
    basis_ptr,  # [K] float32
    y_ptr,  # [M, C] like x, fully overwritten
    mask_ptr,  # [M, ceil(C / 8)] uint8, where y has a gradient, or None; fully overwritten
    counts_ptr,  # [2^K, P] int32, or None: values above each threshold, all first; overwritten
    sums_ptr,  # [2^K, P] float32, or None: their sums, likewise
    level_rows,
    banks,  # none
    share_rows,
    L: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    WRITE_MASK: tl.constexpr,
    WRITE_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    share = tl.program_id(1)
    _, _, first, rows, place, shares = find_share(share, level_rows, banks, share_rows, L)
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    offsets = lanes * C + cols
    unsorted = load_levels(basis_ptr, K)
    code_of_number = codes_of(unsorted, K)
    levels = ()
    counts = ()
    sums = ()
    for code in tl.static_range(2**K):
        levels = levels + (tl.sum(tl.where(code_of_number == code, unsorted, 0.0), 0),)
        if WRITE_SUMS:
            if code > 0:
                counts = counts + (tl.zeros((BLOCK_M, BLOCK_C // 8), tl.int32),)
            sums = sums + (tl.zeros((BLOCK_M, BLOCK_C // 8), tl.float32),)
    tiles = tl.cdiv(rows, BLOCK_M)
    # Few programs: each has four tiles on their way.
    for tile in tl.range(place, tiles, shares, num_stages=5):
        row = tile * BLOCK_M
        rows_inside = row + lanes < rows
        mask = rows_inside & (cols < C)
        ptrs = (first + row) * C + offsets
        # No threshold is below what is not there.
        x = tl.load(x_ptr + ptrs, mask=mask, other=-float("inf")).to(tl.float32)
        y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32) + levels[0]
        above = mask
        next_counts = ()
        next_sums = ()
        for code in tl.static_range(2**K):
            if code > 0:
                above = x > 0.5 * (levels[code - 1] + levels[code])
                y = tl.where(above, levels[code], y)
            if WRITE_SUMS:
                if code > 0:
                    count = counts[code - 1] + _per_thread(above.to(tl.int32), BLOCK_M, BLOCK_C)
                    next_counts = next_counts + (count,)
                added = sums[code] + _per_thread(tl.where(above, x, 0.0), BLOCK_M, BLOCK_C)
                next_sums = next_sums + (added,)
        counts = next_counts
        sums = next_sums
        if WRITE_MASK:
            kept = _per_thread_bits(x <= levels[2**K - 1], BLOCK_M, BLOCK_C)
            mask_ptrs, bytes_inside = mask_tile(mask_ptr, first + row, lanes, C, BLOCK_C)
            tl.store(mask_ptrs, kept, mask=rows_inside & bytes_inside)
        y = tl.where(tl.abs(x) < float("inf"), y, float("nan"))
        tl.store(y_ptr + ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    if WRITE_SUMS:
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = share * tl.num_programs(0) + tl.program_id(0)
        own_rows = tl.cdiv(tiles - place, shares) * BLOCK_M
        own_rows -= tl.where(place == (tiles - 1) % shares, tiles * BLOCK_M - rows, 0)
        count = own_rows * tl.minimum(C - tl.program_id(0) * BLOCK_C, BLOCK_C)
        for code in tl.static_range(2**K):
            if code > 0:
                count = tl.sum(counts[code - 1])
            tl.store(counts_ptr + code * programs + program, count)
            tl.store(sums_ptr + code * programs + program, tl.sum(sums[code]))


def forward(
    x: Tensor,
    basis: Tensor,
    y: Tensor,
    mask: Tensor | None,
    partial: tuple[Tensor, Tensor] | None,
    level_rows: Sequence[int],
) -> None:
    """Fills `y`, and where given `mask` and the counts and sums of `partial`. One launch."""
    bits = len(basis)
    shares = share_rows_out(level_rows, x.shape[1], bits)
    counts, sums = partial or (None, None)
    with on_device_of(x):
        _lq_activation_fwd_kernel[shares.grid](
            x,
            basis,
            y,
            mask,
            counts,
            sums,
            *shares.levels,
            **shares.sizes,
            K=bits,
            WRITE_MASK=mask is not None,
            WRITE_SUMS=partial is not None,
            **shares.tile,
            **OPTIONS[bits],
        )
