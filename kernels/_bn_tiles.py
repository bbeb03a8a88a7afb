"""What the Triton kernels of switchable batch norm have in common: how they share out the work.

Every launch covers all levels. The rows of a level are cut into chunks of equal length; a program
works on one chunk and BLOCK_C channels, and finds its level from the row counts, which are run-time
numbers: a kernel is compiled once per C, not once per image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from rsfast.kernels._launch import OPTIONS, level_arguments

__all__ = [
    "FINALIZE_OPTIONS",
    "Chunks",
    "activate",
    "finalize_tile",
    "find_chunk",
    "find_map",
    "load_affine",
    "load_invstd",
    "load_origin",
    "mask_tile",
    "merge_chunks",
    "merge_lanes",
    "share_out",
]

# Elements of a tile: 16 for each of 128 threads, two 16-byte loads of 16-bit numbers, 48 to 117
# registers (tests/kernels/test_compile_ahead.py). Not timed on a GPU yet.
TILE_ELEMENTS = 2048
# Left alone, ptxas spills to fit more programs onto a multiprocessor; here there are few.
FINALIZE_OPTIONS = {**OPTIONS, "maxnreg": 255}
# Programs of one launch: 8 for each of 132 multiprocessors. A constant, so that sums are split, and
# results rounded, alike on every GPU.
PROGRAMS = 1056
# Widths of a tile, best first; the first one that leaves few lanes idle is taken.
_BLOCK_C = (128, 64, 32, 16)
_MAX_IDLE = 1.125


class Chunks(NamedTuple):
    """How rows and channels are shared out between programs."""

    rows: int  # of a chunk
    count: int  # chunks of all levels
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


def finalize_tile(num_channels: int) -> dict[str, int]:
    """BLOCK_K chunks and BLOCK_C channels of the kernels that add up partial results.

    Few channels come with many chunks, and need narrow tiles to occupy more than a few programs.
    """
    block_k, block_c = (64, 16) if num_channels < 512 else (16, 64)
    return {"BLOCK_K": block_k, "BLOCK_C": block_c}


def share_out(
    level_rows: Sequence[int],
    banks: Sequence[int],
    num_channels: int,
    elements: int = TILE_ELEMENTS,
) -> Chunks:
    """About PROGRAMS programs, whole tiles of so many elements, no chunk across a level's end."""
    block_m, block_c = tile(num_channels, elements)
    groups = triton.cdiv(num_channels, block_c)
    wanted = max(PROGRAMS // groups - len(level_rows), 1)
    rows = triton.cdiv(triton.cdiv(sum(level_rows), wanted), block_m) * block_m
    count = sum(triton.cdiv(level, rows) for level in level_rows)
    return Chunks(
        rows=rows,
        count=count,
        grid=(groups, count),
        levels=(level_arguments(level_rows), level_arguments(banks), rows),
        tile={"BLOCK_M": block_m, "BLOCK_C": block_c},
        sizes={"L": len(level_rows), "C": num_channels},
    )


@triton.jit
def find_chunk(
    chunk,
    level_rows,  # L row counts, as of level_arguments
    banks,  # L batch-norm sets, as of level_arguments
    chunk_rows,
    L: tl.constexpr,
):
    """(level, its set, its first row and number of rows, the chunk's first row and number)."""
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
    STRIDE: tl.constexpr,
):
    """(height, width, first row of the level before, and after, a window moves with the stride)."""
    height = 1
    width = 1
    first_in = 0
    first_out = 0
    earlier_in = 0
    earlier_out = 0
    for candidate in tl.static_range(L):
        h = (heights[candidate] >> 1) - 1
        w = (widths[candidate] >> 1) - 1
        height = tl.where(level == candidate, h, height)
        width = tl.where(level == candidate, w, width)
        first_in = tl.where(level == candidate, earlier_in, first_in)
        first_out = tl.where(level == candidate, earlier_out, first_out)
        earlier_in += num_images * h * w
        earlier_out += num_images * ((h + STRIDE - 1) // STRIDE) * ((w + STRIDE - 1) // STRIDE)
    return height, width, first_in.to(tl.int64), first_out.to(tl.int64)


@triton.jit
def load_origin(
    x_ptr,  # [M, C]
    first,  # int64, row of a level
    count,  # rows of the level
    cols,
    C: tl.constexpr,
):
    """[BLOCK_C] a value near the level's mean: the median of its first, middle and last row."""
    x_ptr += first * C + cols
    a = tl.load(x_ptr, mask=cols < C, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + (count // 2).to(tl.int64) * C, mask=cols < C, other=0.0).to(tl.float32)
    c = tl.load(x_ptr + (count - 1).to(tl.int64) * C, mask=cols < C, other=0.0).to(tl.float32)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def merge_lanes(
    mean,  # [LANES, BLOCK_C] means, m2 sums of squared deviations from them
    m2,
    count,  # [LANES, 1] rows behind them; lane 0 has some, a lane without any has m2 = 0
):
    """(mean, m2) [BLOCK_C] of all lanes together."""
    lane = tl.arange(0, mean.shape[0])[:, None]
    total = tl.sum(count, 0)
    # Relative to one lane, so that a large mean does not cost the digits of its differences; twice,
    # for when that lane is an outlier.
    center = tl.sum(tl.where(lane == 0, mean, 0.0), 0)
    for _ in range(2):
        deviation = tl.where(count > 0, mean - center[None, :], 0.0)
        center += tl.sum(deviation * count, 0) / total
    deviation = tl.where(count > 0, mean - center[None, :], 0.0)
    return center, tl.sum(m2 + deviation * deviation * count, 0)


@triton.jit
def merge_chunks(
    partial_ptr,  # [2 or 3, chunks, C] float32: mean, m2 and rest of mean, chunks of all levels
    stride_partial,  # chunks * C
    first_chunk,
    rows,
    chunk_rows,
    cols,
    C: tl.constexpr,
    HAS_REST: tl.constexpr,
    BLOCK_K: tl.constexpr,  # chunks
    BLOCK_C: tl.constexpr,
):
    """(origin, mean - origin, m2) [BLOCK_C] of so many rows from a chunk on.

    A mean far from 0 comes in two parts, of which only differences to the first chunk, the origin,
    are merged. Without the second parts the origin is 0.
    """
    origin = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_REST:
        origin_ptrs = partial_ptr + first_chunk.to(tl.int64) * C + cols
        origin = tl.load(origin_ptrs, mask=cols < C, other=0.0)
    lanes = tl.arange(0, BLOCK_K)[:, None]
    chunks = tl.cdiv(rows, chunk_rows)
    mean = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_K, 1), tl.float32)
    for start in range(0, chunks, BLOCK_K):
        index = start + lanes
        mask = (index < chunks) & (cols < C)[None, :]
        ptrs = partial_ptr + (first_chunk + index).to(tl.int64) * C + cols[None, :]
        new_count = tl.minimum(rows - index * chunk_rows, chunk_rows)
        new_count = tl.maximum(new_count, 0).to(tl.float32)
        delta = tl.load(ptrs, mask=mask, other=0.0)
        if HAS_REST:
            delta = (delta - origin[None, :]) + tl.load(ptrs + 2 * stride_partial, mask=mask)
        delta = tl.where(mask, delta - mean, 0.0)
        share = new_count / tl.maximum(count + new_count, 1.0)
        mean += delta * share
        m2 += tl.load(ptrs + stride_partial, mask=mask, other=0.0)
        m2 += delta * delta * (count * share)
        count += new_count
    mean_all, m2_all = merge_lanes(mean, m2, count)
    return origin, mean_all, m2_all


@triton.jit
def load_invstd(
    var_ptr,  # [L or B, C] float32, biased
    row,
    cols,
    eps,
    C: tl.constexpr,
):
    """[BLOCK_C] 1 / deviation."""
    var = tl.load(var_ptr + row * C + cols, mask=cols < C, other=1.0)
    return 1.0 / tl.sqrt_rn(var + eps)


@triton.jit
def load_affine(
    mean_ptr,  # [L or B, C] float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    row,  # of mean and var
    bank,
    cols,
    eps,
    C: tl.constexpr,
):
    """(mean, gamma / deviation, beta, 1 / deviation) [BLOCK_C]."""
    inside = cols < C
    mean = tl.load(mean_ptr + row * C + cols, mask=inside, other=0.0)
    gamma = tl.load(gamma_ptr + bank * C + cols, mask=inside, other=0.0)
    beta = tl.load(beta_ptr + bank * C + cols, mask=inside, other=0.0)
    invstd = load_invstd(var_ptr, row, cols, eps, C)
    return mean, gamma * invstd, beta, invstd


@triton.jit
def mask_tile(
    mask_ptr,  # [M, ceil(C / 8)] uint8
    first,  # int64, row
    lanes,  # [BLOCK_M, 1]
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(pointers [BLOCK_M, BLOCK_C / 8] from a row on, which of their columns exist)."""
    MASK_C: tl.constexpr = (C + 7) // 8
    cols = tl.program_id(0) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)[None, :]
    return mask_ptr + first * MASK_C + (lanes * MASK_C + cols), cols < MASK_C


@triton.jit
def activate(
    y,
    ACTIVATION: tl.constexpr,
):
    """(act(y), where it has a gradient); NaN stays NaN."""
    cut = y <= 0
    y = tl.where(cut, 0.0, y)
    if ACTIVATION == "relu6":
        above = y >= 6
        y = tl.where(above, 6.0, y)
        cut = cut | above
    return y, ~cut
