"""1x1 convolution over packed rows that takes in a pending batch norm and starts the next one.

Forward, for the rows of level l (a 1x1 convolution of all levels is one matrix product):

    z = act((x - center[l]) * scale[l] + shift[l])        or z = x where nothing is pending
    y = z weight^T
    mean[l], var[l] = mean and biased variance of the level's rows of y, by channel

A batch norm between two such convolutions then costs no pass over the pixels: with mean and var of
the first one's output, center = mean, scale = gamma / sqrt(var + eps), shift = beta are pending on
the second one's input, and autograd connects them through tensors of [L, C]. Backward, with m rows
in a level, e = dy + dmean / m + 2 dvar (y - mean) / m, and du the gradient before the activation:

    du = (e weight) * act'    dx = du scale    dweight = e^T z
    dshift = sum du    dscale = sum du (x - center)    dcenter = -scale sum du

Layout: x is [M, C_in] contiguous, rows of all levels one after another. Sums are in float32.
Statistics are those of y as stored, each tile's about its own mean. Bytes with backend "triton":
one read of x and one write of y forward; backward reads dy twice, x twice and, for gradients of the
statistics, y twice, and writes dx once. Three launches more than plain matrix products, of [L, C].

Networks use it when their batch norm is folded (`RSNet.fold_batch_norm`), which they are not unless
asked: whether it beats cuBLAS with batch norm in passes of its own has to be timed on a GPU first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels._checks import (
    check_backend,
    check_companion,
    check_kernel_dtype,
    check_levels,
    load_kernels,
)
from rsfast.kernels.switchable_bn_act import ACTIVATIONS

__all__ = ["Conv1x1Output", "conv1x1", "conv1x1_reference"]


class Conv1x1Output(NamedTuple):
    """What :func:`conv1x1` returns.

    Attributes:
        y: [M, C_out] in the dtype of x.
        mean: [L, C_out] of each level's rows of y, at least float32; no rows if not asked for.
        var: like mean, biased.
    """

    y: Tensor
    mean: Tensor
    var: Tensor


def conv1x1_reference(
    x: Tensor,
    weight: Tensor,
    level_rows: Sequence[int],
    *,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    statistics: bool = True,
) -> Conv1x1Output:
    """Plain PyTorch; arguments as in :func:`conv1x1`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if center is not None and scale is not None and shift is not None:
        levels = zip(x.to(wide).split(list(level_rows)), center, scale, shift, strict=True)
        z = torch.cat([(rows - c) * s + b for rows, c, s, b in levels])
        x = ACTIVATIONS[activation](z).to(x.dtype)
    y = F.linear(x, weight)
    if not statistics:
        return Conv1x1Output(y, *y.new_empty(2, 0, y.shape[1], dtype=wide).unbind())
    levels = y.to(wide).split(list(level_rows))
    moments = [torch.var_mean(rows, dim=0, correction=0) for rows in levels]
    var, mean = (torch.stack(part) for part in zip(*moments, strict=True))
    return Conv1x1Output(y, mean, var)


