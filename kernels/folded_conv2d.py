"""Convolution over packed rows that takes in a pending batch norm and starts the next one.

Forward, for the pixels of level l, with taps t of a k x k kernel and stride s:

    z = act((x - center[l]) * scale[l] + shift[l])        or z = x where nothing is pending
    y[p] = sum over t of weight[t] z[s p + t - k // 2]    z is 0 outside the image
    mean[l], var[l] = mean and biased variance of the level's rows of y, by channel

This is one implicit matrix product over the pixels of all levels. A batch norm between two such
convolutions costs no pass over the pixels: with mean and var of the first one's output, center =
mean, scale = gamma / sqrt(var + eps), shift = beta are pending on the second one's input, and
autograd connects them through tensors of [L, C]. Backward, with m rows in a level of y, e = dy +
dmean / m + 2 dvar (y - mean) / m, and du the gradient before the activation:

    du[q] = act' * sum over t of e[(q - t + k // 2) / s] weight[t]         dx = du scale
    dweight[t] = sum over p of e[p]^T z[s p + t - k // 2]
    dshift = sum du    dscale = sum du (x - center)    dcenter = -scale sum du

Layout: x is [M, C_in] contiguous, the NHWC pixels of all levels one after another, the weight
channels-last. Sums are in float32, du is rounded to the type of x first. Statistics are those of y
as stored, each tile's about its own mean. Bytes with backend "triton", as far as tiles of
neighbouring channels, and for k = 3 taps, find each other's pixels in the cache: one read of x and
one write of y forward; backward two reads of dy and x and one write of dx and, for gradients of the
statistics, a pass of its own that reads dy and y and writes e. Tiles of y and dx are read again by
the program that wrote them, for their sums: out of the cache, it is assumed. Beside the products
partial results are merged, by one or two launches each way. With nothing pending the backward is
that of cuBLAS or cuDNN.

Networks use it when their batch norm is folded (`RSNet.fold_batch_norm`), which it is not unless
asked: whether that beats cuBLAS and cuDNN with batch norm in passes of its own has to be timed on a
GPU first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsfast.kernels._checks import (
    check_backend,
    check_companion,
    check_kernel_dtype,
    check_levels,
    check_rows,
    load_kernels,
    rows_of_levels,
)
from rsfast.kernels.conv2d import conv2d_reference
from rsfast.kernels.switchable_bn_act import ACTIVATIONS

__all__ = ["FoldedConvOutput", "folded_conv2d", "folded_conv2d_reference"]


class FoldedConvOutput(NamedTuple):
    """What :func:`folded_conv2d` returns.

    Attributes:
        y: [M, C_out] in the dtype of x.
        mean: [L, C_out] of each level's rows of y, at least float32; no rows if not asked for.
        var: like mean, biased.
    """

    y: Tensor
    mean: Tensor
    var: Tensor


def folded_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    *,
    stride: int = 1,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    statistics: bool = True,
) -> FoldedConvOutput:
    """Plain PyTorch; arguments as in :func:`folded_conv2d`."""
    maps = *zip(*sizes, strict=True), num_images  # heights, widths, N
    level_rows = rows_of_levels(*maps)
    wide = torch.promote_types(x.dtype, torch.float32)
    if center is not None and scale is not None and shift is not None:
        levels = zip(x.to(wide).split(level_rows), center, scale, shift, strict=True)
        z = torch.cat([(rows - c) * s + b for rows, c, s, b in levels])
        x = ACTIVATIONS[activation](z).to(x.dtype)
    y = conv2d_reference(x, weight, sizes, num_images, stride)
    if not statistics:
        return FoldedConvOutput(y, *y.new_empty(2, 0, y.shape[1], dtype=wide).unbind())
    levels = y.to(wide).split(rows_of_levels(*maps, stride))
    moments = [torch.var_mean(rows, dim=0, correction=0) for rows in levels]
    var, mean = (torch.stack(part) for part in zip(*moments, strict=True))
    return FoldedConvOutput(y, mean, var)


@torch.library.custom_op("rsfast::folded_conv2d_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    weight: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: int,
    activation: str | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var; without `statistics` the last two have no rows."""
    kernels = load_kernels("_folded_conv2d_forward")
    affine, maps = _affine(center, scale, shift), _maps(heights, widths, num_images, stride)
    return kernels.forward(x, weight, affine, maps, activation, statistics)


@_fwd.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    center: Any,
    scale: Any,
    shift: Any,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: int,
    activation: Any,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = sum(rows_of_levels(heights, widths, num_images, stride))
    num_out = weight.shape[0]
    mean = x.new_empty(len(heights) if statistics else 0, num_out, dtype=torch.float32)
    return x.new_empty(num_rows, num_out), mean, torch.empty_like(mean)


