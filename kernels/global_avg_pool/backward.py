"""Backward Triton kernel of :mod:`rsfast.kernels.global_avg_pool.op`."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.global_avg_pool.tiles import find_image, launch

__all__ = ["backward"]


@triton.jit(do_not_specialize=["num_images"])
def _global_avg_pool_bwd_kernel(
    dy_ptr,  # [L * N, C]
    dx_ptr,  # [M, C] like dy, fully overwritten
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
    dy_ptr += image.to(tl.int64) * C + cols
    dy = tl.load(dy_ptr, mask=cols < C, other=0.0).to(tl.float32)
    dx = tl.broadcast_to((dy / num_pixels)[None, :], (BLOCK_P, BLOCK_C))
    dx = dx.to(dx_ptr.dtype.element_ty)
    dx_ptrs = dx_ptr + first * C + (lanes * C + cols[None, :])
    for start in range(0, num_pixels, BLOCK_P):
        mask = (start + lanes < num_pixels) & (cols < C)[None, :]
        tl.store(dx_ptrs, dx, mask=mask)
        dx_ptrs += BLOCK_P * C


def backward(dy: Tensor, dx: Tensor, level_rows: Sequence[int], num_images: int) -> None:
    """Fills `dx` [M, C] with the gradient for `dy` [L * N, C]."""
    launch(_global_avg_pool_bwd_kernel, dy, dx, level_rows, num_images)
