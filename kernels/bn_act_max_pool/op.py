"""Batch norm with private banks per level, activation and 3x3 max pooling of stride 2.

For the pixels x of level l with bank b = banks[l], and mean and var those of
:mod:`rsfast.kernels.switchable_bn_act.op`, which also tracks them:

    z = act((x - mean) / sqrt(var + eps) * weight[b] + bias[b])     rounded to the type of x
    y = the largest z of each window of 3 x 3 pixels, 2 apart, that begins one pixel outside

Backward, a pixel gets dz from the windows (at most four) that it is the largest of, the first of
equals, and the rest is that of batch norm. Backend "triton" compares x (or -x, where weight is
negative), so pixels that rounding makes equal in z are told apart, as in exact arithmetic.

Layout: x is [M, C] contiguous, the NHWC pixels of all levels one after another; y is [M', C] with
levels of ceil(H / 2) x ceil(W / 2) pixels. Overwritten in place: running_mean, running_var,
num_batches_tracked (training only). z is never stored: an index of one byte per element of y says
which pixel was the largest, and whether the activation leaves a gradient.

Bytes per element of x in 16 bits, backend "triton": 2.75 forward (1 read, a quarter of a write, a
quarter of an index) and in training 2 more for the statistics, where batch norm, activation and
pooling that store z, and indices of 8 bytes, take 8.5 and those 2; 7.5 backward (2 reads of x, y's
gradient and index each, 1 write). Gradients are gathered, not added into memory: the same bits in
every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.kernels.bn_act_max_pool.reference import bn_act_max_pool_reference
from rsfast.kernels.common.backend import check_backend, load_kernels
from rsfast.kernels.common.checks import (
    check_activation,
    check_batch_norm,
    check_batch_norm_for_triton,
    check_rows,
)
from rsfast.kernels.common.levels import Affine, Levels, Norm, rows_of_levels
from rsfast.kernels.common.ranks import average_over_ranks
from rsfast.kernels.common.windows import conv2d_sizes
from rsfast.kernels.switchable_bn_act.op import batch_statistics

__all__ = ["bn_act_max_pool"]

# Of those of batch norm the ones that never turn an order around: the largest pixel is the largest
# before the activation too.
MONOTONIC_ACTIVATIONS = (None, "relu", "relu6")


@torch.library.custom_op("rsfast::bn_act_max_pool_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    banks: Sequence[int],
    activation: str | None,
    batch_statistics: bool,
    eps: float,
    synced: bool = False,
) -> tuple[Tensor, Tensor]:
    """y, and the place 0 to 8 of the largest pixel in its window, [M', C] uint8.

    The place is 9 where the activation leaves no gradient.
    `mean` and `var` are [L, C], a row per level, with `batch_statistics`, else [B, C], per bank.
    `synced` is for the backward.
    """
    y, largest = _empty_outputs(x, heights, widths, num_images)
    load_kernels("bn_act_max_pool.forward").forward(
        x,
        Affine(mean, var, weight, bias),
        y,
        largest,
        sizes=list(zip(heights, widths, strict=True)),
        num_images=num_images,
        banks=banks,
        activation=activation,
        batch_statistics=batch_statistics,
        eps=eps,
    )
    return y, largest


@_fwd.register_fake
def _(
    x: Tensor,
    *_: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(x, heights, widths, num_images)


def _empty_outputs(
    x: Tensor, heights: Sequence[int], widths: Sequence[int], num_images: int
) -> tuple[Tensor, Tensor]:
    sizes = pooled_sizes(list(zip(heights, widths, strict=True)))
    y = x.new_empty(sum(rows_of_levels(sizes, num_images)), x.shape[1])
    return y, torch.empty_like(y, dtype=torch.uint8)


@torch.library.custom_op("rsfast::bn_act_max_pool_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    largest: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    banks: Sequence[int],
    batch_statistics: bool,
    eps: float,
    synced: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias."""
    return load_kernels("bn_act_max_pool.backward").backward(
        dy.contiguous(),  # a sum's gradient has strides of 0
        largest,
        x,
        Affine(mean, var, weight, bias),
        sizes=list(zip(heights, widths, strict=True)),
        num_images=num_images,
        banks=banks,
        batch_statistics=batch_statistics,
        eps=eps,
        join=average_over_ranks if synced else None,
    )


@_bwd.register_fake
def _(
    dy: Tensor,
    largest: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    _, largest = output
    ctx.settings = {k: v for k, v in keyword_only_inputs.items() if k != "activation"}
    ctx.set_materialize_grads(False)  # none of zeros for the index
    ctx.mark_non_differentiable(largest)
    ctx.save_for_backward(largest, *inputs)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    dx, dweight, dbias = _bwd(dy, *ctx.saved_tensors, **ctx.settings)
    return dx, None, None, dweight, dbias


_fwd.register_autograd(_backward, setup_context=_setup_context)


def bn_act_max_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    banks: Sequence[int],
    *,
    activation: str | None = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    synced: bool = False,
    backend: str = "torch",
) -> Tensor:
    """Normalises, activates and pools every level.

    Args:
        x: [M, C] contiguous rows of all levels, as in :func:`switchable_bn_act`, like all that is
            not named here.
        weight: [B, C] scale (gamma) of each of the B banks.
        bias: [B, C] shift (beta).
        running_mean: [B, C]; updated in place when training.
        running_var: [B, C], unbiased; updated in place when training.
        num_batches_tracked: [B] int64; incremented for each level when training.
        sizes: (H, W) of each of the L levels.
        num_images: N.
        banks: the bank of each level.
        activation: None, "relu" or "relu6". SiLU and Hardswish fall before they rise, so that the
            largest input may not give the largest output; no backend takes them here.
        training: use (and track) batch statistics instead of running ones.
        momentum: weight of the batch in the running statistics, as in PyTorch.
        eps: added to the variance.
        synced: batch statistics are those of all ranks of the default process group.
        backend: "torch" for the reference, "triton" for the fused kernels; "cuda" is the same here.

    Returns:
        [M', C] in the dtype of `x`, levels of ceil(H / 2) x ceil(W / 2) pixels.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked)
    levels = Levels(rows_of_levels(sizes, num_images), tuple(banks))
    check_rows(x)
    check_batch_norm(norm, x.shape[1], len(sizes), levels.banks)
    check_rows(x, levels.rows)
    check_activation(activation, MONOTONIC_ACTIVATIONS)
    if check_backend(backend) == "torch":
        return bn_act_max_pool_reference(
            x,
            *norm,
            sizes,
            num_images,
            banks,
            activation=activation,
            training=training,
            momentum=momentum,
            eps=eps,
            synced=synced,
        )
    check_batch_norm_for_triton(x, norm, levels)
    mean, var = running_mean, running_var
    if training:
        mean, var = batch_statistics(x, norm, levels, momentum, synced)
    y, _ = _fwd(
        x,
        mean,
        var,
        weight,
        bias,
        heights=[height for height, _ in sizes],
        widths=[width for _, width in sizes],
        num_images=num_images,
        banks=levels.banks,
        activation=activation,
        batch_statistics=training,
        eps=eps,
        synced=synced and training,
    )
    return y


def pooled_sizes(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(H, W) of the levels behind the pooling."""
    return conv2d_sizes(sizes, 3, 2, 1)