@torch.library.custom_op("rsfast::folded_conv2d_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    mean: Tensor | None,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: int,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dcenter, dscale and dshift (no rows where nothing is pending)."""
    maps = heights, widths, num_images, stride
    dy = dy.contiguous()  # a sum's has strides of 0
    if y is not None and mean is not None and (dmean is not None or dvar is not None):
        grads = (torch.zeros_like(mean) if g is None else g.contiguous() for g in (dmean, dvar))
        moments = load_kernels("_deferred_bn_triton")
        dy = moments.moments_backward(dy, y, mean, *grads, rows_of_levels(*maps))
    affine = _affine(center, scale, shift)
    if affine is None:
        none = x.new_empty(0, x.shape[1], dtype=torch.float32)
        return *_plain_backward(dy, x, weight, maps), none, none.clone(), none.clone()
    kernels = load_kernels("_folded_conv2d_backward")
    rest = weight, x, affine, _maps(*maps), activation
    dx, dshift, dscale = kernels.dgrad(dy, *rest)
    return dx, kernels.wgrad(dy, *rest), -affine.scale * dshift, dscale, dshift


def _plain_backward(
    dy: Tensor, x: Tensor, weight: Tensor, maps: tuple[Sequence[int], Sequence[int], int, int]
) -> tuple[Tensor, Tensor]:
    """dx and dweight of a convolution without anything pending: the vendor library's."""
    stride = maps[-1]
    if weight.shape[-1] * stride > 1:
        return torch.ops.rsfast.conv2d_bwd(dy, x, weight, *maps, 1, True, True)
    dweight = torch.empty_like(weight)  # keeps the memory format
    dweight.copy_((dy.t() @ x)[:, :, None, None])
    return dy @ weight.flatten(1), dweight


@_bwd.register_fake
def _(
    dy: Tensor, dmean: Any, dvar: Any, x: Tensor, weight: Tensor, y: Any, mean: Any, *rest: Any
) -> tuple[Tensor, ...]:
    center = rest[0]
    shape = center.shape if center is not None else (0, x.shape[1])
    pending = [x.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    return torch.empty_like(x), torch.empty_like(weight), *pending


def _affine(center: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Any:
    """What is pending, as the kernels take it."""
    if center is None:
        return None
    return load_kernels("_folded_conv2d_tiles").Affine(center, scale, shift)


def _maps(heights: Sequence[int], widths: Sequence[int], num_images: int, stride: int) -> Any:
    """The levels, as the kernels take them."""
    return load_kernels("_folded_conv2d_tiles").Maps(heights, widths, num_images, stride)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, center, scale, shift, *ctx.settings, statistics = inputs
    ctx.set_materialize_grads(False)
    saved = (output[0], output[1]) if statistics else (None, None)
    ctx.save_for_backward(x, weight, *saved, center, scale, shift)


def _backward(
    ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, y, mean, center, *rest = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(sum(rows_of_levels(*ctx.settings[:4])), weight.shape[0])
    saved = x, weight, y, mean, center, *rest
    dx, dweight, *pending = _bwd(dy, dmean, dvar, *saved, *ctx.settings)
    if center is None:
        pending = [None, None, None]
    return dx, dweight, *pending, *(None for _ in ctx.settings), None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def folded_conv2d(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    *,
    stride: int = 1,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    statistics: bool = True,
    backend: str = "torch",
) -> FoldedConvOutput:
    """Convolution of all levels, with what is pending on its input and moments of its output.

    Args:
        x: [M, C_in] contiguous rows of all levels, floating point. For "triton" float16, bfloat16
            or float32, at most 8 levels of at least one row, the weight channels-last and like x,
            and what is pending contiguous float32.
        weight: [C_out, C_in, k, k], k odd; "same" padding.
        sizes: (H, W) of each of the L levels.
        num_images: N.
        stride: s, the same along both axes.
        center: [L, C_in], subtracted from x; with scale and shift, or none of them.
        scale: [L, C_in].
        shift: [L, C_in].
        activation: None, "relu" or "relu6", of what is pending.
        statistics: compute mean and variance of the output.
        backend: "torch" for the reference, "triton" for the fused kernels.

    Returns:
        y of levels of ceil(H / s) x ceil(W / s) pixels, mean and var, all differentiable.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    pending = {"center": center, "scale": scale, "shift": shift}
    _check(x, weight, sizes, num_images, stride)
    _check_pending(x, pending, len(sizes), activation)
    options = {"activation": activation, "statistics": statistics}
    if check_backend(backend) == "torch":
        given = x, weight, sizes, num_images
        return folded_conv2d_reference(*given, stride=stride, **pending, **options)  # type: ignore[arg-type]
    check_kernel_dtype("x", x)
    maps = [size[0] for size in sizes], [size[1] for size in sizes], num_images
    check_levels(rows_of_levels(*maps))
    check_companion("weight", weight.permute(0, 2, 3, 1), x.dtype, x.device)
    for name, tensor in pending.items():
        if tensor is not None:
            check_companion(name, tensor, torch.float32, x.device)
    given = x, weight, center, scale, shift, *maps, stride
    return FoldedConvOutput(*_fwd(*given, activation, statistics))


def _check(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: int,
) -> None:
    check_rows(x)
    k = weight.shape[-1]
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], k, k) or k % 2 == 0:
        raise ValueError(
            f"weight must be [C_out, {x.shape[1]}, k, k] like the columns of x, k odd, "
            f"got shape {tuple(weight.shape)}"
        )
    if sum(num_images * height * width for height, width in sizes) != x.shape[0]:
        raise ValueError(
            f"sizes must add up to the {x.shape[0]} rows of x for {num_images} images, "
            f"got {tuple(sizes)}"
        )
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")


def _check_pending(
    x: Tensor, pending: dict[str, Tensor | None], num_levels: int, activation: str | None
) -> None:
    missing = [name for name, tensor in pending.items() if tensor is None]
    if missing and len(missing) < len(pending):
        raise ValueError(f"{missing[0]} must come with center, scale and shift, got None")
    shape = num_levels, x.shape[1]
    for name, tensor in pending.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(tensor.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    if missing and activation is not None:
        raise ValueError(
            f"activation must be None where nothing is pending on x, got {activation!r}"
        )
