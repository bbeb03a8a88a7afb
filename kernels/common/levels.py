"""What the operations are told of levels and their batch norm, and where the levels lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["MAX_LEVELS", "Affine", "Levels", "Norm", "images_of_levels", "rows_of_levels"]

MAX_LEVELS = 8  # of the Triton kernels: each program looks for its level among all

Sizes = Sequence[tuple[int, int]]  # (H, W) of each level


class Levels(NamedTuple):
    """L levels, one after another in packed rows."""

    rows: Sequence[int]
    """How many of each level."""
    banks: Sequence[int]
    """The bank of batch norm that each level uses."""


class Norm(NamedTuple):
    """Parameters and state of B banks of batch norm."""

    weight: Tensor  # [B, C]
    bias: Tensor  # [B, C]
    running_mean: Tensor  # [B, C]
    running_var: Tensor  # [B, C], unbiased
    num_batches_tracked: Tensor  # [B] int64


class Affine(NamedTuple):
    """What batch norm with known statistics computes from."""

    mean: Tensor  # [L, C] of the batch, or [B, C] running
    var: Tensor  # like mean; that of the batch is biased
    weight: Tensor  # [B, C]
    bias: Tensor  # [B, C]


def rows_of_levels(sizes: Sizes, num_images: int) -> list[int]:
    """Rows of each level."""
    return [num_images * height * width for height, width in sizes]


def images_of_levels(rows: Tensor, sizes: Sizes, num_images: int) -> list[Tensor]:
    """[N, C, H, W] channels-last views of packed rows [M, C]."""
    parts = rows.split(rows_of_levels(sizes, num_images))
    return [
        part.view(num_images, height, width, rows.shape[1]).permute(0, 3, 1, 2)
        for part, (height, width) in zip(parts, sizes, strict=True)
    ]
