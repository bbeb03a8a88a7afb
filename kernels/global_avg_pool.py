"""Global average pooling of packed rows: the mean over the pixels of each image and level.

    y[l * N + n] = mean over the H_l * W_l rows of image n in level l

Layout: x is [M, C] contiguous, rows of all levels one after another, N images in each.
Bytes: one read of x, one write of [L * N, C].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["global_avg_pool", "global_avg_pool_reference"]


def global_avg_pool_reference(x: Tensor, level_rows: Sequence[int], num_images: int) -> Tensor:
    """Plain PyTorch: one mean per level; arguments as in :func:`global_avg_pool`."""
    levels = torch.split(x, list(level_rows))
    return torch.cat([rows.view(num_images, -1, x.shape[1]).mean(1) for rows in levels])


def global_avg_pool(x: Tensor, level_rows: Sequence[int], num_images: int) -> Tensor:
    """Averages the pixels of each image.

    Args:
        x: [M, C] contiguous rows of all levels, floating point.
        level_rows: rows of each of the L levels, multiples of `num_images`; their sum is M.
        num_images: N.

    Returns:
        [L * N, C] in the dtype of `x`, level by level.

    Raises:
        ValueError: if the rows do not divide into levels and images.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous [M, C], got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    if sum(level_rows) != x.shape[0] or any(rows % num_images for rows in level_rows):
        raise ValueError(
            f"level_rows must be multiples of {num_images} images that add up to the "
            f"{x.shape[0]} rows of x, got {tuple(level_rows)}"
        )
    return global_avg_pool_reference(x, level_rows, num_images)
