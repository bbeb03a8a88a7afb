"""What the Triton kernels of :mod:`rsfast.kernels.folded_conv2d` have in common.

A tile of rows never crosses a level's end, so that everything that differs between levels (what is
pending on the input, the statistics of the output) is one vector per tile. Partial sums are added
up in a fixed order by launches of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels._bn_tiles import activate, find_map, merge_chunks
from rsfast.kernels._checks import rows_of_levels
from rsfast.kernels._launch import OPTIONS, level_arguments, on_device_of

__all__ = [
    "Affine",
    "Maps",
    "constants",
    "find_window",
    "launch_arguments",
    "load_affine",
    "load_input",
    "max_registers",
    "merge",
    "row_tiles",
    "rows_at_tap",
    "tiles",
]

GEMM_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}

# Up to 6,272 row tiles in a level of a ResNet-50 at batch 256: 49 programs merge 128 each.
MERGE_OPTIONS = {**OPTIONS, "BLOCK_K": 128, "BLOCK_C": 16}


class Affine(NamedTuple):
    """What is pending on the input, [L, C_in] float32 each."""

    center: Tensor
    scale: Tensor
    shift: Tensor


class Maps(NamedTuple):
    """The levels of the input, and the stride of the convolution."""

    heights: Sequence[int]
    widths: Sequence[int]
    num_images: int
    stride: int

    @property
    def rows_in(self) -> list[int]:
        """Rows of each level of the input."""
        return rows_of_levels(self.heights, self.widths, self.num_images)

    @property
    def rows_out(self) -> list[int]:
        """Rows of each level of the output."""
        return rows_of_levels(*self)


def tiles(dtype: torch.dtype, num_in: int, num_out: int) -> dict[str, int]:
    """BLOCK_M rows, BLOCK_N output and BLOCK_K input channels. Not timed on a GPU yet."""
    if dtype == torch.float32:  # without tensor cores; more spills
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    # Odd channel counts are loaded number by number, and addressed so: half the rows fit.
    if num_in % 8 > 0 or num_out % 8 > 0:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    return {"BLOCK_M": 128, "BLOCK_N": 64 if num_out <= 64 else 128, "BLOCK_K": 64}


def max_registers(dtype: torch.dtype, capability: tuple[int, int], *, wide: bool) -> int:
    """For each thread: 128, so that two programs fit on a multiprocessor, or all there are.

    With 128, float32 spills, so does every product before compute capability 9.0, and so do the
    `wide` ones: those whose larger operand goes through registers, and strided ones.
    """
    return 255 if wide or dtype == torch.float32 or capability < (9, 0) else 128


@triton.jit
def find_window(
    level,
    level_first,  # int64, first of the level's rows of the output
    rows,  # [BLOCK_M, 1] int64 of the output
    heights,
    widths,
    num_images,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """(first row of the level's input, its height and width; image, row and column of windows).

    Rows and columns are those of the windows' centres. Not used where windows are single pixels.
    """
    height, width, first_in, _ = find_map(level, heights, widths, num_images, L, STRIDE)
    out_height, out_width = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
    pixel = (rows - level_first).to(tl.int32)
    image, rest = pixel // (out_height * out_width), pixel % (out_height * out_width)
    row, col = rest // out_width * STRIDE, rest % out_width * STRIDE
    return first_in, height, width, image, row, col


@triton.jit
def rows_at_tap(
    window,  # of find_window
    rows,  # [BLOCK_M, 1] int64 of the output
    inside,  # [BLOCK_M, 1]
    tap,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """(rows of the input that a tap of the kernel sees, which of them exist), [BLOCK_M, 1]."""
    rows_in = rows
    exist = inside
    if KERNEL * STRIDE > 1:
        first_in, height, width, image, row, col = window
        row += tap // KERNEL - KERNEL // 2
        col += tap % KERNEL - KERNEL // 2
        exist = inside & (row >= 0) & (row < height) & (col >= 0) & (col < width)
        rows_in = first_in + ((image * height + row) * width + col)
    return rows_in, exist


@triton.jit
def load_input(
    x_ptrs,
    mask,  # [BLOCK_M, BLOCK_K]
    center_ptr,  # [L, C_IN] float32 or None
    scale_ptr,  # like center_ptr
    shift_ptr,  # like center_ptr
    level,
    cols,  # [BLOCK_K] of the input
    C_IN: tl.constexpr,
    ZERO_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
):
    """The input with what is pending on it, in the type of x.

    Where masked, it is 0 beyond C_IN, and with ZERO_ROWS in rows, too.
    """
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    if HAS_AFFINE:
        center, scale, shift = load_affine(center_ptr, scale_ptr, shift_ptr, level, cols, C_IN)
        z = (x.to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :]
        if ACTIVATION is not None:
            z, _ = activate(z, ACTIVATION)
        x = z.to(x.dtype)
        if ZERO_ROWS:
            x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def load_affine(center_ptr, scale_ptr, shift_ptr, level, cols, C_IN: tl.constexpr):
    offsets = level * C_IN + cols
    inside = cols < C_IN
    center = tl.load(center_ptr + offsets, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + offsets, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + offsets, mask=inside, other=0.0)
    return center, scale, shift


@triton.jit(do_not_specialize=["stride_partial", "chunk_rows", "group_rows"])
def _folded_conv2d_merge_kernel(
    partial_ptr,  # [2, chunks, C] float32 sums; or moments, [2 or 3, ...]: mean, m2, rest of mean
    first_ptr,  # [groups, C] float32, the first of those of each group, fully overwritten
    second_ptr,  # like first_ptr, the second; biased variance for m2 if LAST
    rest_ptr,  # like first_ptr; None without rests and if LAST
    stride_partial,  # chunks * C
    level_rows,
    chunk_rows,
    group_rows,  # a multiple of chunk_rows; at least a level's if LAST
    L: tl.constexpr,
    C: tl.constexpr,
    MOMENTS: tl.constexpr,
    HAS_REST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_K: tl.constexpr,  # chunks
    BLOCK_C: tl.constexpr,
):
    group = tl.program_id(1)
    index = group  # within a level
    rows = 0
    first_chunk = 0
    earlier = 0
    for level in tl.static_range(L):
        count = (level_rows[level] >> 1) - 1
        groups = tl.cdiv(count, group_rows)
        inside = (index >= 0) & (index < groups)
        rows = tl.where(inside, tl.minimum(count - index * group_rows, group_rows), rows)
        first_chunk = tl.where(inside, earlier + index * (group_rows // chunk_rows), first_chunk)
        earlier += tl.cdiv(count, chunk_rows)
        index -= groups
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = group * C + cols
    if MOMENTS:
        first, rest, second = merge_chunks(
            partial_ptr,
            stride_partial,
            first_chunk,
            rows,
            chunk_rows,
            cols,
            C,
            HAS_REST,
            BLOCK_K,
            BLOCK_C,
        )
        if HAS_REST and not LAST:
            tl.store(rest_ptr + offsets, rest, mask=cols < C)
        else:
            first += rest
        if LAST:
            second = second / rows
    else:
        lanes = tl.arange(0, BLOCK_K)[:, None]
        chunks = tl.cdiv(rows, chunk_rows)
        sums = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        other_sums = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for start in range(0, chunks, BLOCK_K):
            mask = (start + lanes < chunks) & (cols < C)[None, :]
            ptrs = partial_ptr + (first_chunk + start + lanes).to(tl.int64) * C + cols[None, :]
            sums += tl.load(ptrs, mask=mask, other=0.0)
            other_sums += tl.load(ptrs + stride_partial, mask=mask, other=0.0)
        first, second = tl.sum(sums, 0), tl.sum(other_sums, 0)
    tl.store(first_ptr + offsets, first, mask=cols < C)
    tl.store(second_ptr + offsets, second, mask=cols < C)


def merge(
    partial: Tensor, level_rows: Sequence[int], chunk_rows: int, *, moments: bool
) -> tuple[Tensor, Tensor]:
    """Two [L, C] of partial results by row tile: mean and variance, or two sums.

    One launch, or two where levels have more tiles than a program takes at once.
    """
    num_channels, group_rows = partial.shape[-1], chunk_rows * MERGE_OPTIONS["BLOCK_K"]
    if max(level_rows) > group_rows:
        merged = partial.new_empty(len(partial), row_tiles(level_rows, group_rows), num_channels)
        _merge(partial, list(merged), level_rows, chunk_rows, group_rows, moments, last=False)
        partial, chunk_rows = merged, group_rows
    group_rows = triton.cdiv(max(level_rows), chunk_rows) * chunk_rows
    # Not parts of one tensor: an operator's outputs have memory of their own.
    first, second = (partial.new_empty(len(level_rows), num_channels) for _ in range(2))
    _merge(partial, [first, second], level_rows, chunk_rows, group_rows, moments, last=True)
    return first, second


def _merge(
    partial: Tensor,
    merged: list[Tensor],
    level_rows: Sequence[int],
    chunk_rows: int,
    group_rows: int,
    moments: bool,
    *,
    last: bool,
) -> None:
    groups, num_channels = merged[0].shape
    grid = triton.cdiv(num_channels, MERGE_OPTIONS["BLOCK_C"]), groups
    with on_device_of(partial):
        _folded_conv2d_merge_kernel[grid](
            partial,
            *merged,
            *([None] * (3 - len(merged))),
            partial.stride(0),
            level_arguments(level_rows),
            chunk_rows,
            group_rows,
            L=len(level_rows),
            C=num_channels,
            MOMENTS=moments,
            HAS_REST=len(partial) > 2,
            LAST=last,
            **MERGE_OPTIONS,
        )


def row_tiles(level_rows: Sequence[int], block_m: int) -> int:
    return sum(triton.cdiv(rows, block_m) for rows in level_rows)


def launch_arguments(maps: Maps, level_rows: Sequence[int]) -> tuple[Any, ...]:
    """The run-time numbers of a product over tiles of these rows."""
    sizes = level_arguments(maps.heights), level_arguments(maps.widths), maps.num_images
    return level_arguments(level_rows), *sizes


def constants(
    weight: Tensor, maps: Maps, activation: str | None, *, wide: bool = False
) -> dict[str, Any]:
    """What all three products are compiled for, besides their tiles."""
    num_out, num_in, kernel, _ = weight.shape
    sizes = {"L": len(maps.heights), "C_IN": num_in, "C_OUT": num_out}
    geometry = {"KERNEL": kernel, "STRIDE": maps.stride}
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else (9, 0)
    registers = max_registers(weight.dtype, capability, wide=wide or maps.stride > 1)
    return {**sizes, **geometry, "ACTIVATION": activation, **GEMM_OPTIONS, "maxnreg": registers}
