"""How the Triton kernels share out rows and channels between programs.

Every launch covers all levels. The rows of a level are cut into chunks of equal length; a program
works on one chunk and BLOCK_C channels, and finds its level from the row counts, which are run-time
numbers: a kernel is compiled once per C, not once per image size.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from rsfast.kernels.common.launch import level_arguments
from rsfast.kernels.common.levels import Levels

__all__ = ["TILE_ELEMENTS", "Chunks", "find_chunk", "find_map", "share_out", "tile"]

# Elements of a tile: 16 for each of 128 threads, two 16-byte loads of 16-bit numbers. Not timed on
# a GPU yet.
TILE_ELEMENTS = 2048
# Programs of one launch: 8 for each of 132 multiprocessors. A constant, so that sums are split, and
# results rounded, alike on every GPU.
PROGRAMS = 1056
# Widths of a tile, best first; the first one that leaves few lanes idle is taken.
_BLOCK_C = (128, 64, 32, 16)
_MAX_IDLE = 1.125


class Chunks(NamedTuple):
    """How rows and channels are shared out between programs."""

    rows: int  # of a chunk
    total: int  # chunks of all levels
    grid: tuple[int, int]  # of programs: groups of channels, chunks
    levels: tuple[tuple[int, ...], tuple[int, ...], int]  # level_rows, banks and chunk_rows
    tile: dict[str, int]  # BLOCK_M, BLOCK_C
    sizes: dict[str, int]  # L, C


def tile(num_channels: int, elements: int = TILE_ELEMENTS) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_C) of so many elements, for rows of C channels."""
    padded = {width: triton.cdiv(num_channels, width) * width for width in _BLOCK_C}
    fitting = [width for width in _BLOCK_C if padded[width] <= _MAX_IDLE * num_channels]
    block_c = fitting[0] if fitting else min(_BLOCK_C, key=lambda width: (padded[width], -width))
    return elements // block_c, block_c


def share_out(levels: Levels, num_channels: int, elements: int = TILE_ELEMENTS) -> Chunks:
    """About PROGRAMS programs, whole tiles of so many elements, no chunk across a level's end."""
    block_m, block_c = tile(num_channels, elements)
    groups = triton.cdiv(num_channels, block_c)
    wanted = max(PROGRAMS // groups - len(levels.rows), 1)
    rows = triton.cdiv(triton.cdiv(sum(levels.rows), wanted), block_m) * block_m
    total = sum(triton.cdiv(level, rows) for level in levels.rows)
    return Chunks(
        rows=rows,
        total=total,
        grid=(groups, total),
        levels=(level_arguments(levels.rows), level_arguments(levels.banks), rows),
        tile={"BLOCK_M": block_m, "BLOCK_C": block_c},
        sizes={"L": len(levels.rows), "C": num_channels},
    )


@triton.jit
def find_chunk(
    chunk,
    level_rows,  # L row counts, as of level_arguments
    banks,  # L batch-norm banks, as of level_arguments
    chunk_rows,
    L: tl.constexpr,
):
    """(level, its bank, its first row and number of rows, the chunk's first row and number)."""
    level = 0
    bank = 0
    level_first = 0
    level_count = 0
    first = 0
    count = 0
    earlier_rows = 0
    index = chunk  # within the level
    for candidate in tl.static_range(L):
        rows = (level_rows[candidate] >> 1) - 1
        num_chunks = tl.cdiv(rows, chunk_rows)
        inside = (index >= 0) & (index < num_chunks)
        level = tl.where(inside, candidate, level)
        bank = tl.where(inside, (banks[candidate] >> 1) - 1, bank)
        level_first = tl.where(inside, earlier_rows, level_first)
        level_count = tl.where(inside, rows, level_count)
        first = tl.where(inside, earlier_rows + index * chunk_rows, first)
        count = tl.where(inside, tl.minimum(rows - index * chunk_rows, chunk_rows), count)
        earlier_rows += rows
        index -= num_chunks
    return level, bank, level_first.to(tl.int64), level_count, first.to(tl.int64), count


@triton.jit
def find_map(
    level,
    heights,  # L heights, as of level_arguments
    widths,
    num_images,
    L: tl.constexpr,
):
    """(height, width, first row) of the level."""
    height = 1
    width = 1
    first = 0
    earlier_rows = 0
    for candidate in tl.static_range(L):
        h = (heights[candidate] >> 1) - 1
        w = (widths[candidate] >> 1) - 1
        height = tl.where(level == candidate, h, height)
        width = tl.where(level == candidate, w, width)
        first = tl.where(level == candidate, earlier_rows, first)
        earlier_rows += num_images * h * w
    return height, width, first.to(tl.int64)
