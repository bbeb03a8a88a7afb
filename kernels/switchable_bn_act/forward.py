"""Forward Triton kernels of :mod:`rsfast.kernels.switchable_bn_act`, which holds the equations.

Statistics are Welford's per lane, then merged over lanes and shares (Chan, Golub and LeVeque 1983),
of rows from which a typical value of their level is subtracted: no square is subtracted from
another, and a mean of 1e4 deviations costs only its own rounding, once, in the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.launch import on_device_of
from rsfast.kernels.common.levels import Affine, Levels
from rsfast.kernels.common.tiles import TILE_ELEMENTS, find_share, share_out, wave_options
from rsfast.kernels.switchable_bn_act.tiles import (
    FINALIZE_OPTIONS,
    FORWARD_PROGRAMS,
    activate,
    finalize_tile,
    keeps_gradient,
    load_affine,
    load_origin,
    mask_tile,
    merge_lanes,
    merge_shares,
)

__all__ = ["OPTIONS", "apply", "batch_statistics", "statistics_elements"]

OPTIONS = wave_options(FORWARD_PROGRAMS)


@triton.jit(do_not_specialize=["share_rows"])
def _bn_statistics_kernel(
    x_ptr,  # [M, C]
    partial_ptr,  # [2, shares, C] float32: mean - origin and m2 of each share, fully overwritten
    level_rows,
    banks,
    share_rows,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    share = tl.program_id(1)
    _, _, first, count, place, shares = find_share(share, level_rows, banks, share_rows, L)
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    offsets = lanes * C + cols[None, :]
    origin = load_origin(x_ptr, first, count, cols, C)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    seen = 0.0
    tiles = tl.cdiv(count, BLOCK_M)
    for tile in tl.range(place, tiles, shares, num_stages=3):
        row = tile * BLOCK_M
        rows_inside = row + lanes < count
        mask = rows_inside & inside[None, :]
        x = tl.load(x_ptr + (first + row) * C + offsets, mask=mask, other=0.0).to(tl.float32)
        x -= origin[None, :]
        seen += 1.0
        weight = 1.0 / seen
        delta = x - mean
        mean += delta * tl.where(rows_inside, weight, 0.0)
        m2 += delta * (delta * tl.where(rows_inside, 1.0 - weight, 0.0))
    first_of_lane = tl.minimum(place * BLOCK_M + lanes, count)
    rows_of_lane = tl.cdiv(count - first_of_lane, shares * BLOCK_M)
    mean_all, m2_all = merge_lanes(mean, m2, rows_of_lane.to(tl.float32))
    partial_ptr += share.to(tl.int64) * C + cols
    tl.store(partial_ptr, mean_all, mask=inside)
    tl.store(partial_ptr + tl.num_programs(1).to(tl.int64) * C, m2_all, mask=inside)


@triton.jit(do_not_specialize=["stride_partial", "share_rows"])
def _bn_finalize_kernel(
    x_ptr,  # [M, C], for the origin of each level
    partial_ptr,  # [2, shares, C] float32
    mean_ptr,  # [L, C] float32, fully overwritten
    var_ptr,  # [L, C] float32, biased, fully overwritten
    running_mean_ptr,  # [B, C] float32, moved towards mean
    running_var_ptr,  # [B, C] float32, moved towards the unbiased variance
    num_batches_ptr,  # [B] int64, one added per level
    stride_partial,  # shares * C
    level_rows,
    banks,
    share_rows,
    momentum,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of the tiles that the shares consist of
    BLOCK_K: tl.constexpr,  # shares
    BLOCK_C: tl.constexpr,
):
    # One program per bank, so that levels that share one move its running statistics in turn.
    bank = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    running_mean_ptr += bank * C + cols
    running_var_ptr += bank * C + cols
    running_mean = tl.load(running_mean_ptr, mask=inside, other=0.0)
    running_var = tl.load(running_var_ptr, mask=inside, other=0.0)
    num_levels = 0
    first_row = tl.zeros((), tl.int64)
    first_share = 0
    for level in tl.static_range(L):
        rows = (level_rows[level] >> 1) - 1
        if (banks[level] >> 1) - 1 == bank:
            level_mean, level_m2 = merge_shares(
                partial_ptr,
                stride_partial,
                first_share,
                rows,
                share_rows,
                cols,
                C,
                BLOCK_M,
                BLOCK_K,
                BLOCK_C,
            )
            level_mean += load_origin(x_ptr, first_row, rows, cols, C)
            tl.store(mean_ptr + level * C + cols, level_mean, mask=inside)
            tl.store(var_ptr + level * C + cols, level_m2 / rows, mask=inside)
            # A single row has m2 = 0, and no unbiased variance: it counts as 0.
            unbiased_var = level_m2 / tl.maximum(rows - 1, 1)
            running_mean = (1.0 - momentum) * running_mean + momentum * level_mean
            running_var = (1.0 - momentum) * running_var + momentum * unbiased_var
            num_levels += 1
        first_row += rows
        first_share += tl.cdiv(rows, share_rows)
    tl.store(running_mean_ptr, running_mean, mask=inside)
    tl.store(running_var_ptr, running_var, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(num_batches_ptr + bank, tl.load(num_batches_ptr + bank) + num_levels)


@triton.jit(do_not_specialize=["share_rows"])
def _bn_apply_kernel(
    x_ptr,  # [M, C]
    residual_ptr,  # [M, C] or None
    mean_ptr,  # [L, C] of the batch or [B, C] running, float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    y_ptr,  # [M, C] like x, fully overwritten
    mask_ptr,  # [M, ceil(C / 8)] uint8, where y has a gradient, or None; fully overwritten
    level_rows,
    banks,
    share_rows,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WRITE_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    share = tl.program_id(1)
    level, bank, first, count, place, shares = find_share(share, level_rows, banks, share_rows, L)
    row_of_statistics = level if BATCH_STATISTICS else bank
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    mean, scale, beta, _ = load_affine(
        mean_ptr, var_ptr, gamma_ptr, beta_ptr, row_of_statistics, bank, cols, eps, C
    )
    offsets = lanes * C + cols[None, :]
    tiles = tl.cdiv(count, BLOCK_M)
    for step in tl.range(place, tiles, shares, num_stages=3):
        # From the last tile to the first: the statistics read those last, they are still cached.
        row = (tiles - 1 - step) * BLOCK_M
        rows_inside = row + lanes < count
        mask = rows_inside & inside[None, :]
        start = (first + row) * C
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * scale[None, :] + beta[None, :]
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        if WRITE_MASK:
            kept = keeps_gradient(y, ACTIVATION)
            bits = tl.reshape(kept.to(tl.int32), (BLOCK_M, BLOCK_C // 8, 8))
            packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
            mask_ptrs, bytes_inside = mask_tile(mask_ptr, first + row, lanes, C, BLOCK_C)
            tl.store(mask_ptrs, packed, mask=rows_inside & bytes_inside)
        y = activate(y, ACTIVATION)
        tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def statistics_elements(dtype: torch.dtype) -> int:
    """Of a tile of the statistics, which spend most on the loop itself: 32 bytes per thread."""
    return TILE_ELEMENTS * (2 if dtype.itemsize == 2 else 1)


def batch_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    levels: Levels,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [L, C] of each level; moves the running statistics. Two launches."""
    num_channels = x.shape[1]
    shares = share_out(levels, num_channels, FORWARD_PROGRAMS, statistics_elements(x.dtype))
    partial = x.new_empty(2, shares.total, num_channels, dtype=torch.float32)
    mean = x.new_empty(len(levels.rows), num_channels, dtype=torch.float32)
    var = torch.empty_like(mean)
    final = finalize_tile(num_channels)
    with on_device_of(x):
        _bn_statistics_kernel[shares.grid](
            x, partial, *shares.levels, **shares.sizes, **shares.tile, **OPTIONS
        )
        _bn_finalize_kernel[triton.cdiv(num_channels, final["BLOCK_C"]), len(running_mean)](
            x,
            partial,
            mean,
            var,
            running_mean,
            running_var,
            num_batches_tracked,
            partial.stride(0),
            *shares.levels,
            momentum,
            **shares.sizes,
            BLOCK_M=shares.tile["BLOCK_M"],
            **final,
            **FINALIZE_OPTIONS,
        )
    return mean, var


def apply(
    x: Tensor,
    residual: Tensor | None,
    affine: Affine,
    levels: Levels,
    y: Tensor,
    mask: Tensor | None,
    *,
    activation: str | None,
    batch_statistics: bool,
    eps: float,
) -> None:
    """Fills `y`, and `mask` where one is given. One launch."""
    shares = share_out(levels, x.shape[1], FORWARD_PROGRAMS)
    with on_device_of(x):
        _bn_apply_kernel[shares.grid](
            x,
            residual,
            *affine,
            y,
            mask,
            *shares.levels,
            eps,
            **shares.sizes,
            BATCH_STATISTICS=batch_statistics,
            ACTIVATION=activation,
            HAS_RESIDUAL=residual is not None,
            WRITE_MASK=mask is not None,
            **shares.tile,
            **OPTIONS,
        )
