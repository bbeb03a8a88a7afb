"""What the quantisers of activations ask of their state."""

from __future__ import annotations

import torch
from torch import Tensor

from rsfast.kernels.common.basis import MAX_BITS

__all__ = ["check_state"]


def check_state(basis: Tensor, updates: Tensor, moving: int, num_levels: int) -> None:
    """Refuses a basis that is none, and more levels that move it than there are.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if basis.dim() != 1 or not 1 <= len(basis) <= MAX_BITS:
        raise ValueError(
            f"basis must be [K], with 1 to {MAX_BITS} bits K, got shape {tuple(basis.shape)}"
        )
    if basis.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"basis must be float32 or float64, got {basis.dtype}")
    if updates.shape != () or updates.dtype != torch.int64:
        raise ValueError(
            f"updates must be a single int64, got {updates.dtype} of shape {tuple(updates.shape)}"
        )
    if not 0 <= moving <= num_levels:
        raise ValueError(f"moving must be between 0 and {num_levels} levels, got {moving}")
