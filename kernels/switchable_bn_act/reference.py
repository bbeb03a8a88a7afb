"""Switchable batch norm in plain PyTorch; :mod:`rsfast.kernels.switchable_bn_act.op` has the
equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels.common.checks import (
    check_activation,
    check_batch_norm,
    check_residual,
    check_rows,
)
from rsfast.kernels.common.levels import Norm
from rsfast.kernels.common.ranks import joint_batch_norm

__all__ = ["ACTIVATIONS", "switchable_bn_act_levels", "switchable_bn_act_reference"]

_FUNCTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": torch.relu_,  # of batch norm's output, which nobody else has
    "relu6": lambda y: F.relu6(y, inplace=True),
    "silu": F.silu,
    "hardswish": F.hardswish,
}
ACTIVATIONS = tuple(_FUNCTIONS)


def switchable_bn_act_levels(
    levels: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    banks: Sequence[int],
    *,
    residual: Sequence[Tensor] | None = None,
    activation: str | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    synced: bool = False,
) -> list[Tensor]:
    """:func:`switchable_bn_act` where each level has a tensor of its own: nothing is packed.

    Plain PyTorch, one `torch.batch_norm` per level, on any device; what a CPU computes fastest.

    Args:
        levels: [m_l, C] contiguous rows of each of the L levels, floating point, of one dtype.
        weight: [B, C] scale (gamma) of each of the B banks.
        bias: [B, C] shift (beta).
        running_mean: [B, C]; updated in place when training.
        running_var: [B, C], unbiased; updated in place when training.
        num_batches_tracked: [B] int64; incremented for each level when training.
        banks: the bank each level uses, each in [0, B).
        residual: like `levels`, added before the activation.
        activation: one of ACTIVATIONS.
        training: use (and track) batch statistics instead of running ones.
        momentum: weight of the batch in the running statistics, as in PyTorch.
        eps: added to the variance.
        synced: batch statistics are those of all ranks of the default process group.

    Returns:
        [m_l, C] for each level, in its dtype.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked)
    _check_levels(levels, norm, banks, residual, activation)
    images = [_as_image(rows) for rows in levels]
    if training and synced:
        normed = joint_batch_norm(levels, norm, banks, momentum, eps)
        outputs = [_as_image(rows) for rows in normed]
    else:
        # One operation each, whose gradient is one, too; indexing has one for every level.
        rows_of = [Norm(*rows) for rows in zip(*(part.unbind() for part in norm), strict=True)]
        outputs = [
            _batch_norm(image, rows_of[bank], training, momentum, eps)
            for image, bank in zip(images, banks, strict=True)
        ]
    for index, own in enumerate(residual or ()):
        # Batch norm's backward does not look at its output: nothing is lost, and a pass is saved.
        outputs[index] = outputs[index].add_(_as_image(own))
    return [
        _FUNCTIONS[activation](y).permute(0, 2, 3, 1).reshape(rows.shape)
        for y, rows in zip(outputs, levels, strict=True)
    ]


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
    """Plain PyTorch, level by level; arguments as in :func:`switchable_bn_act`."""
    outputs = switchable_bn_act_levels(
        x.split(list(level_rows)),
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        banks,
        residual=None if residual is None else residual.split(list(level_rows)),
        activation=activation,
        training=training,
        momentum=momentum,
        eps=eps,
        synced=synced,
    )
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _check_levels(
    levels: Sequence[Tensor],
    norm: Norm,
    banks: Sequence[int],
    residual: Sequence[Tensor] | None,
    activation: str | None,
) -> None:
    if not levels:
        raise ValueError("levels must be at least one tensor, got none")
    for rows in levels:
        check_rows(rows, name="every one of levels")
        if rows.shape[1] != levels[0].shape[1] or rows.dtype != levels[0].dtype:
            raise ValueError(
                f"levels must have one number of channels and one dtype, got "
                f"{[(tuple(rows.shape), rows.dtype) for rows in levels]}"
            )
    check_batch_norm(norm, levels[0].shape[1], len(levels), banks)
    check_activation(activation, ACTIVATIONS)
    if residual is not None and len(residual) != len(levels):
        raise ValueError(
            f"residual must have a tensor for each of {len(levels)} levels, got {len(residual)}"
        )
    for own, rows in zip(residual or (), levels, strict=False):
        check_residual(own, rows)


def _as_image(rows: Tensor) -> Tensor:
    """Rows [m, C] as a [1, C, m, 1] channels-last image.

    PyTorch's CPU kernel walks such rows in order; as [m, C] it would walk every channel through all
    of memory. Made by view and permute: an image indexed with None has other strides on its axes of
    size 1, and PyTorch 2.13's CPU backward then takes the gradient for NCHW and returns a wrong
    one.
    """
    return rows.view(1, rows.shape[0], 1, -1).permute(0, 3, 1, 2)


def _batch_norm(image: Tensor, bank: Norm, training: bool, momentum: float, eps: float) -> Tensor:
    """Of one level, by one bank: `bank` has the [C] rows that are views of all banks."""
    var = bank.running_var
    if not training:
        # Not cuDNN: its statistics are not those of the native kernels.
        return torch.batch_norm(image, *bank[:4], False, momentum, eps, False)
    if image.shape[2] == 1:  # of a single row there is no unbiased variance: PyTorch divides by 0
        var = var.clone()
    y = torch.batch_norm(
        image, bank.weight, bank.bias, bank.running_mean, var, True, momentum, eps, False
    )
    if var is not bank.running_var:
        # As data: autograd has saved the rows of all banks, although no gradient depends on them.
        bank.running_var.data.mul_(1.0 - momentum)
    bank.num_batches_tracked.add_(1)
    return y
