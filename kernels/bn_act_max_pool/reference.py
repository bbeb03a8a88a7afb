"""Batch norm, activation and max pooling in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels.common.levels import images_of_levels, rows_of_levels
from rsfast.kernels.switchable_bn_act.reference import switchable_bn_act_reference

__all__ = ["bn_act_max_pool_reference"]


def bn_act_max_pool_reference(
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
) -> Tensor:
    """Plain PyTorch, one `F.max_pool2d` per level; arguments as in :func:`bn_act_max_pool`."""
    z = switchable_bn_act_reference(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        rows_of_levels(sizes, num_images),
        banks,
        activation=activation,
        training=training,
        momentum=momentum,
        eps=eps,
        synced=synced,
    )
    pooled = [F.max_pool2d(images, 3, 2, 1) for images in images_of_levels(z, sizes, num_images)]
    return torch.cat([y.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for y in pooled])
