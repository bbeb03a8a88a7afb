"""Forward Triton kernel of :mod:`rsfast.kernels.global_avg_pool.op`."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.global_avg_pool.tiles import find_image, launch

__all__ = ["forward"]


@triton.jit(do_not_specialize=["num_images"])
def _global_avg_pool_fwd_kernel(
    x_ptr,  # [M, C]
    y_ptr,  # [L * N, C] like x, fully overwritten
    level_rows,
    num_images,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0)
    first, num_pixels = find_image(image, level_rows, num_images, L)
    lanes = tl.arange(0, BLOCK_P)[:, None]
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + first * C + (lanes * C + cols[None, :])
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, num_pixels, BLOCK_P):
        mask = (start + lanes < num_pixels) & (cols < C)[None, :]
        total += tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        x_ptrs += BLOCK_P * C
    mean = tl.sum(total, 0) / num_pixels
    y_ptr += image.to(tl.int64) * C + cols
    tl.store(y_ptr, mean.to(y_ptr.dtype.element_ty), mask=cols < C)


def forward(x: Tensor, y: Tensor, level_rows: Sequence[int], num_images: int) -> None:
    """Fills `y` [L * N, C] with the means of `x` [M, C]."""
    launch(_global_avg_pool_fwd_kernel, x, y, level_rows, num_images)
