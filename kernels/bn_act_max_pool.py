"""Training batch norm with known moments, activation and 3x3 max pooling of stride 2, in one pass.

For the pixels x of level l with set b = banks[l], as in :mod:`rsfast.kernels.deferred_bn`:

    z = act((x - mean[l]) / sqrt(var[l] + eps) * weight[b] + bias[b])     rounded to the type of x
    y = the largest z of each window of 3 x 3 pixels, 2 apart, that begins one pixel outside

Backward, a pixel gets dz from the windows (at most four) that it is the largest of, the first of
equals, and the rest is that of batch norm: mean and var are taken for functions of x. Backend
"triton" compares x (or -x, where weight is negative), so pixels that rounding makes equal in z are
told apart, as in exact arithmetic.

Layout: x is [M, C] contiguous, the NHWC pixels of all levels one after another; y is [M', C] with
levels of ceil(H / 2) x ceil(W / 2) pixels. z is never stored: an index of one byte per element of y
says which pixel was the largest. Bytes per element of x in 16 bits, backend "triton": 2.75 forward
(1 read, a quarter of a write, a quarter of an index), where batch norm, activation and pooling that
store z, and indices of 8 bytes, take 8.5; 7.5 backward (2 reads of x, y's gradient and index each,
1 write). Gradients are gathered, not added into memory: the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels._bn_checks import check_batch_norm, check_batch_norm_for_triton
from rsfast.kernels._checks import check_backend, load_kernels, rows_of_levels
from rsfast.kernels.deferred_bn import apply_bn_act, check_moments
from rsfast.kernels.switchable_bn_act import ACTIVATIONS

__all__ = ["bn_act_max_pool", "bn_act_max_pool_reference"]


def bn_act_max_pool_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    banks: Sequence[int],
    *,
    activation: str | None = "relu",
    eps: float = 1e-5,
) -> Tensor:
    """Plain PyTorch; arguments as in :func:`bn_act_max_pool`."""
    level_rows = [num_images * height * width for height, width in sizes]
    z = apply_bn_act(x, weight, bias, mean, var, level_rows, banks, activation=activation, eps=eps)
    pooled = []
    for rows, (height, width) in zip(z.split(level_rows), sizes, strict=True):
        images = rows.view(num_images, height, width, -1).permute(0, 3, 1, 2)
        images = F.max_pool2d(images, 3, 2, 1)
        pooled.append(images.permute(0, 2, 3, 1).reshape(-1, x.shape[1]))
    return torch.cat(pooled)


@torch.library.custom_op("rsfast::bn_act_max_pool_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    banks: Sequence[int],
    activation: str | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y, and the place 0 to 8 of the largest pixel in its window, [M', C] uint8."""
    y, largest = _empty_outputs(x, heights, widths, num_images)
    affine = mean, var, weight, bias
    load_kernels("_bn_act_max_pool_triton").forward(
        x, affine, y, largest, (heights, widths, num_images, banks), activation, eps
    )
    return y, largest


@_fwd.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(x, heights, widths, num_images)


def _empty_outputs(
    x: Tensor, heights: Sequence[int], widths: Sequence[int], num_images: int
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(sum(rows_of_levels(heights, widths, num_images, 2)), x.shape[1])
    return y, torch.empty_like(y, dtype=torch.uint8)


@torch.library.custom_op("rsfast::bn_act_max_pool_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    largest: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    banks: Sequence[int],
    activation: str | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias."""
    affine = mean, var, weight, bias
    return load_kernels("_bn_act_max_pool_triton").backward(
        dy.contiguous(), largest, x, affine, (heights, widths, num_images, banks), activation, eps
    )


@_bwd.register_fake
def _(
    dy: Tensor, largest: Tensor, x: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, mean, var, *ctx.settings = inputs
    ctx.set_materialize_grads(False)  # none of zeros for the index
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, weight, bias, mean, var)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    return *_bwd(dy, *ctx.saved_tensors, *ctx.settings), *(None,) * 8


_fwd.register_autograd(_backward, setup_context=_setup_context)


def bn_act_max_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    banks: Sequence[int],
    *,
    activation: str | None = "relu",
    eps: float = 1e-5,
    backend: str = "torch",
) -> Tensor:
    """Normalises, activates and pools every level.

    Args:
        x: [M, C] contiguous rows of all levels, as in :func:`switchable_bn_act`.
        weight: [B, C] gamma of each set.
        bias: [B, C] beta.
        mean: [L, C] of x, by level; gradients take it for a function of x.
        var: [L, C] of x, biased, likewise.
        sizes: (H, W) of each of the L levels.
        num_images: N.
        banks: the set of each level.
        activation: None, "relu" or "relu6".
        eps: added to the variance.
        backend: "torch" for the reference, "triton" for the fused kernels.

    Returns:
        [M', C] in the dtype of `x`, levels of ceil(H / 2) x ceil(W / 2) pixels.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    norm = {"weight": weight, "bias": bias}
    level_rows = [num_images * height * width for height, width in sizes]
    check_batch_norm(x, norm, level_rows, banks, None)
    check_moments(mean, var, x, len(sizes), backend)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    if check_backend(backend) == "torch":
        return bn_act_max_pool_reference(
            x, weight, bias, mean, var, sizes, num_images, banks, activation=activation, eps=eps
        )
    check_batch_norm_for_triton(x, norm, level_rows, None)
    heights, widths = [size[0] for size in sizes], [size[1] for size in sizes]
    affine = weight, bias, mean.detach(), var.detach()
    y, _ = _fwd(x, *affine, heights, widths, num_images, banks, activation, eps)
    return y
