"""The loss of resolution-switchable training in plain PyTorch.

:mod:`rsfast.kernels.distillation_loss.op` has the equations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DISTILL_MODES",
    "DistillationTerms",
    "count_rows",
    "distillation_loss_reference",
    "teacher_range",
    "teacher_weights",
]

DISTILL_MODES = ("full", "vanilla", "no_ensemble", "largest", "none")


class DistillationTerms(NamedTuple):
    """The three scalars of the loss, in nats, averaged over the batch."""

    ce: Tensor
    ensemble: Tensor
    distill: Tensor


def teacher_weights(mode: str, num_resolutions: int) -> tuple[tuple[float, ...], ...]:
    """W[s - 1][t]: weight of teacher t (0 is the ensemble) for student s, both 1..R.

    `full` is equation 10, `vanilla` equation 8. The two other columns of the paper's Table 5 are
    those sums without the ensemble: `no_ensemble` keeps the factor of equation 10, `largest`
    puts p_1 in the place of p_0 in equation 8 (the paper does not print their scale).

    Raises:
        ValueError: if the mode is unknown.
    """
    students = range(1, num_resolutions + 1)
    teachers = range(num_resolutions + 1)
    scale = 2.0 / (num_resolutions + 1)
    rules = {
        "full": lambda s, t: scale * (t < s),
        "vanilla": lambda s, t: 1.0 * (t == 0),
        "no_ensemble": lambda s, t: scale * (0 < t < s),
        "largest": lambda s, t: 1.0 * (t == 1 < s),
        "none": lambda s, t: 0.0,
    }
    if mode not in rules:
        raise ValueError(f"mode must be one of {DISTILL_MODES}, got {mode!r}")
    return tuple(tuple(rules[mode](s, t) for t in teachers) for s in students)


def teacher_range(mode: str, num_resolutions: int) -> tuple[int, int, float]:
    """(first, last, weight): student s has the teachers first..last below s, all of one weight."""
    weights = teacher_weights(mode, num_resolutions)[-1]
    teachers = [t for t, weight in enumerate(weights) if weight]
    return (teachers[0], teachers[-1], weights[teachers[0]]) if teachers else (0, -1, 0.0)


def _teacher_table(mode: str, logits: Tensor) -> Tensor:
    """[R, R + 1] W, filled on the device: one copied from the host would have to be waited for."""
    num_resolutions = len(logits)
    first, last, weight = teacher_range(mode, num_resolutions)
    table = logits.new_zeros(num_resolutions, num_resolutions + 1)
    table[:, first : last + 1].fill_(weight)
    return table.tril_()  # teachers are below their students


def count_rows(labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """How many labels count, a scalar int64 on their device; None where all do."""
    return None if ignore_index is None else (labels != ignore_index).sum()


class _Counted(NamedTuple):
    """Which rows count."""

    ignore_index: int
    rows: Tensor  # [N] 1 where a row counts, 0 elsewhere
    number: Tensor  # of them, at least 1


def _counted(labels: Tensor, ignore_index: int | None, dtype: torch.dtype) -> _Counted | None:
    number = count_rows(labels, ignore_index)
    if ignore_index is None or number is None:
        return None
    rows = (labels != ignore_index).to(dtype)
    return _Counted(ignore_index, rows, number.clamp(min=1).to(dtype))


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    mix: tuple[Tensor, ...] | None,
    counted: _Counted | None,
) -> Tensor:
    """Mean over the rows of [M, K] logits that count.

    `mix` are partner labels and shares, both [M].
    """
    if counted is not None:
        mean = F.cross_entropy(
            logits, labels, ignore_index=counted.ignore_index, label_smoothing=smoothing
        )
        # The mean over no row is NaN; PyTorch's gradients of ignored rows are 0 even then.
        return torch.where(counted.rows.any(), mean, 0.0)
    if mix is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    partner_labels, share = mix
    share = share.detach().to(logits.dtype)
    own, other = (
        F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        for target in (labels, partner_labels)
    )
    return (share * own + (1 - share) * other).mean()  # linear in the target, as smoothing is


def distillation_loss_reference(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str = "full",
    label_smoothing: float = 0.0,
    *,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
) -> DistillationTerms:
    """Plain PyTorch in closed form; arguments as in :func:`distillation_loss`."""
    num_resolutions, num_images, _ = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.long()
    counted = _counted(labels, ignore_index, logits.dtype)
    log_probs = F.log_softmax(logits, dim=-1)  # [R, N, K]
    mix = None if partner_labels is None or share is None else (partner_labels, share)
    of_levels = None if mix is None else tuple(part.repeat(num_resolutions) for part in mix)
    ce = num_resolutions * _cross_entropy(
        logits.flatten(0, 1), labels.repeat(num_resolutions), label_smoothing, of_levels, counted
    )
    weights = torch.softmax(alpha.to(logits.dtype), dim=0)
    ensemble_logits = torch.einsum("r,rnk->nk", weights, logits.detach())
    ensemble = _cross_entropy(ensemble_logits, labels, label_smoothing, mix, counted)

    if mode == "none":
        return DistillationTerms(ce, ensemble, torch.zeros_like(ce))
    with torch.no_grad():
        table = _teacher_table(mode, logits)
        teachers = torch.cat([F.log_softmax(ensemble_logits, dim=-1)[None], log_probs])
        probs = teachers.exp()  # [R + 1, N, K]
        neg_entropy = (probs * teachers).sum(-1)  # [R + 1, N]
        mixed = torch.einsum("st,tnk->snk", table, probs)  # P_s, [R, N, K]
        if counted is not None:
            neg_entropy *= counted.rows
            mixed *= counted.rows[:, None]
        constant = (table @ neg_entropy).sum()
    distill = (constant - (mixed * log_probs).sum()) / (
        num_images if counted is None else counted.number
    )
    return DistillationTerms(ce, ensemble, distill)
