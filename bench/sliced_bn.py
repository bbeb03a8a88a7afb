"""A rival of csrc's one-pass batch norm, in Triton: the same launches over one slice at a time.

A slice is some levels and a multiple of 64 channels that fit in the L2 cache, so that the second
pass finds there what the first one has read. The kernels are those of `rsfast.kernels` as they are:
a slice of channels is a pointer further along the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from rsfast import kernels
from rsfast.kernels import _bn_backward as backward
from rsfast.kernels import _bn_forward as forward
from rsfast.kernels._bn_tiles import FINALIZE_OPTIONS, Chunks, finalize_tile, share_out
from rsfast.kernels._launch import OPTIONS

__all__ = ["L2_BYTES", "Slice", "in_slices", "slices", "switchable_bn_act_in_slices"]

L2_BYTES = 30 * 2**20  # of the 50 MB of an H200, which are two halves, for what is to stay there
_WIDTH = 64  # channels: 128 bytes, a cache line


class Slice(NamedTuple):
    """Levels and channels [first, end) that are worked on together."""

    levels: tuple[int, int]
    channels: tuple[int, int]


def slices(level_rows: Sequence[int], num_channels: int, row_bytes: int, room: int) -> list[Slice]:
    """Slices of at most `room` bytes; levels of which not even 64 channels fit stay whole.

    Args:
        level_rows: rows of each level.
        num_channels: C, a multiple of 64 or all in one.
        row_bytes: of one channel of a row, in all tensors that are to stay in the cache.
        room: in bytes.
    """
    found: list[Slice] = []
    first = 0
    while first < len(level_rows):
        end, rows = first + 1, level_rows[first]
        while end < len(level_rows) and (rows + level_rows[end]) * num_channels * row_bytes <= room:
            rows += level_rows[end]
            end += 1
        width = room // (rows * row_bytes) // _WIDTH * _WIDTH
        if width == 0 or num_channels % _WIDTH:
            width = num_channels
        for channel in range(0, num_channels, width):
            found.append(Slice((first, end), (channel, min(channel + width, num_channels))))
        first = end
    return found


class _Part:
    """The arguments of the launches for one slice."""

    def __init__(self, part: Slice, level_rows: Sequence[int], num_channels: int) -> None:
        first, end = part.levels
        self.first_channel, end_channel = part.channels
        self.num_channels = num_channels
        self.is_first = self.first_channel == 0
        self.levels = slice(first, end)
        self.first_row = sum(level_rows[:first])
        width = end_channel - self.first_channel
        banks = tuple(range(end - first))  # of the part's own sets
        chunks = share_out(level_rows[self.levels], banks, width)
        if width < num_channels and width % chunks.tile["BLOCK_C"]:  # it would leave the slice
            chunks = share_out(level_rows[self.levels], banks, _WIDTH)
            chunks = chunks._replace(grid=(width // _WIDTH, chunks.count))
        # Rows are as long as ever; the grid is that of the slice.
        self.chunks: Chunks = chunks._replace(sizes={**chunks.sizes, "C": num_channels})
        self.final = finalize_tile(width)
        self.final_grid = triton.cdiv(width, self.final["BLOCK_C"]), end - first

    def rows(self, tensor: Tensor | None, per_byte: int = 1) -> Tensor | None:
        """From the first number of the slice on, of [M, C]."""
        if tensor is None:
            return None
        return tensor[self.first_row :, self.first_channel // per_byte :]

    def sets(self, tensor: Tensor) -> Tensor:
        """Likewise of [L, C], where every level has a set of its own."""
        return tensor[self.levels, self.first_channel :]

    def partial(self, like: Tensor) -> Tensor:
        shape = 2, self.chunks.count, self.num_channels
        return like.new_empty(shape, dtype=torch.float32)


class _InSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
        weight, bias, running_mean, running_var, num_batches, *settings = arguments
        level_rows, activation, momentum, eps, room = settings
        num_channels = x.shape[1]
        y = torch.empty_like(x)
        shape = x.shape[0], triton.cdiv(num_channels, 8)
        has_mask = residual is not None and activation is not None
        mask = x.new_empty(shape, dtype=torch.uint8) if has_mask else None
        mean = x.new_empty(len(level_rows), num_channels, dtype=torch.float32)
        var = torch.empty_like(mean)
        uncounted = torch.zeros_like(num_batches)
        for one in slices(level_rows, num_channels, x.element_size(), room):
            part = _Part(one, level_rows, num_channels)
            chunks, partial = part.chunks, part.partial(x)
            constants = {**chunks.sizes, **chunks.tile, **OPTIONS}
            forward._bn_statistics_kernel[chunks.grid](
                part.rows(x), partial[..., part.first_channel :], *chunks.levels, **constants
            )
            counted = num_batches if part.is_first else uncounted
            forward._bn_finalize_kernel[part.final_grid](
                part.rows(x),
                partial[..., part.first_channel :],
                *(part.sets(t) for t in (mean, var, running_mean, running_var)),
                counted[part.levels],
                partial.stride(0),
                *chunks.levels,
                momentum,
                **chunks.sizes,
                **part.final,
                **FINALIZE_OPTIONS,
            )
            forward._bn_apply_kernel[chunks.grid](
                part.rows(x),
                part.rows(residual),
                *(part.sets(t) for t in (mean, var, weight, bias)),
                part.rows(y),
                part.rows(mask, 8),
                *chunks.levels,
                eps,
                BATCH_STATISTICS=True,
                ACTIVATION=activation,
                HAS_RESIDUAL=residual is not None,
                WRITE_MASK=has_mask,
                **constants,
            )
        ctx.settings = level_rows, activation, eps, room
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, mask, weight, bias, mean, var)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()
        x, mask, weight, bias, mean, var = ctx.saved_tensors
        level_rows, activation, eps, room = ctx.settings
        dx = torch.empty_like(x)
        dresidual = None if mask is None else torch.empty_like(x)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        for one in slices(level_rows, x.shape[1], 2 * x.element_size(), room):
            part = _Part(one, level_rows, x.shape[1])
            chunks, partial = part.chunks, part.partial(x)
            of_rows = part.rows(dy), part.rows(x), part.rows(mask, 8)
            of_sets = [part.sets(t) for t in (mean, var, weight, bias)]
            own = partial[..., part.first_channel :]
            options = {"BATCH_STATISTICS": True, "ACTIVATION": activation}
            options |= {"HAS_MASK": mask is not None, **chunks.tile, **OPTIONS}
            backward._bn_bwd_reduce_kernel[chunks.grid](
                *of_rows, *of_sets, own, *chunks.levels, eps, **chunks.sizes, **options
            )
            of_part = partial.new_empty(2, chunks.sizes["L"], x.shape[1])
            of_part = of_part[..., part.first_channel :]
            backward._bn_bwd_finalize_kernel[part.final_grid](
                own,
                part.sets(var),
                of_part,
                part.sets(dweight),
                part.sets(dbias),
                partial.stride(0),
                *chunks.levels,
                eps,
                **chunks.sizes,
                BATCH_STATISTICS=True,
                **part.final,
                **FINALIZE_OPTIONS,
            )
            backward._bn_bwd_apply_kernel[chunks.grid](
                *of_rows,
                *of_sets,
                of_part,
                part.rows(dx),
                part.rows(dresidual),
                *chunks.levels,
                eps,
                **chunks.sizes,
                **options,
            )
        if ctx.has_residual and dresidual is None:
            dresidual = dy
        return dx, dresidual, dweight, dbias, *(None,) * 8


def switchable_bn_act_in_slices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    room: int = L2_BYTES,
    **_: Any,
) -> Tensor:
    """As `rsfast.kernels.switchable_bn_act` in training, with a set of its own for each level."""
    if not training or tuple(banks) != tuple(range(len(weight))):
        raise ValueError(f"slices are for training with one set per level, got sets {banks}")
    norm = weight, bias, running_mean, running_var, num_batches_tracked
    settings = tuple(level_rows), activation, momentum, eps, room
    return _InSlices.apply(x, residual, *norm, *settings)


def in_slices(step: Callable[[], Any], room: int = L2_BYTES) -> Callable[[], Any]:
    """A training step whose layers train so."""
    function = functools.partial(switchable_bn_act_in_slices, room=room)

    def sliced() -> Any:
        with mock.patch.object(kernels, "switchable_bn_act", function):
            return step()

    return sliced
