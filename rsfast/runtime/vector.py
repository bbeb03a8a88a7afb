"""Many small tensors as one vector, so that one operation serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_vector", "by_dtype", "fill_from_vector"]


def as_vector(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all values, one tensor after the other; the tensors share type and device."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors of each type, each list of which :func:`as_vector` takes."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def fill_from_vector(tensors: Sequence[Tensor], vector: Tensor) -> None:
    """Puts such values back in place."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    views = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(list(tensors), views)
