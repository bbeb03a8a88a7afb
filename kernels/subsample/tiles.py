"""What both directions of the Triton kernels of subsampling have in common.

One program per line of output pixels and BLOCK_C channels: the lines of all levels one after
another. It finds its level from the sizes, once, and divides nothing by them for each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.launch import OPTIONS, level_arguments, on_device_of

__all__ = ["find_line", "launch", "tile"]

# One 16-byte load of 16-bit numbers for each of 128 threads; with two, some shapes spill. Not timed
# on a GPU yet.
TILE_ELEMENTS = 1024


def tile(num_channels: int) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C), pixels and channels."""
    block_c = min(max(triton.next_power_of_2(num_channels), 16), 128)
    return TILE_ELEMENTS // block_c, block_c


@triton.jit
def find_line(
    line,  # of output pixels, over all levels
    heights,  # L heights, as of level_arguments, of the input
    widths,
    num_images,  # N
    L: tl.constexpr,
    DOWN: tl.constexpr,  # stride
    RIGHT: tl.constexpr,
):
    """(first output row, first input row, width of the input, input lines up to the next one)."""
    index = line  # within the level
    first_out = 0
    first_in = 0
    width = 1
    num_lines = 1
    earlier_out = 0
    earlier_in = 0
    for level in tl.static_range(L):
        h = (heights[level] >> 1) - 1
        w = (widths[level] >> 1) - 1
        out_h = tl.cdiv(h, DOWN)
        out_w = tl.cdiv(w, RIGHT)
        inside = (index >= 0) & (index < num_images * out_h)
        top = (index % out_h) * DOWN
        first_out = tl.where(inside, earlier_out + index * out_w, first_out)
        first_in = tl.where(inside, earlier_in + (index // out_h * h + top) * w, first_in)
        width = tl.where(inside, w, width)
        num_lines = tl.where(inside, tl.minimum(h - top, DOWN), num_lines)
        earlier_out += num_images * out_h * out_w
        earlier_in += num_images * h * w
        index -= num_images * out_h
    return first_out.to(tl.int64), first_in.to(tl.int64), width, num_lines


def launch(
    kernel: triton.JITFunction,
    source: Tensor,
    target: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: Sequence[int],
) -> None:
    """Fills `target` from `source`."""
    down, right = stride
    num_channels = source.shape[1]
    block_p, block_c = tile(num_channels)
    heights, widths = zip(*sizes, strict=True)
    num_lines = num_images * sum(triton.cdiv(height, down) for height in heights)
    with on_device_of(source):
        # Lines come first: the second axis ends at 65,535 programs.
        kernel[num_lines, triton.cdiv(num_channels, block_c)](
            source,
            target,
            level_arguments(heights),
            level_arguments(widths),
            num_images,
            L=len(sizes),
            C=num_channels,
            DOWN=down,
            RIGHT=right,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            **OPTIONS,
        )
