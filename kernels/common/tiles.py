"""How the Triton kernels of batch norm share out rows and channels between programs.

Every launch covers all levels, with as many programs as run at a time, so that none begins when the
others end. A share is what one program goes over: BLOCK_C channels of every n-th tile of a level,
where n is how many shares the level has. So all programs move through a level together, and what
one pass reads last a second pass, which goes from the last tile to the first, finds in the cache. A
program finds its level from the row counts, which are run-time numbers: a kernel is compiled once
per C, not once per image size.
"""

from __future__ import annotations

import bisect
import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from rsfast.kernels.common.launch import OPTIONS, level_arguments
from rsfast.kernels.common.levels import Levels

__all__ = [
    "TILE_ELEMENTS",
    "Shares",
    "find_map",
    "find_share",
    "share_out",
    "tile",
    "wave_options",
]

# Of an H100 or H200. A constant, so that sums are split, and results rounded, alike on every GPU.
MULTIPROCESSORS = 132
# Of a multiprocessor of compute capability 8.0 or 9.0, and what a program gets them in steps of.
_REGISTERS, _REGISTER_STEP = 65536, 8
_NUM_WARPS = 8
# Elements of a tile: 8 for each of 256 threads, one 16-byte load of 16-bit numbers, and one byte of
# a mask. Not timed on a GPU yet.
TILE_ELEMENTS = 2048
# The most where rows do not begin at multiples of 16 bytes: each element needs an address then.
_ODD_ELEMENTS = 1024
# Widths of a tile, best first; the first one that leaves few lanes idle is taken.
_BLOCK_C = (128, 64, 32, 16)
_MAX_IDLE = 1.125


class Shares(NamedTuple):
    """How rows and channels are shared out between programs."""

    rows: int  # of the largest share
    total: int  # shares of all levels
    grid: tuple[int, int]  # of programs: groups of channels, shares
    levels: tuple[tuple[int, ...], tuple[int, ...], int]  # level_rows, banks and share_rows
    tile: dict[str, int]  # BLOCK_M, BLOCK_C
    sizes: dict[str, int]  # L, C


def wave_options(programs: int) -> dict[str, Any]:
    """Launch options of a kernel of which so many programs fit on a multiprocessor."""
    registers = _REGISTERS // (programs * _NUM_WARPS * 32)
    maxnreg = registers // _REGISTER_STEP * _REGISTER_STEP
    return {**OPTIONS, "num_warps": _NUM_WARPS, "maxnreg": maxnreg}


def tile(num_channels: int, elements: int = TILE_ELEMENTS) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_C) of so many elements, for rows of C channels."""
    if num_channels % 8:
        elements = min(elements, _ODD_ELEMENTS)
    padded = {width: triton.cdiv(num_channels, width) * width for width in _BLOCK_C}
    fitting = [width for width in _BLOCK_C if padded[width] <= _MAX_IDLE * num_channels]
    block_c = fitting[0] if fitting else min(_BLOCK_C, key=lambda width: (padded[width], -width))
    return elements // block_c, block_c


def share_out(
    levels: Levels, num_channels: int, programs: int, elements: int = TILE_ELEMENTS
) -> Shares:
    """One wave of so many programs per multiprocessor, with tiles of so many elements."""
    block_m, block_c = tile(num_channels, elements)
    groups = triton.cdiv(num_channels, block_c)
    rows = _share_rows(tuple(levels.rows), programs * MULTIPROCESSORS // groups, block_m)
    total = sum(triton.cdiv(level, rows) for level in levels.rows)
    return Shares(
        rows=rows,
        total=total,
        grid=(groups, total),
        levels=(level_arguments(levels.rows), level_arguments(levels.banks), rows),
        tile={"BLOCK_M": block_m, "BLOCK_C": block_c},
        sizes={"L": len(levels.rows), "C": num_channels},
    )


@functools.lru_cache(maxsize=4096)
def _share_rows(level_rows: tuple[int, ...], wanted: int, block_m: int) -> int:
    """Rows of the largest share, as few as `wanted` shares allow; each level has one at least."""
    tiles = [triton.cdiv(rows, block_m) for rows in level_rows]

    def is_enough(size: int) -> bool:
        return sum(triton.cdiv(count, size) for count in tiles) <= wanted

    sizes = range(1, max(tiles) + 1)
    return block_m * (1 + bisect.bisect_left(sizes, True, key=is_enough))


@triton.jit
def find_share(
    share,
    level_rows,  # L row counts, as of level_arguments
    banks,  # L batch-norm banks, as of level_arguments
    share_rows,
    L: tl.constexpr,
):
    """(level, its bank, its first row and number of rows, the share's index in it, its shares)."""
    level = 0
    bank = 0
    first = 0
    count = 0
    place = 0
    shares = 0
    earlier_rows = 0
    index = share  # within the level
    for candidate in tl.static_range(L):
        rows = (level_rows[candidate] >> 1) - 1
        num_shares = tl.cdiv(rows, share_rows)
        inside = (index >= 0) & (index < num_shares)
        level = tl.where(inside, candidate, level)
        bank = tl.where(inside, (banks[candidate] >> 1) - 1, bank)
        first = tl.where(inside, earlier_rows, first)
        count = tl.where(inside, rows, count)
        place = tl.where(inside, index, place)
        shares = tl.where(inside, num_shares, shares)
        earlier_rows += rows
        index -= num_shares
    return level, bank, first.to(tl.int64), count, place, shares


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
