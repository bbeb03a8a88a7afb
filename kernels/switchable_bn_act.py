"""Batch norm with private sets per level, residual add and activation, over packed rows.

Forward, for the rows of level l with set b = banks[l] (RS-Net paper, equation 3):

    mean, var = statistics of the level's rows (training) or running_mean[b], running_var[b]
    y = act((x - mean) / sqrt(var + eps) * weight[b] + bias[b] + residual)

Training moves the running statistics: running = (1 - momentum) * running + momentum * batch,
with the unbiased variance (a level of one row contributes 0), once per level in level order.

Backward, with dz the gradient before the activation, xhat = (x - mean) / sqrt(var + eps) and sums
and means over the m rows of a level (evaluation has no means: its statistics are constants):

    dbias[b] = sum dz    dweight[b] = sum dz xhat    dresidual = dz
    dx = weight[b] / sqrt(var + eps) * (dz - mean(dz) - xhat mean(dz xhat))

Sets of several levels get the sum of their gradients, sets of none get 0.

Layout: x, residual and y are [M, C] contiguous, the rows of all levels one after another.
Overwritten in place: running_mean, running_var, num_batches_tracked (training only).

Backend "triton": statistics, finalise, apply (evaluation: apply), and reduce, finalise, apply, each
launch over all levels. It moves 3 elements per element forward (2 reads, 1 write) and 5 backward
(4, 1); a residual adds 1 and 1. Where the gradient flows is recomputed from x, or kept as one bit
per element when there is a residual: y is not read again. In 16 bits that is 16 bytes per element,
20.4 with a residual; at 4.3 TB/s 3.7 and 4.7 ps.

Backend "cuda", training: one launch each way, which reads once what the chip can hold
(:mod:`rsfast.kernels._bn_cuda`). Evaluation, and statistics over all ranks, are as for "triton".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels._bn_checks import check_batch_norm, check_batch_norm_for_triton
from rsfast.kernels._bn_cuda import check_one_pass_rows, switchable_bn_act_one_pass
from rsfast.kernels._checks import check_backend, load_kernels
from rsfast.kernels._ranks import (
    average_over_ranks,
    joint_batch_norm,
    joint_moments,
    move_running_statistics,
)

__all__ = ["ACTIVATIONS", "switchable_bn_act", "switchable_bn_act_reference"]

_SAVE_MASK = 9  # where it comes among the arguments of the forward op, after x
ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6}


def switchable_bn_act_reference(
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
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    synced: bool = False,
) -> Tensor:
    """Plain PyTorch, one `torch.batch_norm` per level; see :func:`switchable_bn_act`."""
    levels = torch.split(x, list(level_rows))
    norm = weight, bias, running_mean, running_var, num_batches_tracked
    if training and synced:
        outputs = joint_batch_norm(levels, *norm, banks, momentum, eps)
    else:
        settings = training, momentum, eps
        outputs = [
            _batch_norm(rows, *norm, bank, *settings)
            for rows, bank in zip(levels, banks, strict=True)
        ]
    y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y)


def _batch_norm(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    bank: int,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    # As a [1, C, m, 1] channels-last image, PyTorch's CPU kernel walks the rows in order; as
    # [m, C] it would walk every channel through all of memory. Made by view and permute: an
    # image indexed with None has other strides on its axes of size 1, and PyTorch 2.13's CPU
    # backward then takes the gradient for NCHW and returns a wrong one.
    image = rows.view(1, rows.shape[0], 1, -1).permute(0, 3, 1, 2)
    mean, var = running_mean[bank], running_var[bank]
    if training:
        # Levels may share a set: batch_norm keeps what it is given for the backward, so each
        # level works on copies of its own.
        mean, var = mean.clone(), var.clone()
    # Not cuDNN: its statistics are not those of the native kernels.
    y = torch.batch_norm(image, weight[bank], bias[bank], mean, var, training, momentum, eps, False)
    if training:
        running_mean[bank] = mean
        # Of a single row there is no unbiased variance (PyTorch divides by m - 1 = 0).
        running_var[bank] = var if len(rows) > 1 else (1.0 - momentum) * running_var[bank]
        num_batches_tracked[bank] += 1
    return y.permute(0, 2, 3, 1).reshape(rows.shape)


@torch.library.custom_op(
    "rsfast::switchable_bn_act_stats",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def _stats(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    momentum: float,
    synced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [L, C] float32 of each level; moves the running statistics."""
    counted = running_mean, running_var, num_batches_tracked, level_rows, banks
    own = load_kernels("_bn_forward").batch_statistics(x, *counted, 0.0 if synced else momentum)
    if not synced:
        return own
    mean, var = joint_moments(*own)
    everyone = dist.get_world_size()
    running = running_mean, running_var
    move_running_statistics(*running, mean, var, level_rows, banks, momentum, everyone)
    return mean, var


@_stats.register_fake
def _(
    x: Tensor, mean: Tensor, var: Tensor, num_batches: Tensor, level_rows: Sequence[int], *_: Any
):
    shape = len(level_rows), x.shape[1]
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("rsfast::switchable_bn_act_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    activation: str | None,
    batch_statistics: bool,
    save_mask: bool,
    eps: float,
    synced: bool = False,
) -> tuple[Tensor, Tensor]:
    """y, and the bits of the mask [M, ceil(C / 8)] uint8 (no rows without `save_mask`).

    `mean` and `var` are [L, C], a row per level, with `batch_statistics`, else [B, C], per set.
    The backward of an activation after a residual needs the mask; of others it does without.
    `synced` is for the backward.
    """
    y, mask = torch.empty_like(x), _empty_mask(x, save_mask)
    load_kernels("_bn_forward").apply(
        x,
        residual,
        weight,
        bias,
        mean,
        var,
        level_rows,
        banks,
        y,
        mask if save_mask else None,
        activation=activation,
        batch_statistics=batch_statistics,
        eps=eps,
    )
    return y, mask


