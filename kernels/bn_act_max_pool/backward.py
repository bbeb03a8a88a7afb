"""Backward Triton kernel of :mod:`rsfast.kernels.bn_act_max_pool.op`, which holds the equations.

A program takes squares of four input pixels, one for each output pixel, and gathers from the four
windows that hold any of them: nine pairs of pixel and window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.bn_act_max_pool.tiles import map_arguments, share_out_windows
from rsfast.kernels.common.launch import OPTIONS, on_device_of
from rsfast.kernels.common.levels import Affine
from rsfast.kernels.common.tiles import find_chunk, find_map
from rsfast.kernels.switchable_bn_act.backward import finalize_sums
from rsfast.kernels.switchable_bn_act.tiles import gradient_before, load_affine

__all__ = ["backward"]


@triton.jit(do_not_specialize=["num_images"])
def _bn_act_max_pool_bwd_kernel(
    dy_ptr,  # [M', C]
    largest_ptr,  # [M', C] uint8
    x_ptr,  # [M, C]
    mean_ptr,  # [L, C] of the batch or [B, C] running, float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    partial_ptr,  # [2, chunks, C] float32: sums of dz and dz * (x - mean); None to write dx
    sums_ptr,  # [2, L, C] float32: dbeta and dgamma of each level; None to write sums
    dx_ptr,  # [M, C] like x, or None; what is written is fully overwritten
    level_rows,  # of the output
    banks,
    chunk_rows,
    heights,  # of the input
    widths,
    num_images,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WRITE_DX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.program_id(1)
    if WRITE_DX:  # from the last chunk on: the sums went over those last, they are still cached
        chunk = tl.num_programs(1) - 1 - chunk
    level, bank, level_first, _, first, count = find_chunk(chunk, level_rows, banks, chunk_rows, L)
    height, width, first_in = find_map(level, heights, widths, num_images, L)
    row_of_statistics = level if BATCH_STATISTICS else bank
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    mean, scale, beta, invstd = load_affine(
        mean_ptr, var_ptr, gamma_ptr, beta_ptr, row_of_statistics, bank, cols, eps, C
    )
    mean_dz = tl.zeros((BLOCK_C,), tl.float32)
    slope = tl.zeros((BLOCK_C,), tl.float32)
    if WRITE_DX and BATCH_STATISTICS:
        total = (num_images * height * width).to(tl.float32)
        mean_dz = tl.load(sums_ptr + level * C + cols, mask=inside, other=0.0) / total
        slope = tl.load(sums_ptr + (L + level) * C + cols, mask=inside, other=0.0)
        slope *= invstd / total
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_M):
        pixel = (first - level_first).to(tl.int32) + start + lanes
        image, rest = pixel // (out_height * out_width), pixel % (out_height * out_width)
        row, col = rest // out_width, rest % out_width
        mask = (start + lanes < count) & inside[None, :]
        windows = (first + start + lanes) * C + cols[None, :]
        corner = first_in + ((image * height + 2 * row) * width + 2 * col)
        for down in tl.static_range(2):
            for right in tl.static_range(2):  # of the pixel in its square
                exists = mask & (2 * row + down < height) & (2 * col + right < width)
                dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
                # A pixel in an even row is in the middle of its window; one in an odd row is at the
                # end of its window and at the beginning of the next. Columns likewise.
                for below in tl.static_range(down + 1):
                    for beside in tl.static_range(right + 1):
                        there = mask & (row + below < out_height) & (col + beside < out_width)
                        offsets = windows + (below * out_width + beside) * C
                        largest = tl.load(largest_ptr + offsets, mask=there, other=9)
                        dy = tl.load(dy_ptr + offsets, mask=there, other=0.0).to(tl.float32)
                        in_window = 3 * (1 + down - 2 * below) + (1 + right - 2 * beside)
                        dz += tl.where(largest == in_window, dy, 0.0)
                offsets = (corner + (down * width + right)) * C + cols[None, :]
                x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32) - mean[None, :]
                dz = gradient_before(dz, x * scale[None, :] + beta[None, :], ACTIVATION)
                if WRITE_DX:
                    dx = scale[None, :] * (dz - mean_dz[None, :] - x * slope[None, :])
                    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=exists)
                else:
                    sum_dz += dz
                    sum_dz_x += dz * x
    if not WRITE_DX:
        partial_ptr += chunk.to(tl.int64) * C + cols
        tl.store(partial_ptr, tl.sum(sum_dz, 0), mask=inside)
        partial_ptr += tl.num_programs(1).to(tl.int64) * C
        tl.store(partial_ptr, tl.sum(sum_dz_x, 0), mask=inside)


def backward(
    dy: Tensor,
    largest: Tensor,
    x: Tensor,
    affine: Affine,
    *,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    banks: Sequence[int],
    activation: str | None,
    batch_statistics: bool,
    eps: float,
    join: Callable[[Tensor], object] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias. Three launches.

    `join` makes the sums of each level, [2, L, C], those of all ranks before dx is computed.
    """
    chunks = share_out_windows(sizes, num_images, banks, x.shape[1])
    dx = torch.empty_like(x)
    partial = x.new_empty(2, chunks.total, x.shape[1], dtype=torch.float32)

    def launch(partial: Tensor | None, sums: Tensor | None, dx: Tensor | None) -> None:
        with on_device_of(x):
            _bn_act_max_pool_bwd_kernel[chunks.grid](
                dy,
                largest,
                x,
                *affine,
                partial,
                sums,
                dx,
                *chunks.levels,
                *map_arguments(sizes, num_images),
                eps,
                **chunks.sizes,
                BATCH_STATISTICS=batch_statistics,
                ACTIVATION=activation,
                WRITE_DX=dx is not None,
                **chunks.tile,
                **OPTIONS,
            )

    launch(partial, None, None)
    sums, dweight, dbias = finalize_sums(partial, affine, chunks, eps, batch_statistics)
    if join is not None:
        join(sums)
    launch(None, sums, dx)
    return dx, dweight, dbias
