"""The Triton kernel of :mod:`rsfast.kernels.normalize.op`."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.launch import OPTIONS, on_device_of

__all__ = ["BLOCK_M", "launch"]

BLOCK_M = 512  # pixels; not timed on a GPU yet


@triton.jit
def _normalize_kernel(
    pixels_ptr,  # [M, 3] uint8
    y_ptr,  # [M, C], fully overwritten, channels from 3 on with 0
    num_rows,  # M
    scale,  # 3 numbers each
    shift,
    C: tl.constexpr,
    PADDED_C: tl.constexpr,  # power of two
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, PADDED_C)[None, :]
    inside = rows < num_rows
    x = tl.load(pixels_ptr + rows * 3 + cols, mask=inside & (cols < 3), other=0).to(tl.float32)
    zeros = tl.zeros((1, PADDED_C), tl.float32)
    factor = zeros
    offset = zeros
    for channel in tl.static_range(3):
        factor += tl.where(cols == channel, scale[channel], 0.0)
        offset += tl.where(cols == channel, shift[channel], 0.0)
    y = x * factor + offset
    tl.store(y_ptr + rows * C + cols, y.to(y_ptr.dtype.element_ty), mask=inside & (cols < C))


def launch(pixels: Tensor, y: Tensor, scale: Sequence[float], shift: Sequence[float]) -> None:
    """Fills `y` [M, C] with `scale` * `pixels` + `shift`."""
    num_rows, num_channels = y.shape
    with on_device_of(pixels):
        _normalize_kernel[(triton.cdiv(num_rows, BLOCK_M),)](
            pixels,
            y,
            num_rows,
            tuple(scale),
            tuple(shift),
            C=num_channels,
            PADDED_C=max(triton.next_power_of_2(num_channels), 4),
            BLOCK_M=BLOCK_M,
            **OPTIONS,
        )
