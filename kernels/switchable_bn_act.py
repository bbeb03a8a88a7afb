"""Batch norm with private sets per level, residual add and activation, over packed rows.

Forward, for the rows of level l with set b = banks[l] (RS-Net paper, equation 3):

    mean, var = statistics of the level's rows (training) or running_mean[b], running_var[b]
    y = act((x - mean) / sqrt(var + eps) * weight[b] + bias[b] + residual)

Training moves the running statistics: running = (1 - momentum) * running + momentum * batch,
with the unbiased variance (a level of one row contributes 0), once per level in level order.

Layout: x, residual and y are [M, C] contiguous, the rows of all levels one after another.
Overwritten in place: running_mean, running_var, num_batches_tracked (training only).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "switchable_bn_act", "switchable_bn_act_reference"]

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
) -> Tensor:
    """Plain PyTorch, one `torch.batch_norm` per level; see :func:`switchable_bn_act`."""
    levels = []
    for rows, bank in zip(torch.split(x, list(level_rows)), banks, strict=True):
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
        y = torch.batch_norm(
            image,
            weight[bank],
            bias[bank],
            mean,
            var,
            training,
            momentum,
            eps,
            False,  # not cuDNN: its statistics are not those of the native kernels
        )
        if training:
            running_mean[bank] = mean
            # Of a single row there is no unbiased variance (PyTorch divides by m - 1 = 0).
            running_var[bank] = var if len(rows) > 1 else (1.0 - momentum) * running_var[bank]
            num_batches_tracked[bank] += 1
        levels.append(y.permute(0, 2, 3, 1).reshape(rows.shape))
    y = torch.cat(levels) if len(levels) > 1 else levels[0]
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y)


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
) -> Tensor:
    """Batch norm per level, optional residual add, optional activation.

    Args:
        x: [M, C] contiguous rows of all levels, floating point.
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

    Returns:
        [M, C] in the dtype of `x`.

    Raises:
        ValueError: if a shape, layout, set index or activation breaks one of these rules.
    """
    _check(x, weight, level_rows, banks, residual, activation)
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
    )


def _check(
    x: Tensor,
    weight: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    residual: Tensor | None,
    activation: str | None,
) -> None:
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous [M, C], got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be [B, C] with C = {x.shape[1]}, got shape {tuple(weight.shape)}"
        )
    if sum(level_rows) != x.shape[0]:
        raise ValueError(
            f"level_rows must add up to the {x.shape[0]} rows of x, got {tuple(level_rows)}"
        )
    if len(banks) != len(level_rows) or not all(0 <= bank < weight.shape[0] for bank in banks):
        raise ValueError(
            f"banks must name one of {weight.shape[0]} sets for each of {len(level_rows)} levels, "
            f"got {tuple(banks)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {tuple(x.shape)} {x.dtype} like x, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
