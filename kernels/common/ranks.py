"""Running statistics, and batch statistics over all ranks of the default process group.

Every rank has as many rows as this one, so means over ranks are means over all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rsfast.kernels.common.levels import Levels, Norm

__all__ = [
    "average_over_ranks",
    "joint_batch_norm",
    "joint_moments",
    "move_running_statistics",
    "sum_over_ranks",
]


class _Sum(torch.autograd.Function):
    """Sum over all ranks, whose gradient is the sum over the gradients of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.forward(ctx, grads[0])


def average_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over all ranks, in place and without gradients."""
    dist.all_reduce(tensor)
    return tensor.div_(dist.get_world_size())


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place and without gradients; of one rank, what it is."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def joint_moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks, of those [L, C] of each. Two collectives."""
    share = 1.0 / dist.get_world_size()
    joint = mean * share
    dist.all_reduce(joint)
    # Within the ranks and between them: nothing cancels.
    apart = mean - joint
    joint_var = torch.addcmul(var, apart, apart).mul_(share)
    dist.all_reduce(joint_var)
    return joint, joint_var


def joint_batch_norm(
    levels: Sequence[Tensor], norm: Norm, banks: Sequence[int], momentum: float, eps: float
) -> list[Tensor]:
    """Training batch norm of every level [m, C], in plain differentiable PyTorch."""
    share = 1.0 / dist.get_world_size()
    wide = [rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in levels]
    mean = share * _Sum.apply(torch.stack([rows.mean(0) for rows in wide]))
    centered = [rows - m for rows, m in zip(wide, mean, strict=True)]
    var = share * _Sum.apply(torch.stack([rows.square().mean(0) for rows in centered]))
    move_running_statistics(
        norm.running_mean,
        norm.running_var,
        mean.detach(),
        var.detach(),
        Levels([len(rows) for rows in levels], banks),
        momentum,
    )
    for bank in banks:
        norm.num_batches_tracked[bank] += 1
    return [
        (rows * (v + eps).rsqrt() * norm.weight[bank] + norm.bias[bank]).to(levels[0].dtype)
        for rows, v, bank in zip(centered, var, banks, strict=True)
    ]


def move_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    levels: Levels,
    momentum: float,
) -> None:
    """Towards statistics [L, C] of all ranks, level by level, with the unbiased variance."""
    totals = [rows * dist.get_world_size() for rows in levels.rows]
    unbiased = torch._foreach_mul(var.unbind(), [n / max(n - 1, 1) for n in totals])
    targets = [*mean.to(running_mean.dtype).unbind(), *(v.to(running_var.dtype) for v in unbiased)]
    # Levels that share a bank move it in turn; those of one turn are moved together.
    turns = [levels.banks[:level].count(bank) for level, bank in enumerate(levels.banks)]
    for turn in range(max(turns) + 1):
        chosen = [level for level, own in enumerate(turns) if own == turn]
        running = [
            part[levels.banks[level]] for part in (running_mean, running_var) for level in chosen
        ]
        moved = [targets[level + offset] for offset in (0, len(turns)) for level in chosen]
        torch._foreach_lerp_(running, moved, momentum)
