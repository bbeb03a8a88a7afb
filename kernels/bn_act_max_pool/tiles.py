"""What both directions of the Triton kernels of batch norm and max pooling have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rsfast.kernels.common.launch import level_arguments
from rsfast.kernels.common.levels import Levels, rows_of_levels
from rsfast.kernels.common.tiles import Chunks, share_out
from rsfast.kernels.common.windows import conv2d_sizes

__all__ = ["TILE_ELEMENTS", "map_arguments", "share_out_windows"]

# One 16-byte load for each of 128 threads; with two, addresses take twice the registers, and some
# shapes spill. Not timed on a GPU yet.
TILE_ELEMENTS = 1024

Sizes = Sequence[tuple[int, int]]


def share_out_windows(
    sizes: Sizes, num_images: int, banks: Sequence[int], num_channels: int
) -> Chunks:
    """Of output pixels between programs."""
    out_sizes = conv2d_sizes(sizes, 3, 2, 1)
    levels = Levels(rows_of_levels(out_sizes, num_images), banks)
    return share_out(levels, num_channels, TILE_ELEMENTS)


def map_arguments(sizes: Sizes, num_images: int) -> tuple[Any, ...]:
    """Heights and widths of the input, and the number of images, for a kernel."""
    heights, widths = zip(*sizes, strict=True)
    return level_arguments(heights), level_arguments(widths), num_images
