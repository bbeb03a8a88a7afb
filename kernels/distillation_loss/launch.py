"""Which of the Triton kernels computes the loss, and how many partial sums it leaves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rsfast.kernels.distillation_loss import forward, many_rows, tiles
from rsfast.kernels.distillation_loss.reference import count_rows

__all__ = ["launch", "num_sums"]


def num_sums(logits: Tensor, partner_labels: Tensor | None = None) -> int:
    """P, the rows of `terms` and `dalpha` that a launch fills."""
    return tiles.num_programs(*logits.shape) if _is_tall(logits, partner_labels) else len(logits[0])


def launch(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    teachers: tuple[int, int, float],
    label_smoothing: float,
    *,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
    **outputs: Any,
) -> None:
    """Fills `terms` [P, 3], or `dlogits` [R, N, K] and `dalpha` [P, R] for `upstream` [3], or all.

    `teachers` are first teacher, last teacher and the weight of every pair. Sums over P are left to
    the caller.
    """
    options = {**outputs, "ignore_index": ignore_index, "counted": count_rows(labels, ignore_index)}
    arguments = (logits, labels, alpha, teachers, label_smoothing)
    if _is_tall(logits, partner_labels):
        many_rows.launch(*arguments, **options)
    else:
        forward.launch(*arguments, partner_labels=partner_labels, share=share, **options)


def _is_tall(logits: Tensor, partner_labels: Tensor | None) -> bool:
    """Whether there are rows enough, and classes few enough, to give a program many rows."""
    return partner_labels is None and tiles.is_tall(*logits.shape)
