"""Convolution of every level with one weight, from packed rows into packed rows.

    y[l] = conv2d(x[l], weight)                      any kernel, stride, zero padding, dilation
    dx[l] = gradient of x[l]      dweight = sum over l of the gradients of the weight

Layout: x is [M, C_in] contiguous, the NHWC pixels of all levels one after another; y likewise. The
arithmetic is the vendor library's. Forward on a GPU, cuDNN reads and writes the rows of a level in
place: nothing is packed. Backward, so it does where the stride is 1, because dx[l] is then a
convolution of dy[l], with the weight turned around. Of other strides the library allocates dx[l]
itself, and one copy per level brings it to its rows (16 bits: 4 bytes per element of x, against 4
that the gradient itself reads and writes). The gradients of the weight are added up in float32 and
rounded once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels.common.levels import images_of_levels, rows_of_levels
from rsfast.kernels.common.windows import Geometry, IntOrPair, conv2d_sizes, geometry_of

__all__ = ["conv2d"]

# Entered around the forward and the backward of each level, with its name; for profilers.
level_range: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@torch.library.custom_op("rsfast::conv2d_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    weight: Tensor,
    *,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    sizes, geometry = list(zip(heights, widths, strict=True)), Geometry(stride, padding, dilation)
    y = _empty_output(x, weight, sizes, num_images, geometry)
    out_sizes = conv2d_sizes(sizes, weight.shape, *geometry)
    inputs = images_of_levels(x, sizes, num_images)
    outputs = images_of_levels(y, out_sizes, num_images)
    convolve = _into_place if _has_out(x) else _and_copy
    for level, output in zip(inputs, outputs, strict=True):
        with level_range(f"level {level.shape[2]}x{level.shape[3]}"):
            convolve(level, weight, geometry, groups, output)
    return y


def _has_out(x: Tensor) -> bool:
    """Whether the library writes where it is told to: cuDNN, which has no float64 in NHWC."""
    return x.is_cuda and torch.backends.cudnn.enabled and x.dtype != torch.float64


def _into_place(x: Tensor, weight: Tensor, geometry: Geometry, groups: int, out: Tensor) -> None:
    cudnn = torch.backends.cudnn
    torch.ops.aten.cudnn_convolution.out(
        x,
        weight,
        geometry.padding,
        geometry.stride,
        geometry.dilation,
        groups,
        cudnn.benchmark,
        cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
        cudnn.allow_tf32,
        out=out,
    )


def _and_copy(x: Tensor, weight: Tensor, geometry: Geometry, groups: int, out: Tensor) -> None:
    out.copy_(F.conv2d(x, weight, None, *geometry, groups))


@_fwd.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    *,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    sizes = list(zip(heights, widths, strict=True))
    return _empty_output(x, weight, sizes, num_images, Geometry(stride, padding, dilation))


def _empty_output(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    geometry: Geometry,
) -> Tensor:
    out_sizes = conv2d_sizes(sizes, weight.shape, *geometry)
    return x.new_empty(sum(rows_of_levels(out_sizes, num_images)), weight.shape[0])


@torch.library.custom_op("rsfast::conv2d_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wants_dx: bool,
    wants_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dweight; empty where not wanted."""
    dx = x.new_empty(x.shape if wants_dx else 0)
    dweight = weight.new_empty(0)
    sizes = list(zip(heights, widths, strict=True))
    geometry = Geometry(stride, padding, dilation)
    out_sizes = conv2d_sizes(sizes, weight.shape, *geometry)
    inputs = images_of_levels(x, sizes, num_images)
    turned = turned_weight(weight, geometry, groups) if wants_dx and _has_out(x) else None
    copies_dx = wants_dx and turned is None
    # Contiguous: a sum's gradient has strides of 0.
    outputs = images_of_levels(dy.contiguous(), out_sizes, num_images)
    targets = images_of_levels(dx, sizes, num_images) if wants_dx else inputs
    sums = torch.promote_types(weight.dtype, torch.float32)
    total = None
    for level, target, output in zip(inputs, targets, outputs, strict=True):
        with level_range(f"level {level.shape[2]}x{level.shape[3]}"):
            if turned is not None:
                _into_place(output, *turned, groups, target)
            level_dx, level_dweight = library_gradients(
                output, level, weight, geometry, groups, (copies_dx, wants_dweight)
            )
            if copies_dx:
                target.copy_(level_dx)
            if wants_dweight:
                total = level_dweight.to(sums) if total is None else total.add_(level_dweight)
    if total is not None:
        # A copy of the strides too: gradients are to lie in memory as their weights do.
        dweight = torch.empty_like(weight).copy_(total)
    return dx, dweight


def library_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    groups: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """dx and dweight of one level, as PyTorch allocates them; None where not wanted."""
    whole = False, [0, 0], groups  # not a transposed convolution
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, *geometry, *whole, [*wanted, False]
    )
    return dx, dweight


def turned_weight(
    weight: Tensor, geometry: Geometry, groups: int
) -> tuple[Tensor, Geometry] | None:
    """The weight and geometry whose convolution of dy is dx; None if there is none."""
    stride, padding, dilation = geometry
    kernel = weight.shape[2:]
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    if tuple(stride) != (1, 1) or min(reach) < 0:
        return None
    of_groups = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    turned = of_groups.flip(2, 3).contiguous(memory_format=torch.channels_last)
    return turned, Geometry(stride, reach, dilation)


@_bwd.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, *, wants_dx: bool, wants_dweight: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if wants_dx else 0)
    return dx, torch.empty_like(weight) if wants_dweight else weight.new_empty(0)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.settings = keyword_only_inputs
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wants_dx, wants_dweight = ctx.needs_input_grad
    wanted = {"wants_dx": wants_dx, "wants_dweight": wants_dweight}
    dx, dweight = _bwd(dy, *ctx.saved_tensors, **ctx.settings, **wanted)
    return dx if wants_dx else None, dweight if wants_dweight else None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def conv2d(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves every level; sizes behind it are those of :func:`conv2d_sizes`.

    Args:
        x: [M, C_in] contiguous rows of all levels, floating point.
        weight: [C_out, C_in / groups, k_h, k_w] in the dtype of `x`; channels-last in memory
            spares a copy.
        sizes: (H, W) of each level.
        num_images: N.
        stride: an int or a pair, as in `F.conv2d`.
        padding: zeros at either end, likewise.
        dilation: likewise.
        groups: as in `F.conv2d`.

    Returns:
        [M', C_out] rows of all levels.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous [M, C], got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be {x.dtype} on {x.device} like x, got {weight.dtype} on {weight.device}"
        )
    if weight.dim() != 4:
        raise ValueError(
            f"weight must be [C_out, C_in / groups, k_h, k_w], got {tuple(weight.shape)}"
        )
    if groups < 1 or weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"weight must fit {x.shape[1]} channels in {groups} groups, got {tuple(weight.shape)}"
        )
    if x.shape[0] != sum(rows_of_levels(sizes, num_images)):
        raise ValueError(
            f"sizes must add up to the {x.shape[0]} rows of x for {num_images} images, "
            f"got {tuple(sizes)}"
        )
    geometry = geometry_of(stride, padding, dilation)
    conv2d_sizes(sizes, weight.shape, *geometry)  # refuses levels that would vanish
    return _fwd(
        x,
        weight,
        heights=[height for height, _ in sizes],
        widths=[width for _, width in sizes],
        num_images=num_images,
        **geometry._asdict(),
        groups=groups,
    )