@_fwd.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _empty_mask(x, arguments[_SAVE_MASK])


def _empty_mask(x: Tensor, save_mask: bool) -> Tensor:
    num_rows, num_channels = x.shape
    return x.new_empty(num_rows if save_mask else 0, (num_channels + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("rsfast::switchable_bn_act_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    activation: str | None,
    batch_statistics: bool,
    eps: float,
    synced: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual (no rows where `mask` has none), dweight and dbias."""
    dx, dresidual = torch.empty_like(x), x.new_empty(mask.shape[0], x.shape[1])
    dweight, dbias = load_kernels("_bn_backward").backward(
        dy.contiguous(),  # a sum's gradient has strides of 0
        x,
        mask if len(mask) else None,
        weight,
        bias,
        mean,
        var,
        level_rows,
        banks,
        dx,
        dresidual if len(mask) else None,
        activation=activation,
        batch_statistics=batch_statistics,
        eps=eps,
        join=average_over_ranks if synced else None,
    )
    return dx, dresidual, dweight, dbias


@_bwd.register_fake
def _(dy: Tensor, x: Tensor, mask: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dresidual = x.new_empty(mask.shape[0], x.shape[1])
    return torch.empty_like(x), dresidual, torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, mean, var, *ctx.settings, _, eps, synced = inputs
    ctx.last_settings = eps, synced
    ctx.has_residual = residual is not None
    if ctx.has_residual and ctx.settings[-2] is not None and not len(output[1]):
        raise ValueError("save_mask must be True for gradients of an activation after a residual")
    ctx.set_materialize_grads(False)  # none of zeros for the mask
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, bias, mean, var)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    dx, dresidual, dweight, dbias = _bwd(dy, *ctx.saved_tensors, *ctx.settings, *ctx.last_settings)
    if not ctx.has_residual:
        dresidual = None
    elif not len(dresidual):  # without an activation
        dresidual = dy
    return dx, dresidual, dweight, dbias, *(None,) * 9


_fwd.register_autograd(_backward, setup_context=_setup_context)


def apply_given_moments(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    activation: str | None,
    eps: float,
    *,
    batch_statistics: bool = True,
    synced: bool = False,
) -> Tensor:
    """The Triton kernels of :func:`switchable_bn_act` behind those of the statistics.

    Mean and variance are those of the levels of x (or of the sets, without `batch_statistics`), and
    gradients take them so.
    """
    save_mask = activation is not None and residual is not None and torch.is_grad_enabled()
    tensors = x, residual, weight, bias, mean, var, level_rows, banks, activation
    y, _ = _fwd(*tensors, batch_statistics, save_mask, eps, synced)
    return y


def switchable_bn_act(
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
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    synced: bool = False,
    backend: str = "torch",
) -> Tensor:
    """Batch norm per level, optional residual add, optional activation.

    Args:
        x: [M, C] contiguous rows of all levels, floating point. For "triton" float16, bfloat16 or
            float32, at most 8 levels of at least one row; everything else contiguous and on the
            same device, parameters and statistics float32. For "cuda" not float32, C % 8 = 0.
        weight: [B, C] scale (gamma) of each of the B sets.
        bias: [B, C] shift (beta).
        running_mean: [B, C]; updated in place when training.
        running_var: [B, C], unbiased; updated in place when training.
        num_batches_tracked: [B] int64; incremented for each level when training.
        level_rows: rows of each level; their sum is M.
        banks: the set each level uses, each in [0, B).
        residual: [M, C] like `x`, added before the activation.
        activation: None, "relu" or "relu6".
        training: use (and track) batch statistics instead of running ones.
        momentum: weight of the batch in the running statistics, as in PyTorch.
        eps: added to the variance.
        synced: batch statistics are those of all ranks of the default process group, each with the
            same `level_rows`, and so are their gradients. Gradients of weight and bias stay
            this rank's share.
        backend: "torch" for the reference, "triton" for the fused kernels, "cuda" for the same in
            one launch each way.

    Returns:
        [M, C] in the dtype of `x`.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton, or the extension of "cuda", is asked for and absent.
    """
    norm = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "num_batches_tracked": num_batches_tracked,
    }
    check_batch_norm(x, norm, level_rows, banks, residual)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    if check_backend(backend, "cuda") != "torch":
        check_batch_norm_for_triton(x, norm, level_rows, residual)
        mean, var = running_mean, running_var
        synced = synced and training
        if backend == "cuda" and training and not synced:
            check_one_pass_rows(x)
            options = {"activation": activation, "momentum": momentum, "eps": eps}
            levels = {"level_rows": level_rows, "banks": banks}
            return switchable_bn_act_one_pass(x, **norm, **levels, residual=residual, **options)
        if training:
            mean, var = _stats(
                x.detach(),
                running_mean,
                running_var,
                num_batches_tracked,
                level_rows,
                banks,
                momentum,
                synced,
            )
        given = x, residual, weight, bias, mean, var, level_rows, banks, activation
        return apply_given_moments(*given, eps, batch_statistics=training, synced=synced)
    return switchable_bn_act_reference(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        level_rows,
        banks,
        residual=residual,
        activation=activation,
        training=training,
        momentum=momentum,
        eps=eps,
        synced=synced,
    )
