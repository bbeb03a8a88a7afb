"""Backward Triton kernels of :mod:`rsfast.kernels.switchable_bn_act`, which holds the equations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.launch import on_device_of
from rsfast.kernels.common.levels import Affine, Levels
from rsfast.kernels.common.tiles import Shares, find_share, share_out, wave_options
from rsfast.kernels.switchable_bn_act.tiles import (
    BACKWARD_PROGRAMS,
    FINALIZE_OPTIONS,
    finalize_tile,
    gradient_before,
    load_affine,
    load_invstd,
    mask_tile,
)

__all__ = ["OPTIONS", "backward", "finalize_sums"]

OPTIONS = wave_options(BACKWARD_PROGRAMS)


@triton.jit
def _load_dz(
    dy_ptrs,  # [BLOCK_M, BLOCK_C]
    residual_ptrs,  # [BLOCK_M, BLOCK_C]
    mask_ptrs,  # [BLOCK_M, BLOCK_C / 8]
    mask,  # [BLOCK_M, BLOCK_C], rows_inside [BLOCK_M, 1] without the columns
    rows_inside,
    bytes_inside,  # [1, BLOCK_C / 8]
    x_centered,
    scale,
    beta,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient before the activation."""
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    if HAS_MASK:
        packed = tl.load(mask_ptrs, mask=rows_inside & bytes_inside, other=0).to(tl.int32)
        bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        dy = tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_C)) != 0, dy, 0.0)
    else:
        z = x_centered * scale[None, :] + beta[None, :]
        if HAS_RESIDUAL:
            z += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        dy = gradient_before(dy, z, ACTIVATION)
    return dy


