"""What both directions of global average pooling have in common.

One program per image of a level and BLOCK_C channels; it finds its level from the row counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.launch import OPTIONS, level_arguments, on_device_of

__all__ = ["find_image", "launch", "tile"]

TILE_ELEMENTS = 2048  # 16 for each of 128 threads; not timed on a GPU yet


def tile(num_channels: int) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C), pixels and channels."""
    block_c = min(max(triton.next_power_of_2(num_channels), 16), 128)
    return TILE_ELEMENTS // block_c, block_c


@triton.jit
def find_image(
    image,  # over all levels
    level_rows,  # L row counts, as of level_arguments
    num_images,  # N
    L: tl.constexpr,
):
    """(first row, number of pixels) of the image."""
    first = 0
    num_pixels = 0
    earlier_rows = 0
    for level in tl.static_range(L):
        rows = (level_rows[level] >> 1) - 1
        pixels = rows // num_images
        index = image - level * num_images
        inside = (index >= 0) & (index < num_images)
        first = tl.where(inside, earlier_rows + index * pixels, first)
        num_pixels = tl.where(inside, pixels, num_pixels)
        earlier_rows += rows
    return first.to(tl.int64), num_pixels


def launch(
    kernel: triton.JITFunction,
    source: Tensor,
    target: Tensor,
    level_rows: Sequence[int],
    num_images: int,
) -> None:
    """Fills `target` from `source`."""
    num_levels, num_channels = len(level_rows), source.shape[1]
    block_p, block_c = tile(num_channels)
    with on_device_of(source):
        # Images come first: the second axis ends at 65,535 programs.
        kernel[num_levels * num_images, triton.cdiv(num_channels, block_c)](
            source,
            target,
            level_arguments(level_rows),
            num_images,
            L=num_levels,
            C=num_channels,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            **OPTIONS,
        )
