"""Forward Triton kernel of :mod:`rsfast.kernels.bn_act_max_pool.op`, which holds the equations.

A program takes output pixels and reads the nine of each window, of which its neighbours find most
in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.bn_act_max_pool.tiles import OPTIONS, map_arguments, share_out_windows
from rsfast.kernels.common.launch import on_device_of
from rsfast.kernels.common.levels import Affine
from rsfast.kernels.common.tiles import find_map, find_share
from rsfast.kernels.switchable_bn_act.tiles import activate, keeps_gradient, load_affine

__all__ = ["forward"]


@triton.jit(do_not_specialize=["share_rows", "num_images"])
def _bn_act_max_pool_fwd_kernel(
    x_ptr,  # [M, C]
    mean_ptr,  # [L, C] of the batch or [B, C] running, float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    y_ptr,  # [M', C] like x, fully overwritten
    largest_ptr,  # [M', C] uint8, fully overwritten
    level_rows,  # of the output
    banks,
    share_rows,
    heights,  # of the input
    widths,
    num_images,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    share = tl.program_id(1)
    level, bank, first, count, place, shares = find_share(share, level_rows, banks, share_rows, L)
    height, width, first_in = find_map(level, heights, widths, num_images, L)
    row_of_statistics = level if BATCH_STATISTICS else bank
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (cols < C)[None, :]
    mean, scale, beta, _ = load_affine(
        mean_ptr, var_ptr, gamma_ptr, beta_ptr, row_of_statistics, bank, cols, eps, C
    )
    # What batch norm and activation do never turns an order around, but for a negative scale: the
    # largest output is that of the largest input, or of the smallest.
    sign = tl.where(scale < 0, -1.0, 1.0)
    lowest = tl.where(scale < 0, float("inf"), float("-inf")).to(x_ptr.dtype.element_ty)
    lowest = tl.broadcast_to(lowest[None, :], (BLOCK_M, BLOCK_C))
    x_ptr += first_in * C
    tiles = tl.cdiv(count, BLOCK_M)
    for step in range(place, tiles, shares):
        # From the last tile to the first: the statistics read those last, they are still cached.
        pixel = (tiles - 1 - step) * BLOCK_M + lanes
        image = pixel // (out_height * out_width)
        rest = pixel % (out_height * out_width)
        row, col = 2 * (rest // out_width), 2 * (rest % out_width)  # of the pixel in the middle
        middle = x_ptr + ((image * height + row) * width + col).to(tl.int64) * C + cols[None, :]
        mask = (pixel < count) & inside
        best = tl.zeros((BLOCK_M, BLOCK_C), tl.float32) + tl.where(mask, float("-inf"), 0.0)
        largest = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
        for down in tl.static_range(-1, 2):
            for right in tl.static_range(-1, 2):
                exists = mask
                if down != 0:
                    exists = exists & (row + down >= 0) & (row + down < height)
                if right != 0:
                    exists = exists & (col + right >= 0) & (col + right < width)
                x_ptrs = middle + (down * width + right) * C
                x = tl.load(x_ptrs, mask=exists, other=lowest).to(tl.float32) * sign[None, :]
                largest = tl.where(x > best, 3 * down + right + 4, largest)
                best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
        # A scale of 0 makes all outputs equal: the first pixel of the window counts.
        first_pixel = tl.where(row == 0, 3, 0) + tl.where(col == 0, 1, 0)
        largest = tl.where((scale == 0)[None, :], first_pixel, largest)
        y = (best * sign[None, :] - mean[None, :]) * scale[None, :] + beta[None, :]
        if ACTIVATION is not None:
            largest = tl.where(keeps_gradient(y, ACTIVATION), largest, 9)
            y = activate(y, ACTIVATION)
        offsets = (first + pixel) * C + cols[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(largest_ptr + offsets, largest.to(tl.uint8), mask=mask)


def forward(
    x: Tensor,
    affine: Affine,
    y: Tensor,
    largest: Tensor,
    *,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    banks: Sequence[int],
    activation: str | None,
    batch_statistics: bool,
    eps: float,
) -> None:
    """Fills `y` and `largest`. One launch."""
    shares = share_out_windows(sizes, num_images, banks, x)
    with on_device_of(x):
        _bn_act_max_pool_fwd_kernel[shares.grid](
            x,
            *affine,
            y,
            largest,
            *shares.levels,
            *map_arguments(sizes, num_images),
            eps,
            **shares.sizes,
            BATCH_STATISTICS=batch_statistics,
            ACTIVATION=activation,
            **shares.tile,
            **OPTIONS,
        )