@triton.jit(do_not_specialize=["share_rows"])
def _bn_bwd_reduce_kernel(
    dy_ptr,  # [M, C]
    x_ptr,  # [M, C]
    residual_ptr,  # [M, C] or None: where dz is computed from it, and not from a mask
    mask_ptr,  # [M, ceil(C / 8)] uint8 or None: without it dz is computed from x
    mean_ptr,  # [L, C] of the batch or [B, C] running, float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    partial_ptr,  # [2, shares, C] float32: sums of dz and of dz * (x - mean), fully overwritten
    level_rows,
    banks,
    share_rows,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
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
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    tiles = tl.cdiv(count, BLOCK_M)
    for tile in tl.range(place, tiles, shares, num_stages=3):
        row = tile * BLOCK_M
        rows_inside = row + lanes < count
        mask = rows_inside & inside[None, :]
        start = (first + row) * C
        mask_ptrs, bytes_inside, residual_ptrs = dy_ptr, True, dy_ptr
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + start + offsets
        if HAS_MASK:
            mask_ptrs, bytes_inside = mask_tile(mask_ptr, first + row, lanes, C, BLOCK_C)
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        x_centered = x - mean[None, :]
        dz = _load_dz(
            dy_ptr + start + offsets,
            residual_ptrs,
            mask_ptrs,
            mask,
            rows_inside,
            bytes_inside,
            x_centered,
            scale,
            beta,
            ACTIVATION,
            HAS_RESIDUAL,
            HAS_MASK,
            BLOCK_M,
            BLOCK_C,
        )
        sum_dz += dz
        sum_dz_x += dz * x_centered
    partial_ptr += share.to(tl.int64) * C + cols
    tl.store(partial_ptr, tl.sum(sum_dz, 0), mask=inside)
    tl.store(partial_ptr + tl.num_programs(1).to(tl.int64) * C, tl.sum(sum_dz_x, 0), mask=inside)


@triton.jit(do_not_specialize=["stride_partial", "share_rows"])
def _bn_bwd_finalize_kernel(
    partial_ptr,  # [2, shares, C] float32
    var_ptr,  # [L, C] of the batch or [B, C] running, float32
    sums_ptr,  # [2, L, C] float32: dbeta and dgamma of each level, fully overwritten
    dgamma_ptr,  # [B, C] float32, fully overwritten
    dbeta_ptr,  # [B, C] float32, fully overwritten
    stride_partial,  # shares * C
    level_rows,
    banks,
    share_rows,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # shares
    BLOCK_C: tl.constexpr,
):
    # One program per bank, also for banks without a level: their gradient is 0.
    bank = tl.program_id(1)
    lanes = tl.arange(0, BLOCK_K)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    dgamma = tl.zeros((BLOCK_C,), tl.float32)
    dbeta = tl.zeros((BLOCK_C,), tl.float32)
    first_share = 0
    for level in tl.static_range(L):
        shares = tl.cdiv((level_rows[level] >> 1) - 1, share_rows)
        if (banks[level] >> 1) - 1 == bank:
            sum_dz = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
            sum_dz_x = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
            for start in range(0, shares, BLOCK_K):
                index = start + lanes
                mask = (index < shares) & inside[None, :]
                ptrs = partial_ptr + (first_share + index).to(tl.int64) * C + cols[None, :]
                sum_dz += tl.load(ptrs, mask=mask, other=0.0)
                sum_dz_x += tl.load(ptrs + stride_partial, mask=mask, other=0.0)
            row = level if BATCH_STATISTICS else bank
            level_dbeta = tl.sum(sum_dz, 0)
            level_dgamma = tl.sum(sum_dz_x, 0) * load_invstd(var_ptr, row, cols, eps, C)
            tl.store(sums_ptr + level * C + cols, level_dbeta, mask=inside)
            tl.store(sums_ptr + (L + level) * C + cols, level_dgamma, mask=inside)
            dbeta += level_dbeta
            dgamma += level_dgamma
        first_share += shares
    tl.store(dbeta_ptr + bank * C + cols, dbeta, mask=inside)
    tl.store(dgamma_ptr + bank * C + cols, dgamma, mask=inside)


@triton.jit(do_not_specialize=["share_rows"])
def _bn_bwd_apply_kernel(
    dy_ptr,  # [M, C]
    x_ptr,  # [M, C]
    residual_ptr,  # [M, C] or None: where dz is computed from it, and not from a mask
    mask_ptr,  # [M, ceil(C / 8)] uint8 or None: without it dz is computed from x
    mean_ptr,  # [L, C] of the batch or [B, C] running, float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    sums_ptr,  # [2, L, C] float32: dbeta and dgamma of each level
    dx_ptr,  # [M, C] like x, fully overwritten
    dresidual_ptr,  # [M, C] like x, fully overwritten; None without residual and mask
    level_rows,
    banks,
    share_rows,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    share = tl.program_id(1)
    level, bank, first, count, place, shares = find_share(share, level_rows, banks, share_rows, L)
    row_of_statistics = level if BATCH_STATISTICS else bank
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    mean, scale, beta, invstd = load_affine(
        mean_ptr, var_ptr, gamma_ptr, beta_ptr, row_of_statistics, bank, cols, eps, C
    )
    mean_dz = tl.zeros((BLOCK_C,), tl.float32)
    slope = tl.zeros((BLOCK_C,), tl.float32)
    if BATCH_STATISTICS:
        mean_dz = tl.load(sums_ptr + level * C + cols, mask=inside, other=0.0) / count
        slope = tl.load(sums_ptr + (L + level) * C + cols, mask=inside, other=0.0)
        slope *= invstd / count
    offsets = lanes * C + cols[None, :]
    tiles = tl.cdiv(count, BLOCK_M)
    for step in tl.range(place, tiles, shares, num_stages=3):
        # From the last tile to the first: the reduction read those last, they are still cached.
        row = (tiles - 1 - step) * BLOCK_M
        rows_inside = row + lanes < count
        mask = rows_inside & inside[None, :]
        start = (first + row) * C
        mask_ptrs, bytes_inside, residual_ptrs = dy_ptr, True, dy_ptr
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + start + offsets
        if HAS_MASK:
            mask_ptrs, bytes_inside = mask_tile(mask_ptr, first + row, lanes, C, BLOCK_C)
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        x_centered = x - mean[None, :]
        dz = _load_dz(
            dy_ptr + start + offsets,
            residual_ptrs,
            mask_ptrs,
            mask,
            rows_inside,
            bytes_inside,
            x_centered,
            scale,
            beta,
            ACTIVATION,
            HAS_RESIDUAL,
            HAS_MASK,
            BLOCK_M,
            BLOCK_C,
        )
        if HAS_RESIDUAL or HAS_MASK:
            dresidual_ptrs = dresidual_ptr + start + offsets
            tl.store(dresidual_ptrs, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
        dx = scale[None, :] * (dz - mean_dz[None, :] - x_centered * slope[None, :])
        tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    affine: Affine,
    levels: Levels,
    dx: Tensor,
    dresidual: Tensor | None,
    *,
    activation: str | None,
    batch_statistics: bool,
    eps: float,
    join: Callable[[Tensor], object] | None,
) -> tuple[Tensor, Tensor]:
    """Fills `dx`, and `dresidual` where given; dweight and dbias [B, C]. Three launches.

    What the activation did comes from `mask` where there is one, else from x and `residual`.
    `join` makes the sums of each level, [2, L, C], those of all ranks before dx is computed.
    """
    num_channels = x.shape[1]
    shares = share_out(levels, num_channels, BACKWARD_PROGRAMS)
    partial = x.new_empty(2, shares.total, num_channels, dtype=torch.float32)
    sizes = {**shares.sizes, "BATCH_STATISTICS": batch_statistics}
    streaming = {
        "ACTIVATION": activation,
        "HAS_RESIDUAL": residual is not None,
        "HAS_MASK": mask is not None,
        **shares.tile,
        **OPTIONS,
    }
    read = dy, x, residual, mask, *affine
    with on_device_of(x):
        _bn_bwd_reduce_kernel[shares.grid](
            *read, partial, *shares.levels, eps, **sizes, **streaming
        )
        sums, dweight, dbias = finalize_sums(partial, affine, shares, eps, batch_statistics)
        if join is not None:
            join(sums)
        _bn_bwd_apply_kernel[shares.grid](
            *read, sums, dx, dresidual, *shares.levels, eps, **sizes, **streaming
        )
    return dweight, dbias


def finalize_sums(
    partial: Tensor, affine: Affine, shares: Shares, eps: float, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dbias and dweight of each level [2, L, C], and dweight and dbias [B, C]. One launch.

    `partial` [2, shares, C] has the sums of dz and of dz * (x - mean) of each share.
    """
    num_channels = partial.shape[2]
    sums = partial.new_empty(2, shares.sizes["L"], num_channels)
    dweight, dbias = torch.empty_like(affine.weight), torch.empty_like(affine.bias)
    final = finalize_tile(num_channels)
    with on_device_of(partial):
        _bn_bwd_finalize_kernel[triton.cdiv(num_channels, final["BLOCK_C"]), len(dweight)](
            partial,
            affine.var,
            sums,
            dweight,
            dbias,
            partial.stride(0),
            *shares.levels,
            eps,
            **shares.sizes,
            BATCH_STATISTICS=batch_statistics,
            **final,
            **FINALIZE_OPTIONS,
        )
    return sums, dweight, dbias
