"""Backward Triton kernel of :mod:`rsfast.kernels.lq_activation.op`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.launch import on_device_of
from rsfast.kernels.common.levels import Levels
from rsfast.kernels.common.tiles import find_share, share_out, wave_options
from rsfast.kernels.switchable_bn_act.tiles import mask_tile

__all__ = ["OPTIONS", "PROGRAMS", "backward"]

PROGRAMS = 4  # that fit on a multiprocessor
OPTIONS = wave_options(PROGRAMS)


@triton.jit(do_not_specialize=["share_rows"])
def _lq_activation_bwd_kernel(
    dy_ptr,  # [M, C]
    mask_ptr,  # [M, ceil(C / 8)] uint8, where there is a gradient
    dx_ptr,  # [M, C] like dy, fully overwritten
    level_rows,  # all rows are one level
    banks,
    share_rows,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    share = tl.program_id(1)
    _, _, first, rows, place, shares = find_share(share, level_rows, banks, share_rows, L)
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    offsets = lanes * C + cols
    for tile in tl.range(place, tl.cdiv(rows, BLOCK_M), shares, num_stages=3):
        row = tile * BLOCK_M
        rows_inside = row + lanes < rows
        mask = rows_inside & (cols < C)
        ptrs = (first + row) * C + offsets
        dy = tl.load(dy_ptr + ptrs, mask=mask)
        mask_ptrs, bytes_inside = mask_tile(mask_ptr, first + row, lanes, C, BLOCK_C)
        packed = tl.load(mask_ptrs, mask=rows_inside & bytes_inside, other=0).to(tl.int32)
        bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        dx = tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_C)) != 0, dy, 0.0)
        tl.store(dx_ptr + ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def backward(dy: Tensor, mask: Tensor, dx: Tensor) -> None:
    """Fills `dx`. One launch."""
    num_rows, num_channels = dy.shape
    shares = share_out(Levels((num_rows,), (0,)), num_channels, PROGRAMS)
    with on_device_of(dy):
        _lq_activation_bwd_kernel[shares.grid](
            dy, mask, dx, *shares.levels, **shares.sizes, **shares.tile, **OPTIONS
        )
