"""Learned quantisation of activations in plain PyTorch; :mod:`rsfast.kernels.lq_activation.op` has
the equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rsfast.kernels.common.basis import (
    CodeSums,
    keep_below,
    move_basis,
    quantise_and_sum,
    refit,
    sorted_levels,
)
from rsfast.kernels.common.ranks import sum_over_ranks
from rsfast.kernels.lq_activation.checks import check_state

__all__ = ["lq_activation_levels", "lq_activation_reference"]


class _Quantise(torch.autograd.Function):
    """Straight through up to the top level, zero above it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, levels: Tensor, summed: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.save_for_backward(x, levels[-1])
        y, by_code = quantise_and_sum(x.unsqueeze(0), levels.unsqueeze(1), summed=summed)
        counts, sums = (None, None) if by_code is None else by_code
        ctx.mark_non_differentiable(*(by_code or ()))
        ctx.set_materialize_grads(False)
        return y.squeeze(0), counts, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, top = ctx.saved_tensors
        if grads[0] is None:
            return None, None, None
        return keep_below(grads[0], x, top), None, None


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
        basis: [K], float32 or float64; moved in place, see `moving`.
        updates: [] int64, how often it was moved; counted up.
        moving: how many of the parts, from the first, move the basis. All are quantised with the
            one that it was before.
        synced: whether the basis is fitted to the values of all ranks of the default process group.

    Returns:
        Of each part the levels, in its dtype.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    check_state(basis, updates, moving, len(parts))
    for part in parts:
        if not part.is_floating_point():
            raise ValueError(f"every one of parts must be floating point, got {part.dtype}")
    levels, digits = sorted_levels(basis, signed=False)
    done = [_Quantise.apply(part, levels, index < moving) for index, part in enumerate(parts)]
    if moving:
        with torch.no_grad():
            found = [CodeSums(*sums) for _, *sums in done[:moving]]
            for by_code in _of_all_ranks(found) if synced else found:
                target = refit(basis[:, None], digits[:, :, None], by_code)
                move_basis(basis, updates, target[:, 0])
    return [y for y, *_ in done]


def lq_activation_reference(
    x: Tensor,
    basis: Tensor,
    updates: Tensor,
    level_rows: Sequence[int],
    *,
    moving: int = 0,
    synced: bool = False,
) -> Tensor:
    """Plain PyTorch, level by level; arguments as in :func:`lq_activation`."""
    parts = x.split(list(level_rows)) if len(level_rows) > 1 else (x,)
    outputs = lq_activation_levels(parts, basis, updates, moving=moving, synced=synced)
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _of_all_ranks(found: Sequence[CodeSums]) -> list[CodeSums]:
    """Added up over the ranks, in one collective."""
    total = sum_over_ranks(torch.stack([torch.stack(by_code) for by_code in found]))
    return [CodeSums(*by_code) for by_code in total]
