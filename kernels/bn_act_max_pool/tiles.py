"""What both directions of the Triton kernels of batch norm and max pooling have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.kernels.common.launch import level_arguments
from rsfast.kernels.common.levels import Levels, rows_of_levels
from rsfast.kernels.common.tiles import Shares, share_out, wave_options
from rsfast.kernels.common.windows import conv2d_sizes

__all__ = ["OPTIONS", "PROGRAMS", "map_arguments", "share_out_windows", "tile_elements"]

# Of a tile: one 16-byte load for each of 256 threads; with two, addresses take twice the registers.
# Not timed on a GPU yet.
_TILE_BYTES = 4096
# That fit on a multiprocessor, by registers.
PROGRAMS = 2
OPTIONS = wave_options(PROGRAMS)

Sizes = Sequence[tuple[int, int]]


def share_out_windows(sizes: Sizes, num_images: int, banks: Sequence[int], x: Tensor) -> Shares:
    """Of output pixels of `x` between programs."""
    out_sizes = conv2d_sizes(sizes, 3, 2, 1)
    levels = Levels(rows_of_levels(out_sizes, num_images), banks)
    return share_out(levels, x.shape[1], PROGRAMS, tile_elements(x.dtype))


def tile_elements(dtype: torch.dtype) -> int:
    """Output elements of a tile."""
    return _TILE_BYTES // dtype.itemsize


def map_arguments(sizes: Sizes, num_images: int) -> tuple[Any, ...]:
    """Heights and widths of the input, and the number of images, for a kernel."""
    heights, widths = zip(*sizes, strict=True)
    return level_arguments(heights), level_arguments(widths), num_images
