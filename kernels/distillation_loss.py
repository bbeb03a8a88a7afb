"""Cross entropy, ensemble cross entropy and distillation between R resolutions.

With p_s the softmax of z_s (s = 1..R, largest first), a = softmax(alpha), z_0 = sum_s a_s z_s of
detached z_s, and p_0 its softmax (RS-Net paper, equations 1 to 10):

    ce       = sum_s CE(z_s, y)
    ensemble = CE(z_0, y)                                 gradient to alpha only
    distill  = sum_s sum_{t<s} W[s, t] KL(p_t || p_s)     teachers p_t detached

W is the table of :func:`teacher_weights`. The inner sum needs no R^2 KL terms: with H the entropy
and P_s = sum_t W[s, t] p_t,

    sum_t W[s, t] KL(p_t || p_s) = - sum_t W[s, t] H(p_t) - sum_c P_s[c] log p_s[c]

    d distill / d z_s   = (sum_t W[s, t]) p_s - P_s
    d ensemble / d a_k  = <p_0 - onehot(y), z_k>, through the softmax of alpha

All terms are averaged over the N images and computed in float32 (float64 for float64 logits).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DISTILL_MODES",
    "DistillationTerms",
    "distillation_loss",
    "distillation_loss_reference",
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


def distillation_loss_reference(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str = "full",
    label_smoothing: float = 0.0,
) -> DistillationTerms:
    """Plain PyTorch in closed form; arguments as in :func:`distillation_loss`."""
    num_resolutions, num_images, _ = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = F.log_softmax(logits, dim=-1)  # [R, N, K]
    ce = num_resolutions * F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(num_resolutions), label_smoothing=label_smoothing
    )
    weights = torch.softmax(alpha.to(logits.dtype), dim=0)
    ensemble_logits = torch.einsum("r,rnk->nk", weights, logits.detach())
    ensemble = F.cross_entropy(ensemble_logits, labels, label_smoothing=label_smoothing)

    if mode == "none":
        return DistillationTerms(ce, ensemble, torch.zeros_like(ce))
    with torch.no_grad():
        table = logits.new_tensor(teacher_weights(mode, num_resolutions))  # [R, R + 1]
        teachers = torch.cat([F.log_softmax(ensemble_logits, dim=-1)[None], log_probs])
        probs = teachers.exp()  # [R + 1, N, K]
        neg_entropy = (probs * teachers).sum(-1)  # [R + 1, N]
        mixed = torch.einsum("st,tnk->snk", table, probs)  # P_s, [R, N, K]
        constant = (table @ neg_entropy).sum()
    distill = (constant - (mixed * log_probs).sum()) / num_images
    return DistillationTerms(ce, ensemble, distill)


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str = "full",
    label_smoothing: float = 0.0,
) -> DistillationTerms:
    """Cross entropy per resolution, ensemble cross entropy and distillation.

    Args:
        logits: [R, N, K] float16, bfloat16, float32 or float64; largest resolution first.
        labels: [N] int64 in [0, K); checked here on a CPU, by a device assertion on a GPU.
        alpha: [R] ensemble scores before the softmax; gets gradient from the ensemble term only.
        mode: which teachers teach whom, one of DISTILL_MODES; see :func:`teacher_weights`.
        label_smoothing: in [0, 1); applies to both cross entropies, not to the distillation.

    Returns:
        Scalars `ce`, `ensemble`, `distill` in nats, at least float32.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point [R, N, K], got {logits.dtype} {tuple(logits.shape)}"
        )
    num_resolutions, num_images, num_classes = logits.shape
    if labels.dtype != torch.int64 or labels.shape != (num_images,):
        raise ValueError(
            f"labels must be int64 [{num_images}], got {labels.dtype} {tuple(labels.shape)}"
        )
    if alpha.shape != (num_resolutions,):
        raise ValueError(f"alpha must be [{num_resolutions}], got shape {tuple(alpha.shape)}")
    if mode not in DISTILL_MODES:
        raise ValueError(f"mode must be one of {DISTILL_MODES}, got {mode!r}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if labels.device.type == "cpu" and num_images:
        low, high = labels.aminmax()
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"labels must be in [0, {num_classes}), got values from {low} to {high}"
            )
    return distillation_loss_reference(logits, labels, alpha, mode, label_smoothing)
