"""Every few pixels of every level in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsfast.kernels.common.levels import rows_of_levels
from rsfast.kernels.common.windows import IntOrPair, geometry_of

__all__ = ["subsample_reference"]


def subsample_reference(
    x: Tensor, sizes: Sequence[tuple[int, int]], num_images: int, stride: IntOrPair
) -> Tensor:
    """Plain PyTorch, slices of each level; arguments as in :func:`subsample`."""
    down, right = geometry_of(stride, 0, 1).stride
    # The gradient of a split is packed, of a single level for nothing.
    parts = x.split(rows_of_levels(sizes, num_images)) if len(sizes) > 1 else (x,)
    maps = [
        part.view(num_images, height, width, -1)
        for part, (height, width) in zip(parts, sizes, strict=True)
    ]
    read = [m[:, ::down, ::right].reshape(-1, x.shape[1]) for m in maps]
    return torch.cat(read) if len(read) > 1 else read[0].contiguous()
