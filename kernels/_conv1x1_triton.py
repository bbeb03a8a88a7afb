"""Triton kernels of :mod:`rsfast.kernels.conv1x1`, which holds the equations.

Matrix products over packed rows. A tile of rows never crosses a level's end, so that everything
that differs between levels (what is pending on the input, the statistics of the output) is one
vector per tile. Partial sums are added up in a fixed order by launches of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels._bn_tiles import activate, finalize_tile, find_chunk, merge_chunks
from rsfast.kernels._launch import OPTIONS, level_arguments, on_device_of

__all__ = [
    "Affine",
    "StatisticsGrad",
    "dgrad",
    "dgrad_tiles",
    "forward",
    "tiles",
    "wgrad",
    "wgrad_tiles",
]

# Programs of the weight's gradient: two for each of 132 multiprocessors. A constant, so that sums
# are split, and results rounded, alike on every GPU.
PROGRAMS = 264
# All registers: left alone, ptxas spills a few bytes in float32 to fit more programs.
GEMM_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True, "maxnreg": 255}


class Affine(NamedTuple):
    """What is pending on the input, [L, C_in] float32 each."""

    center: Tensor
    scale: Tensor
    shift: Tensor


class StatisticsGrad(NamedTuple):
    """What gradients of mean and variance add to that of y: dmean / m + 2 dvar (y - mean) / m."""

    y: Tensor  # [M, C_out]
    mean: Tensor  # [L, C_out] float32
    dmean: Tensor  # like mean
    dvar: Tensor  # like mean


def tiles(dtype: torch.dtype, num_in: int, num_out: int) -> dict[str, int]:
    """BLOCK_M rows, BLOCK_N output and BLOCK_K input channels. Not timed on a GPU yet."""
    # Odd channel counts are loaded number by number, and addressed so: half the rows fit.
    is_odd = num_in % 8 > 0 or num_out % 8 > 0
    if dtype == torch.float32:
        block = 32 if is_odd else 64
        return {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": 32}
    if is_odd:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    return {"BLOCK_M": 128, "BLOCK_N": 64 if num_out <= 64 else 128, "BLOCK_K": 64}


def dgrad_tiles(dtype: torch.dtype, num_in: int, num_out: int) -> dict[str, int]:
    """Like :func:`tiles`; the inner dimension is that of the output."""
    tile = tiles(dtype, num_out, num_in)
    return {**tile, "BLOCK_N": tile["BLOCK_K"], "BLOCK_K": tile["BLOCK_N"]}


def wgrad_tiles(dtype: torch.dtype, num_in: int, num_out: int) -> dict[str, int]:
    """Like :func:`tiles`; the inner dimension is that of the rows."""
    if dtype == torch.float32:  # products of more spill
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    return {**tiles(dtype, num_in, num_out), "BLOCK_M": 64}


@triton.jit
def _load_input(
    x_ptrs,
    mask,  # [BLOCK_M, BLOCK_K]
    center_ptr,  # [L, C_IN] float32 or None
    scale_ptr,  # like center_ptr
    shift_ptr,  # like center_ptr
    level,
    cols,  # [BLOCK_K] of the input
    C_IN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
):
    """The input with what is pending on it, in the type of x; 0 where masked."""
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    if HAS_AFFINE:
        center, scale, shift = _load_affine(center_ptr, scale_ptr, shift_ptr, level, cols, C_IN)
        z = (x.to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :]
        if ACTIVATION is not None:
            z, _ = activate(z, ACTIVATION)
        x = tl.where(mask, z, 0.0).to(x.dtype)
    return x


@triton.jit
def _load_affine(center_ptr, scale_ptr, shift_ptr, level, cols, C_IN: tl.constexpr):
    offsets = level * C_IN + cols
    inside = cols < C_IN
    center = tl.load(center_ptr + offsets, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + offsets, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + offsets, mask=inside, other=0.0)
    return center, scale, shift


@triton.jit
def _load_output_gradient(
    dy_ptr,  # [M, C_OUT]
    y_ptr,  # [M, C_OUT] or None
    mean_ptr,  # [L, C_OUT] float32 or None
    dmean_ptr,  # like mean_ptr
    dvar_ptr,  # like mean_ptr
    offsets,  # [BLOCK_M, BLOCK_N]
    mask,
    level,
    level_count,  # m, rows of the level; 0 where there is no tile
    cols,  # [BLOCK_N] of the output
    C_OUT: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
):
    """The gradient of y with that of its statistics, in the type of dy; 0 where masked."""
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
    if HAS_STATISTICS:
        inside = cols < C_OUT
        mean = tl.load(mean_ptr + level * C_OUT + cols, mask=inside, other=0.0)
        share = 1.0 / tl.maximum(level_count, 1)
        offset = tl.load(dmean_ptr + level * C_OUT + cols, mask=inside, other=0.0) * share
        slope = tl.load(dvar_ptr + level * C_OUT + cols, mask=inside, other=0.0) * (2.0 * share)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total = dy.to(tl.float32) + (offset[None, :] + slope[None, :] * (y - mean[None, :]))
        dy = tl.where(mask, total, 0.0).to(dy.dtype)
    return dy


@triton.jit
def _conv1x1_fwd_kernel(
    x_ptr,  # [M, C_IN]
    weight_ptr,  # [C_OUT, C_IN]
    center_ptr,  # [L, C_IN] float32 or None
    scale_ptr,  # like center_ptr
    shift_ptr,  # like center_ptr
    y_ptr,  # [M, C_OUT], fully overwritten
    partial_ptr,  # [3, row tiles, C_OUT] float32 or None: mean, m2, rest of mean; overwritten
    level_rows,
    L: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    WRITE_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbouring programs share rows of x, which are many; the weight stays in the L2 cache.
    chunk = tl.program_id(1)
    level, _, _, _, first, count = find_chunk(chunk, level_rows, level_rows, BLOCK_M, L)
    lanes = tl.arange(0, BLOCK_M)
    rows = (first + lanes)[:, None]
    inside = (lanes < count)[:, None]
    cols_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C_IN, BLOCK_K):
        cols_k = start + tl.arange(0, BLOCK_K)
        x = _load_input(
            x_ptr + rows * C_IN + cols_k[None, :],
            inside & (cols_k < C_IN)[None, :],
            center_ptr,
            scale_ptr,
            shift_ptr,
            level,
            cols_k,
            C_IN,
            ACTIVATION,
            HAS_AFFINE,
        )
        weight = tl.load(
            weight_ptr + cols_n[None, :] * C_IN + cols_k[:, None],
            mask=(cols_n < C_OUT)[None, :] & (cols_k < C_IN)[:, None],
            other=0.0,
        )
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows * C_OUT + cols_n[None, :], y, mask=inside & (cols_n < C_OUT)[None, :])
    if WRITE_STATISTICS:
        # Of what is stored, as a batch norm that reads it would see; about the tile's own mean.
        y = y.to(tl.float32)
        mean = tl.sum(tl.where(inside, y, 0.0), 0) / count
        deviation = tl.where(inside, y - mean[None, :], 0.0)
        rest = tl.sum(deviation, 0) / count  # the digits that a large mean has no room for
        deviation = tl.where(inside, deviation - rest[None, :], 0.0)
        partial_ptr += chunk.to(tl.int64) * C_OUT + cols_n
        stride = tl.num_programs(1).to(tl.int64) * C_OUT
        tl.store(partial_ptr, mean, mask=cols_n < C_OUT)
        tl.store(partial_ptr + stride, tl.sum(deviation * deviation, 0), mask=cols_n < C_OUT)
        tl.store(partial_ptr + 2 * stride, rest, mask=cols_n < C_OUT)


@triton.jit(do_not_specialize=["stride_partial"])
def _conv1x1_merge_kernel(
    partial_ptr,  # [2, row tiles, C] float32, or [3, ...] of moments
    first_ptr,  # [L, C] float32: mean, or sum of the first; fully overwritten
    second_ptr,  # [L, C] float32: biased variance, or sum of the second; fully overwritten
    stride_partial,  # row tiles * C
    level_rows,
    L: tl.constexpr,
    C: tl.constexpr,
    MOMENTS: tl.constexpr,  # else plain sums
    CHUNK_ROWS: tl.constexpr,  # BLOCK_M of the launch before
    BLOCK_K: tl.constexpr,  # row tiles
    BLOCK_C: tl.constexpr,
):
    wanted = tl.program_id(1)
    rows = 0
    first_chunk = 0
    earlier = 0
    for level in tl.static_range(L):
        count = (level_rows[level] >> 1) - 1
        rows = tl.where(wanted == level, count, rows)
        first_chunk = tl.where(wanted == level, earlier, first_chunk)
        earlier += tl.cdiv(count, CHUNK_ROWS)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if MOMENTS:
        first, second = merge_chunks(
            partial_ptr,
            stride_partial,
            first_chunk,
            rows,
            CHUNK_ROWS,
            cols,
            C,
            True,
            BLOCK_K,
            BLOCK_C,
        )
        second = second / rows
    else:
        lanes = tl.arange(0, BLOCK_K)[:, None]
        chunks = tl.cdiv(rows, CHUNK_ROWS)
        sums = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        other_sums = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for start in range(0, chunks, BLOCK_K):
            mask = (start + lanes < chunks) & (cols < C)[None, :]
            ptrs = partial_ptr + (first_chunk + start + lanes).to(tl.int64) * C + cols[None, :]
            sums += tl.load(ptrs, mask=mask, other=0.0)
            other_sums += tl.load(ptrs + stride_partial, mask=mask, other=0.0)
        first, second = tl.sum(sums, 0), tl.sum(other_sums, 0)
    tl.store(first_ptr + wanted * C + cols, first, mask=cols < C)
    tl.store(second_ptr + wanted * C + cols, second, mask=cols < C)


@triton.jit
def _conv1x1_dgrad_kernel(
    dy_ptr,  # [M, C_OUT]
    weight_ptr,  # [C_OUT, C_IN]
    x_ptr,  # [M, C_IN] or None
    center_ptr,  # [L, C_IN] float32 or None
    scale_ptr,  # like center_ptr
    shift_ptr,  # like center_ptr
    y_ptr,  # [M, C_OUT] or None
    mean_ptr,  # [L, C_OUT] float32 or None
    dmean_ptr,  # like mean_ptr
    dvar_ptr,  # like mean_ptr
    dx_ptr,  # [M, C_IN], fully overwritten
    partial_ptr,  # [2, row tiles, C_IN] float32 or None: sums for shift and scale, overwritten
    level_rows,
    L: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # output channels, the inner dimension
    BLOCK_K: tl.constexpr,  # input channels
):
    chunk = tl.program_id(1)
    level, _, _, level_count, first, count = find_chunk(chunk, level_rows, level_rows, BLOCK_M, L)
    lanes = tl.arange(0, BLOCK_M)
    rows = (first + lanes)[:, None]
    inside = (lanes < count)[:, None]
    cols_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, C_OUT, BLOCK_N):
        cols_n = start + tl.arange(0, BLOCK_N)
        dy = _load_output_gradient(
            dy_ptr,
            y_ptr,
            mean_ptr,
            dmean_ptr,
            dvar_ptr,
            rows * C_OUT + cols_n[None, :],
            inside & (cols_n < C_OUT)[None, :],
            level,
            level_count,
            cols_n,
            C_OUT,
            HAS_STATISTICS,
        )
        weight = tl.load(
            weight_ptr + cols_n[:, None] * C_IN + cols_k[None, :],
            mask=(cols_n < C_OUT)[:, None] & (cols_k < C_IN)[None, :],
            other=0.0,
        )
        acc = tl.dot(dy, weight, acc, input_precision="ieee")
    offsets = rows * C_IN + cols_k[None, :]
    mask = inside & (cols_k < C_IN)[None, :]
    if HAS_AFFINE:
        center, scale, shift = _load_affine(center_ptr, scale_ptr, shift_ptr, level, cols_k, C_IN)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - center[None, :]
        if ACTIVATION is not None:
            _, kept = activate(x * scale[None, :] + shift[None, :], ACTIVATION)
            acc = tl.where(kept, acc, 0.0)
        acc = tl.where(mask, acc, 0.0)
        partial_ptr += chunk.to(tl.int64) * C_IN + cols_k
        tl.store(partial_ptr, tl.sum(acc, 0), mask=cols_k < C_IN)
        partial_ptr += tl.num_programs(1).to(tl.int64) * C_IN
        tl.store(partial_ptr, tl.sum(acc * x, 0), mask=cols_k < C_IN)
        acc = acc * scale[None, :]
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _conv1x1_wgrad_kernel(
    dy_ptr,  # [M, C_OUT]
    x_ptr,  # [M, C_IN]
    center_ptr,  # [L, C_IN] float32 or None
    scale_ptr,  # like center_ptr
    shift_ptr,  # like center_ptr
    y_ptr,  # [M, C_OUT] or None
    mean_ptr,  # [L, C_OUT] float32 or None
    dmean_ptr,  # like mean_ptr
    dvar_ptr,  # like mean_ptr
    partial_ptr,  # [splits, C_OUT, C_IN] float32, fully overwritten
    level_rows,
    tiles_per_split,
    L: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows, the inner dimension
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(2)
    lanes = tl.arange(0, BLOCK_M)
    cols_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for index in range(0, tiles_per_split):
        # Behind the last tile there are no rows.
        level, _, _, level_count, first, count = find_chunk(
            split * tiles_per_split + index, level_rows, level_rows, BLOCK_M, L
        )
        rows = (first + lanes)[:, None]
        inside = (lanes < count)[:, None]
        dy = _load_output_gradient(
            dy_ptr,
            y_ptr,
            mean_ptr,
            dmean_ptr,
            dvar_ptr,
            rows * C_OUT + cols_n[None, :],
            inside & (cols_n < C_OUT)[None, :],
            level,
            level_count,
            cols_n,
            C_OUT,
            HAS_STATISTICS,
        )
        x = _load_input(
            x_ptr + rows * C_IN + cols_k[None, :],
            inside & (cols_k < C_IN)[None, :],
            center_ptr,
            scale_ptr,
            shift_ptr,
            level,
            cols_k,
            C_IN,
            ACTIVATION,
            HAS_AFFINE,
        )
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    offsets = cols_n[:, None] * C_IN + cols_k[None, :]
    mask = (cols_n < C_OUT)[:, None] & (cols_k < C_IN)[None, :]
    tl.store(partial_ptr + split.to(tl.int64) * (C_OUT * C_IN) + offsets, acc, mask=mask)


def forward(
    x: Tensor,
    weight: Tensor,
    affine: Affine | None,
    level_rows: Sequence[int],
    activation: str | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and biased variance [L, C_out] of it (no rows without `statistics`)."""
    num_out, num_in = weight.shape
    tile = tiles(x.dtype, num_in, num_out)
    count = _row_tiles(level_rows, tile["BLOCK_M"])
    y = x.new_empty(len(x), num_out)
    partial = x.new_empty(3, count, num_out, dtype=torch.float32) if statistics else None
    with on_device_of(x):
        _conv1x1_fwd_kernel[triton.cdiv(num_out, tile["BLOCK_N"]), count](
            x,
            weight,
            *(affine or (None,) * 3),
            y,
            partial,
            level_arguments(level_rows),
            **_constants(weight, level_rows, affine, activation),
            WRITE_STATISTICS=statistics,
            **tile,
        )
    if partial is None:
        return y, *(x.new_empty(0, num_out, dtype=torch.float32) for _ in range(2))
    return y, *_merge(partial, level_rows, tile["BLOCK_M"], moments=True)


def dgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    affine: Affine | None,
    statistics: StatisticsGrad | None,
    level_rows: Sequence[int],
    activation: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dshift and dscale [L, C_in]."""
    num_out, num_in = weight.shape
    tile = dgrad_tiles(x.dtype, num_in, num_out)
    count = _row_tiles(level_rows, tile["BLOCK_M"])
    dx = torch.empty_like(x)
    partial = x.new_empty(2, count, num_in, dtype=torch.float32) if affine else None
    with on_device_of(x):
        _conv1x1_dgrad_kernel[triton.cdiv(num_in, tile["BLOCK_K"]), count](
            dy,
            weight,
            x if affine else None,
            *(affine or (None,) * 3),
            *(statistics or (None,) * 4),
            dx,
            partial,
            level_arguments(level_rows),
            **_constants(weight, level_rows, affine, activation),
            HAS_STATISTICS=statistics is not None,
            **tile,
        )
    if partial is None:
        return dx, None, None
    return dx, *_merge(partial, level_rows, tile["BLOCK_M"], moments=False)


def wgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    affine: Affine | None,
    statistics: StatisticsGrad | None,
    level_rows: Sequence[int],
    activation: str | None,
) -> Tensor:
    """dweight in the type of the weight; partial sums in float32."""
    num_out, num_in = weight.shape
    tile = wgrad_tiles(x.dtype, num_in, num_out)
    columns = triton.cdiv(num_in, tile["BLOCK_K"]), triton.cdiv(num_out, tile["BLOCK_N"])
    count = _row_tiles(level_rows, tile["BLOCK_M"])
    per_split = triton.cdiv(count, max(1, PROGRAMS // (columns[0] * columns[1])))
    splits = triton.cdiv(count, per_split)
    partial = x.new_empty(splits, num_out, num_in, dtype=torch.float32)
    with on_device_of(x):
        _conv1x1_wgrad_kernel[(*columns, splits)](
            dy,
            x,
            *(affine or (None,) * 3),
            *(statistics or (None,) * 4),
            partial,
            level_arguments(level_rows),
            per_split,
            **_constants(weight, level_rows, affine, activation),
            HAS_STATISTICS=statistics is not None,
            **tile,
        )
    return partial.sum(0).to(weight.dtype)


def _merge(
    partial: Tensor, level_rows: Sequence[int], chunk_rows: int, *, moments: bool
) -> tuple[Tensor, Tensor]:
    """Two [L, C] of two partial results by row tile: mean and variance, or two sums."""
    num_channels = partial.shape[-1]
    first, second = (partial.new_empty(len(level_rows), num_channels) for _ in range(2))
    final = finalize_tile(num_channels)
    with on_device_of(partial):
        _conv1x1_merge_kernel[triton.cdiv(num_channels, final["BLOCK_C"]), len(level_rows)](
            partial,
            first,
            second,
            partial.stride(0),
            level_arguments(level_rows),
            L=len(level_rows),
            C=num_channels,
            MOMENTS=moments,
            CHUNK_ROWS=chunk_rows,
            **final,
            **OPTIONS,
        )
    return first, second


def _row_tiles(level_rows: Sequence[int], block_m: int) -> int:
    return sum(triton.cdiv(rows, block_m) for rows in level_rows)


def _constants(
    weight: Tensor, level_rows: Sequence[int], affine: Affine | None, activation: str | None
) -> dict[str, Any]:
    """What all three products are compiled for, besides their tiles."""
    num_out, num_in = weight.shape
    sizes = {"L": len(level_rows), "C_IN": num_in, "C_OUT": num_out}
    pending = {"ACTIVATION": activation if affine else None, "HAS_AFFINE": affine is not None}
    return {**sizes, **pending, **GEMM_OPTIONS}