@torch.library.custom_op("rsfast::conv1x1_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    weight: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    level_rows: Sequence[int],
    activation: str | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var; without `statistics` the last two have no rows."""
    kernels = load_kernels("_conv1x1_forward")
    affine = _affine(center, scale, shift)
    return kernels.forward(x, weight, affine, level_rows, activation, statistics)


@_fwd.register_fake
def _(
    x: Tensor, weight: Tensor, center: Any, scale: Any, shift: Any, level_rows: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = len(level_rows) if rest[-1] else 0, weight.shape[0]
    mean = x.new_empty(shape, dtype=torch.float32)
    return x.new_empty(x.shape[0], weight.shape[0]), mean, torch.empty_like(mean)


@torch.library.custom_op("rsfast::conv1x1_bwd", mutates_args=())
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
    level_rows: Sequence[int],
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dcenter, dscale and dshift (no rows where nothing is pending)."""
    kernels = load_kernels("_conv1x1_backward")
    affine = _affine(center, scale, shift)
    statistics = None
    if y is not None and mean is not None and (dmean is not None or dvar is not None):
        grads = (torch.zeros_like(mean) if g is None else g.contiguous() for g in (dmean, dvar))
        statistics = kernels.StatisticsGrad(y, mean, *grads)
    dy = dy.contiguous()  # a sum's has strides of 0
    rest = weight, x, affine, statistics, level_rows, activation
    dx, dshift, dscale = kernels.dgrad(dy, *rest)
    dweight = kernels.wgrad(dy, *rest)
    if affine is None:
        none = x.new_empty(0, x.shape[1], dtype=torch.float32)
        return dx, dweight, none, none.clone(), none.clone()
    return dx, dweight, -affine.scale * dshift, dscale, dshift


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
    return load_kernels("_conv1x1_tiles").Affine(center, scale, shift)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, center, scale, shift, *ctx.settings, statistics = inputs
    ctx.set_materialize_grads(False)
    saved = (output[0], output[1]) if statistics else (None, None)
    ctx.save_for_backward(x, weight, *saved, center, scale, shift)


def _backward(
    ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, *rest = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(x.shape[0], weight.shape[0])
    dx, dweight, *pending = _bwd(dy, dmean, dvar, x, weight, *rest, *ctx.settings)
    if rest[2] is None:
        pending = [None, None, None]
    return dx, dweight, *pending, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def conv1x1(
    x: Tensor,
    weight: Tensor,
    level_rows: Sequence[int],
    *,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    statistics: bool = True,
    backend: str = "torch",
) -> Conv1x1Output:
    """1x1 convolution of all levels, with what is pending on its input and moments of its output.

    Args:
        x: [M, C_in] contiguous rows of all levels, floating point. For "triton" float16, bfloat16
            or float32, at most 8 levels of at least one row, the weight contiguous and like x, and
            what is pending contiguous float32.
        weight: [C_out, C_in].
        level_rows: rows of each of the L levels; their sum is M.
        center: [L, C_in], subtracted from x; with scale and shift, or none of them.
        scale: [L, C_in].
        shift: [L, C_in].
        activation: None, "relu" or "relu6", of what is pending.
        statistics: compute mean and variance of the output.
        backend: "torch" for the reference, "triton" for the fused kernels.

    Returns:
        y, mean and var, all differentiable.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    pending = {"center": center, "scale": scale, "shift": shift}
    _check(x, weight, level_rows, pending, activation)
    if check_backend(backend) == "torch":
        options = {"activation": activation, "statistics": statistics}
        return conv1x1_reference(x, weight, level_rows, **pending, **options)  # type: ignore[arg-type]
    check_kernel_dtype("x", x)
    check_levels(level_rows)
    check_companion("weight", weight, x.dtype, x.device)
    for name, tensor in pending.items():
        if tensor is not None:
            check_companion(name, tensor, torch.float32, x.device)
    return Conv1x1Output(*_fwd(x, weight, center, scale, shift, level_rows, activation, statistics))


def _check(
    x: Tensor,
    weight: Tensor,
    level_rows: Sequence[int],
    pending: dict[str, Tensor | None],
    activation: str | None,
) -> None:
    if x.dim() != 2 or not x.is_contiguous() or not x.is_floating_point():
        raise ValueError(
            f"x must be contiguous floating point [M, C_in], got {x.dtype} of shape "
            f"{tuple(x.shape)}, strides {x.stride()}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be [C_out, {x.shape[1]}] like the columns of x, "
            f"got shape {tuple(weight.shape)}"
        )
    if sum(level_rows) != x.shape[0]:
        raise ValueError(
            f"level_rows must add up to the {x.shape[0]} rows of x, got {tuple(level_rows)}"
        )
    missing = [name for name, tensor in pending.items() if tensor is None]
    if missing and len(missing) < len(pending):
        raise ValueError(f"{missing[0]} must come with center, scale and shift, got None")
    shape = len(level_rows), x.shape[1]
    for name, tensor in pending.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(tensor.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    if missing and activation is not None:
        raise ValueError(
            f"activation must be None where nothing is pending on x, got {activation!r}"
        )
