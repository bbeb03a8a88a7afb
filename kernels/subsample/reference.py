"""Every few pixels of every level in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsfast.kernels.common.levels import rows_of_levels
from rsfast.kernels.common.windows import IntOrPair, geometry_of

__all__ = ["subsample_gradient_reference", "subsample_reference"]


def subsample_reference(
    x: Tensor, sizes: Sequence[tuple[int, int]], num_images: int, stride: IntOrPair
) -> Tensor:
    """Plain PyTorch, slices of each level; arguments as in :func:`subsample`."""
    maps = _every(x, sizes, num_images, stride)
    read = [pixels.reshape(-1, x.shape[1]) for pixels in maps]
    return torch.cat(read) if len(read) > 1 else read[0].contiguous()


def subsample_gradient_reference(
    dy: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: IntOrPair,
    add_to: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; arguments as in :func:`subsample_gradient`."""
    num_rows = sum(rows_of_levels(sizes, num_images))
    dx = dy.new_zeros(num_rows, dy.shape[1]) if add_to is None else add_to
    maps = _every(dx, sizes, num_images, stride)
    parts = dy.split([pixels.shape[:3].numel() for pixels in maps])
    for pixels, part in zip(maps, parts, strict=True):
        pixels += part.view(pixels.shape)
    return dx


def _every(
    rows: Tensor, sizes: Sequence[tuple[int, int]], num_images: int, stride: IntOrPair
) -> list[Tensor]:
    """Views [N, H', W', C] of the pixels of each level."""
    down, right = geometry_of(stride, 0, 1).stride
    # The gradient of a split is packed, of a single level for nothing.
    parts = rows.split(rows_of_levels(sizes, num_images)) if len(sizes) > 1 else (rows,)
    return [
        part.view(num_images, height, width, -1)[:, ::down, ::right]
        for part, (height, width) in zip(parts, sizes, strict=True)
    ]
