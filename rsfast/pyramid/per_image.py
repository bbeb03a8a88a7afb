"""A value per image and channel against a pyramid: squeeze-and-excitation, stochastic depth.

    y[row] = f(x[row], s[image of the row])

Level by level, from and into views of the packed rows: nothing is repeated for every pixel, and
nothing is copied together afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rsfast.pyramid.content import Content
from rsfast.pyramid.pyramid import Pyramid

__all__ = ["combine_per_image"]


def combine_per_image(f: Callable[..., Tensor], x: Pyramid, values: Tensor) -> Pyramid:
    """An element-wise function of pixels and of values of their images.

    Args:
        f: of two tensors, as `torch.mul`.
        x: any pyramid.
        values: [L * N, C] or [L * N, 1], level by level.
    """
    shares = values.split(x.num_images)
    if f is torch.mul and x.is_packed and values.shape[1:] == x.channel_shape:
        return x.with_rows(_Scaled.apply(x.rows, values, x.level_rows, x.num_images))
    parts = []
    for part, share in zip(x.parts, shares, strict=True):
        images = part.view(x.num_images, -1, *part.shape[1:])
        made = f(images, share.unsqueeze(1))
        parts.append(made.reshape(len(part), *made.shape[2:]))
    return x.like(Content(rows=torch.cat(parts)) if x.is_packed else Content(parts=parts))


class _Scaled(torch.autograd.Function):
    """x * s; every level is written where it belongs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, level_rows: tuple[int, ...], num_images: int
    ) -> Tensor:
        ctx.save_for_backward(x, s)
        ctx.geometry = level_rows, num_images
        return _scale(x, s, level_rows, num_images, torch.result_type(x, s))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s = ctx.saved_tensors
        dy = grads[0].contiguous()  # a sum's has strides of 0
        level_rows, num_images = ctx.geometry
        dx = ds = None
        if ctx.needs_input_grad[0]:
            dx = _scale(dy, s, level_rows, num_images, x.dtype)
        if ctx.needs_input_grad[1]:
            pairs = zip(dy.split(level_rows), x.split(level_rows), strict=True)
            shape = num_images, -1, *x.shape[1:]
            ds = torch.cat([(d.view(shape) * p.view(shape)).sum(1) for d, p in pairs]).to(s.dtype)
        return dx, ds, None, None


def _scale(
    x: Tensor, s: Tensor, level_rows: tuple[int, ...], num_images: int, dtype: torch.dtype
) -> Tensor:
    y = torch.empty_like(x, dtype=dtype)
    shape = num_images, -1, *x.shape[1:]
    levels = zip(y.split(level_rows), x.split(level_rows), s.split(num_images), strict=True)
    for out, part, share in levels:
        torch.mul(part.view(shape), share.unsqueeze(1), out=out.view(shape))
    return y
