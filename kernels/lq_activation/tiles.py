"""What the Triton kernels of quantised activations have in common: levels, and shares of rows."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from rsfast.kernels.common.levels import Levels
from rsfast.kernels.common.tiles import TILE_ELEMENTS, Shares, share_out

__all__ = [
    "NUM_PROGRAMS",
    "codes_of",
    "load_levels",
    "num_programs",
    "share_rows_out",
    "tile_elements",
]

# By bits, programs that fit on a multiprocessor: each level and threshold is a register, and so is
# each code's count and sum. From 3 bits on tiles are half as large, for the same reason.
NUM_PROGRAMS = {1: 2, 2: 2, 3: 1, 4: 1}


def tile_elements(bits: int) -> int:
    """Of a tile of the forward kernel."""
    return TILE_ELEMENTS // (1 if bits < 3 else 2)


def share_rows_out(level_rows: Sequence[int], num_channels: int, bits: int) -> Shares:
    """One wave of programs over all levels; there are no banks."""
    levels = Levels(tuple(level_rows), (0,) * len(level_rows))
    return share_out(levels, num_channels, NUM_PROGRAMS[bits], tile_elements(bits))


def num_programs(level_rows: Sequence[int], num_channels: int, bits: int) -> int:
    """P, of the forward launch."""
    groups, shares = share_rows_out(level_rows, num_channels, bits).grid
    return groups * shares


@triton.jit
def load_levels(
    basis_ptr,  # [K] float32
    K: tl.constexpr,
):
    """[2^K] float32: the sum that each number's binary digits choose, in the order of numbers."""
    number = tl.arange(0, 2**K)
    level = (number & 1).to(tl.float32) * tl.load(basis_ptr)
    for j in tl.static_range(1, K):
        level += ((number >> j) & 1).to(tl.float32) * tl.load(basis_ptr + j)
    return level


@triton.jit
def codes_of(
    level,  # [2^K]
    K: tl.constexpr,
):
    """[2^K] int32: the place of each number's level in ascending order; equal ones stay in turn."""
    number = tl.arange(0, 2**K)
    other, own = level[None, :], level[:, None]
    # What is not greater counts, so that NaN have places, too.
    earlier = (number[None, :] < number[:, None]) & ~(other > own)
    return tl.sum(((other < own) | earlier).to(tl.int32), 1)
