"""Normalising pixels in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["affine", "normalize_reference"]


def normalize_reference(
    x: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
) -> Tensor:
    """Plain PyTorch; arguments as in :func:`normalize`."""
    compute = torch.promote_types(dtype, torch.float32)
    scale, shift = _affine_tensors(tuple(mean), tuple(std), compute, x.device)
    y = x.to(compute).mul_(scale).add_(shift).to(dtype)
    return torch.nn.functional.pad(y, (0, channels - 3)) if channels > 3 else y


@functools.cache
def _affine_tensors(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Made once: a copy to a GPU for every batch would be waited for."""
    return [torch.tensor(part, dtype=dtype, device=device) for part in affine(mean, std)]


def affine(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """What bytes are multiplied by, and what is added to them."""
    scale = [1.0 / (255.0 * part) for part in std]
    return scale, [-m / part for m, part in zip(mean, std, strict=True)]
