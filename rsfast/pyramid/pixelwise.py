"""1x1 convolutions of packed rows, whose gradients meet those of other readers in place.

The rows at the input of a residual block have two readers: its first convolution and its shortcut.
Autograd keeps a gradient from either and adds them in a pass of its own, which reads two tensors
and writes one. A matrix product can add to what is there for one read more, and the pixels that a
strided shortcut reads are few. So both hand the rows on to the next reader, and their backward
waits for that reader's gradient:

    y = x W^T              x' = x    dx = dx' + dy W, dW = dy^T x
    y = some pixels of x   x' = x    dx = dx', and dy added to those pixels

The sum is written over dx'. That is right only if nobody else holds dx', so x' stays inside the
pyramid: `Pyramid.handed_on` gives it to readers whose backward returns a tensor of its own.
Everybody else reads `Pyramid.rows`, whose gradients autograd adds as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rsfast import kernels
from rsfast.pyramid.content import Content
from rsfast.pyramid.pyramid import Pyramid

__all__ = ["autocast_dtype", "multiply", "subsample"]


def autocast_dtype(x: Pyramid) -> torch.dtype:
    """What autocast would compute a convolution of `x` in."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype


def multiply(x: Pyramid, weight: Tensor, bias: Tensor | None) -> Pyramid:
    """The packed rows of `x` times a weight [C', C], plus a bias [C']."""
    if bias is not None or not _gradients_may_meet(x) or x.dtype != autocast_dtype(x):
        return x.with_rows(F.linear(x.rows, weight, bias))
    y, x.content.handed_on = _Product.apply(x.handed_on, weight.to(x.dtype))
    return x.with_rows(y)


def subsample(x: Pyramid, stride: tuple[int, int]) -> Pyramid:
    """The first pixel of each stride, down and to the right."""
    sizes = kernels.conv2d_sizes(x.sizes, 1, stride)
    if not x.is_packed:
        parts = [
            kernels.subsample(part, [size], x.num_images, stride)
            for part, size in zip(x.parts, x.sizes, strict=True)
        ]
        return x.like(Content(parts=parts), sizes)
    maps = x.sizes, x.num_images, stride
    if not _gradients_may_meet(x):
        rows = kernels.subsample(x.rows, *maps, backend=x.backend)
    else:
        rows, x.content.handed_on = _Subsample.apply(x.handed_on, maps, x.backend)
    return x.like(Content(rows=rows), sizes)


def _gradients_may_meet(x: Pyramid) -> bool:
    """Whether the packed rows may get gradients of fused kernels too.

    Rows that autograd did not make are excluded: the same ones may be read in many steps, and each
    would add to the chain of readers.
    """
    return x.backend != "torch" and torch.is_grad_enabled() and x.rows.grad_fn is not None


class _Product(torch.autograd.Function):
    """The product, and its rows for the next reader, to whose gradient its own is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x, weight), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        dy, dx = grads
        if dy is None:
            return dx, None
        x, weight = ctx.saved_tensors
        dx = dy.mm(weight) if dx is None else dx.addmm_(dy, weight)
        return dx, None if x is None else dy.t().mm(x)


class _Subsample(torch.autograd.Function):
    """Some pixels, and all rows for the next reader, to whose gradient theirs is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, maps: Sequence[Any], backend: str) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.maps, ctx.backend = maps, backend
        return kernels.subsample(x, *maps, backend=backend), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        dy, dx = grads
        if dy is not None:
            dy = dy.contiguous()  # a sum's gradient has strides of 0
            dx = kernels.subsample_gradient(dy, *ctx.maps, add_to=dx, backend=ctx.backend)
        return dx, None, None
