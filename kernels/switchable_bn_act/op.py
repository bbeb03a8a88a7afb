"""Batch norm with private banks per level, residual add and activation, over packed rows.

Forward, for the rows of level l with bank b = banks[l] (RS-Net paper, equation 3):

    mean, var = statistics of the level's rows (training) or running_mean[b], running_var[b]
    y = act((x - mean) / sqrt(var + eps) * weight[b] + bias[b] + residual)

Training moves the running statistics: running = (1 - momentum) * running + momentum * batch,
with the unbiased variance (a level of one row contributes 0), once per level in level order.

Backward, with dz the gradient before the activation, xhat = (x - mean) / sqrt(var + eps) and sums
and means over the m rows of a level (evaluation has no means: its statistics are constants):

    dbias[b] = sum dz    dweight[b] = sum dz xhat    dresidual = dz
    dx = weight[b] / sqrt(var + eps) * (dz - mean(dz) - xhat mean(dz xhat))

Banks of several levels get the sum of their gradients, banks of none get 0.

Layout: x, residual and y are [M, C] contiguous, the rows of all levels one after another.
Overwritten in place: running_mean, running_var, num_batches_tracked (training only).

Backend "triton": statistics, finalise, apply (evaluation: apply), and reduce, finalise, apply, each
launch over all levels. It moves 3 elements per element forward (2 reads, 1 write) and 5 backward
(4, 1); a residual adds 1 and 1. The gradient of the activation is recomputed from x; behind a
residual that of ReLU and ReLU6 is kept as one bit per element, and that of SiLU and Hardswish,
silu'(z) = s (1 + z (1 - s)) with s = 1 / (1 + exp(-z)) and hardswish'(z) = z / 3 + 1 / 2 between -3
and 3, is computed from x and the residual, which adds 2 reads. y is not read again. In 16 bits that
is 16 bytes per element, 20.4 with a residual and ReLU, 24 with a residual and SiLU; at 4.3 TB/s
3.7, 4.7 and 5.6 ps.

Backend "cuda", training: one launch each way, which reads once what the chip can hold
(:mod:`rsfast.kernels.switchable_bn_act.cuda`). Evaluation, and statistics over all ranks, are as
for "triton".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.kernels.common.backend import check_backend, load_kernels
from rsfast.kernels.common.checks import (
    check_activation,
    check_batch_norm,
    check_batch_norm_for_triton,
    check_residual,
    check_rows,
)
from rsfast.kernels.common.levels import Affine, Levels, Norm
from rsfast.kernels.common.ranks import (
    average_over_ranks,
    joint_moments,
    move_running_statistics,
)
from rsfast.kernels.switchable_bn_act.cuda import (
    check_one_pass_activation,
    switchable_bn_act_one_pass,
)
from rsfast.kernels.switchable_bn_act.reference import ACTIVATIONS, switchable_bn_act_reference

__all__ = ["batch_statistics", "switchable_bn_act"]

# Their gradient is 0 or 1, so a bit says after a residual what it was. Of the others it is computed
# from x and the residual.
_CUTTING = ("relu", "relu6")


@torch.library.custom_op(
    "rsfast::switchable_bn_act_stats",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def _stats(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    *,
    level_rows: Sequence[int],
    banks: Sequence[int],
    momentum: float,
    synced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [L, C] float32 of each level; moves the running statistics."""
    levels = Levels(level_rows, banks)
    running = running_mean, running_var
    mean, var = load_kernels("switchable_bn_act.forward").batch_statistics(
        x, *running, num_batches_tracked, levels, 0.0 if synced else momentum
    )
    if synced:
        mean, var = joint_moments(mean, var)
        move_running_statistics(*running, mean, var, levels, momentum)
    return mean, var


