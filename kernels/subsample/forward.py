"""Forward Triton kernel of :mod:`rsfast.kernels.subsample.op`."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.subsample.tiles import find_line, launch

__all__ = ["forward"]


@triton.jit(do_not_specialize=["num_images"])
def _subsample_fwd_kernel(
    x_ptr,  # [M, C]
    y_ptr,  # [M', C] like x, fully overwritten
    heights,  # of the input
    widths,
    num_images,
    L: tl.constexpr,
    C: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    line = tl.program_id(0)
    first_out, first_in, width, _ = find_line(line, heights, widths, num_images, L, DOWN, RIGHT)
    num_pixels = tl.cdiv(width, RIGHT)
    lanes = tl.arange(0, BLOCK_P)[:, None]
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    x_ptr += first_in * C
    y_ptr += first_out * C
    for start in range(0, num_pixels, BLOCK_P):
        pixels = start + lanes
        mask = (pixels < num_pixels) & (cols < C)
        x = tl.load(x_ptr + (pixels * RIGHT * C + cols), mask=mask)
        tl.store(y_ptr + (pixels * C + cols), x, mask=mask)


def forward(
    x: Tensor,
    y: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: Sequence[int],
) -> None:
    """Fills `y` [M', C] with some of the rows of `x` [M, C]. One launch."""
    launch(_subsample_fwd_kernel, x, y, sizes, num_images, stride)
