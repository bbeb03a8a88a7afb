"""Global average pooling in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["global_avg_pool_reference"]


def global_avg_pool_reference(x: Tensor, level_rows: Sequence[int], num_images: int) -> Tensor:
    """Plain PyTorch: one mean per level; arguments as in :func:`global_avg_pool`."""
    levels = torch.split(x, list(level_rows))
    return torch.cat([rows.view(num_images, -1, x.shape[1]).mean(1) for rows in levels])
