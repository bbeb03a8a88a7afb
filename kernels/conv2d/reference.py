"""Convolution of every level in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels.common.levels import images_of_levels
from rsfast.kernels.common.windows import IntOrPair, geometry_of

__all__ = ["conv2d_reference"]


def conv2d_reference(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """Plain PyTorch, one `F.conv2d` per level; arguments as in :func:`conv2d`."""
    geometry = geometry_of(stride, padding, dilation)
    images = images_of_levels(x, sizes, num_images)
    outputs = [F.conv2d(level, weight, None, *geometry, groups) for level in images]
    return torch.cat([y.permute(0, 2, 3, 1).reshape(-1, weight.shape[0]) for y in outputs])
