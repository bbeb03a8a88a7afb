"""Learned quantisation of activations in plain PyTorch; :mod:`rsfast.kernels.lq_activation.op` has
the equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.kernels.common.basis import (
    CodeSums,
    code_sums,
    move_basis,
    quantise,
    refit,
    sorted_levels,
)
from rsfast.kernels.common.ranks import sum_over_ranks

__all__ = ["lq_activation_levels"]


class _Quantise(torch.autograd.Function):
    """Straight through up to the top level, zero above it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(x > levels[-1])
        return quantise(x, levels).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (above,) = ctx.saved_tensors
        return torch.where(above, 0.0, grads[0]), None


def lq_activation_levels(
    parts: Sequence[Tensor],
    basis: Tensor,
    updates: Tensor,
    *,
    moving: int = 0,
    synced: bool = False,
) -> list[Tensor]:
    """Quantised activations of levels that each have a tensor of their own: nothing is packed.

    Plain PyTorch, on any device; what a CPU computes fastest.

    Args:
        parts: the values of each resolution, of any shape, floating point.
        basis: [K]; moved in place, see `moving`.
        updates: [] int64, how often it was moved; counted up.
        moving: how many of the parts, from the first, move the basis. All are quantised with the
            one that it was before.
        synced: whether the basis is fitted to the values of all ranks of the default process group.

    Returns:
        Of each part the levels, in its dtype.
    """
    levels, digits = sorted_levels(basis, signed=False)
    wide = [part.to(torch.promote_types(part.dtype, basis.dtype)) for part in parts]
    quantised = [
        _Quantise.apply(part, levels).to(own.dtype) for part, own in zip(wide, parts, strict=True)
    ]
    if moving:
        with torch.no_grad():
            found = [code_sums(part, levels, list(range(part.dim()))) for part in wide[:moving]]
            for by_code in _of_all_ranks(found) if synced else found:
                move_basis(basis, updates, refit(basis, digits, by_code))
    return quantised


def _of_all_ranks(found: Sequence[CodeSums]) -> list[CodeSums]:
    """Added up over the ranks, in one collective."""
    total = sum_over_ranks(torch.stack([torch.stack(by_code) for by_code in found]))
    return [CodeSums(*by_code) for by_code in total]