@_stats.register_fake
def _(x: Tensor, *_: Tensor, level_rows: Sequence[int], **__: Any) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(len(level_rows), x.shape[1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


@torch.library.custom_op("rsfast::switchable_bn_act_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    level_rows: Sequence[int],
    banks: Sequence[int],
    activation: str | None,
    batch_statistics: bool,
    save_mask: bool,
    eps: float,
    synced: bool = False,
) -> tuple[Tensor, Tensor]:
    """y, and the bits of the mask [M, ceil(C / 8)] uint8 (no rows without `save_mask`).

    `mean` and `var` are [L, C], a row per level, with `batch_statistics`, else [B, C], per bank.
    The backward of a ReLU after a residual needs the mask; of others it does without.
    `synced` is for the backward.
    """
    y, mask = torch.empty_like(x), _empty_mask(x, save_mask)
    load_kernels("switchable_bn_act.forward").apply(
        x,
        residual,
        Affine(mean, var, weight, bias),
        Levels(level_rows, banks),
        y,
        mask if save_mask else None,
        activation=activation,
        batch_statistics=batch_statistics,
        eps=eps,
    )
    return y, mask


@_fwd.register_fake
def _(x: Tensor, *_: Tensor | None, save_mask: bool, **__: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _empty_mask(x, save_mask)


def _empty_mask(x: Tensor, save_mask: bool) -> Tensor:
    num_rows, num_channels = x.shape
    return x.new_empty(num_rows if save_mask else 0, (num_channels + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("rsfast::switchable_bn_act_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    level_rows: Sequence[int],
    banks: Sequence[int],
    activation: str | None,
    batch_statistics: bool,
    eps: float,
    synced: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual (no rows without `residual` and where `mask` has none), dweight and dbias.

    `residual` is for an activation whose gradient is computed from it.
    """
    dx, dresidual = torch.empty_like(x), _empty_dresidual(x, residual, mask)
    dweight, dbias = load_kernels("switchable_bn_act.backward").backward(
        dy.contiguous(),  # a sum's gradient has strides of 0
        x,
        residual,
        mask if len(mask) else None,
        Affine(mean, var, weight, bias),
        Levels(level_rows, banks),
        dx,
        dresidual if len(dresidual) else None,
        activation=activation,
        batch_statistics=batch_statistics,
        eps=eps,
        join=average_over_ranks if synced else None,
    )
    return dx, dresidual, dweight, dbias


@_bwd.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = _empty_dresidual(x, residual, mask)
    return torch.empty_like(x), dresidual, torch.empty_like(weight), torch.empty_like(bias)


def _empty_dresidual(x: Tensor, residual: Tensor | None, mask: Tensor) -> Tensor:
    return x.new_empty(mask.shape[0] if residual is None else x.shape[0], x.shape[1])


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    x, residual, *affine = inputs
    _, mask = output
    ctx.settings = {k: v for k, v in keyword_only_inputs.items() if k != "save_mask"}
    ctx.has_residual = residual is not None
    activation = ctx.settings["activation"]
    if ctx.has_residual and activation in _CUTTING and not len(mask):
        raise ValueError("save_mask must be True for gradients of a ReLU after a residual")
    ctx.set_materialize_grads(False)  # none of zeros for the mask
    ctx.mark_non_differentiable(mask)
    keeps_residual = activation is not None and activation not in _CUTTING
    ctx.save_for_backward(x, residual if keeps_residual else None, mask, *affine)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    dx, dresidual, dweight, dbias = _bwd(dy, *ctx.saved_tensors, **ctx.settings)
    if not ctx.has_residual:
        dresidual = None
    elif not len(dresidual):  # without an activation
        dresidual = dy
    return dx, dresidual, None, None, dweight, dbias


_fwd.register_autograd(_backward, setup_context=_setup_context)


def batch_statistics(
    x: Tensor, norm: Norm, levels: Levels, momentum: float, synced: bool
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [L, C] of each level, tracked in `norm`. Triton kernels."""
    return _stats(
        x.detach(),
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
        level_rows=levels.rows,
        banks=levels.banks,
        momentum=momentum,
        synced=synced,
    )


def _on_triton(
    x: Tensor,
    norm: Norm,
    levels: Levels,
    residual: Tensor | None,
    activation: str | None,
    training: bool,
    momentum: float,
    eps: float,
    synced: bool,
) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    if training:
        mean, var = batch_statistics(x, norm, levels, momentum, synced)
    y, _ = _fwd(
        x,
        residual,
        mean,
        var,
        norm.weight,
        norm.bias,
        level_rows=levels.rows,
        banks=levels.banks,
        activation=activation,
        batch_statistics=training,
        save_mask=activation in _CUTTING and residual is not None and torch.is_grad_enabled(),
        eps=eps,
        synced=synced and training,
    )
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
        weight: [B, C] scale (gamma) of each of the B banks.
        bias: [B, C] shift (beta).
        running_mean: [B, C]; updated in place when training.
        running_var: [B, C], unbiased; updated in place when training.
        num_batches_tracked: [B] int64; incremented for each level when training.
        level_rows: rows of each level; their sum is M.
        banks: the bank each level uses, each in [0, B).
        residual: [M, C] like `x`, added before the activation.
        activation: None, "relu", "relu6", "silu" or "hardswish"; for "cuda" one of the first three.
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
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked)
    levels = Levels(tuple(level_rows), tuple(banks))
    check_rows(x)
    check_batch_norm(norm, x.shape[1], len(levels.rows), levels.banks)
    check_rows(x, levels.rows)
    check_residual(residual, x)
    check_activation(activation, ACTIVATIONS)
    if check_backend(backend, extension=True) == "torch":
        return switchable_bn_act_reference(
            x,
            *norm,
            *levels,
            residual=residual,
            activation=activation,
            training=training,
            momentum=momentum,
            eps=eps,
            synced=synced,
        )
    if backend == "cuda":
        check_one_pass_activation(activation)
    check_batch_norm_for_triton(x, norm, levels, residual)
    if backend == "cuda" and training and not synced:
        return switchable_bn_act_one_pass(x, norm, levels, residual, activation, momentum, eps)
    return _on_triton(x, norm, levels, residual, activation, training, momentum, eps, synced)
