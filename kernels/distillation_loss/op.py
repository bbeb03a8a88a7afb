"""Cross entropy, ensemble cross entropy and distillation between R resolutions.

With p_s the softmax of z_s (s = 1..R, largest first), a = softmax(alpha), z_0 = sum_s a_s z_s of
detached z_s, and p_0 its softmax (RS-Net paper, equations 1 to 10):

    ce       = sum_s CE(z_s, y)
    ensemble = CE(z_0, y)                                 gradient to alpha only
    distill  = sum_s sum_{t<s} W[s, t] KL(p_t || p_s)     teachers p_t detached

Rows that have `ignore_index` for a label do not count. Rows are images, or pixels of them.

The target y is the one-hot label of the image. Where images are mixed (Mixup, CutMix) it is that of
two labels, share onehot(labels) + (1 - share) onehot(partner_labels). Label smoothing goes on top;
it is linear in the target, so that smoothing the mixture and mixing the smoothed are the same.

W is the table of :func:`teacher_weights`. The inner sum needs no R^2 KL terms: with H the entropy
and P_s = sum_t W[s, t] p_t,

    sum_t W[s, t] KL(p_t || p_s) = - sum_t W[s, t] H(p_t) - sum_c P_s[c] log p_s[c]

    d distill / d z_s   = (sum_t W[s, t]) p_s - P_s
    d ensemble / d a_k  = <p_0 - y, z_k>, through the softmax of alpha

All terms are averaged over the N images that count and computed in float32 (float64 for float64
logits).

Backend "triton": one launch forward (one read of the logits) and one backward (one read, one
write), one program per image, then a sum over the [N, 3] terms and over the [N, R] gradients of
alpha in fixed order. Up to 1024 classes (2048 for R <= 4) all R rows of an image stay in
registers; above, each launch goes over them twice, and the second pass finds them in the L2 cache
if it is large enough. :func:`distillation_loss_and_gradients` is one launch for both: one read, one
write, 2 b R N K bytes.
Layout: logits [R, N, K] contiguous. With b bytes per logit, forward and backward move 3 b R N K
bytes: 7.7 MB for R = 5, N = 256, K = 1000 in 16 bits, 1.8 us at 4.3 TB/s. Labels are 8 bytes per
image and launch, mixed ones 20.

From 4096 rows of few classes on (at most 256; for R >= 4 and unless K is a multiple of four, 127),
rows are pixels, and one wave of programs goes over tiles of several: 396 partial sums, not N. Which
rows count is looked at on the device only, and the logits of the others are not read. A pixel of
R = 3 levels with K = 40 classes in float32 moves 1440 bytes forward and backward, and 3 or 4 more
with an 8-bit label: 1.43 GB for 8 images of 352 x 352 pixels, 0.33 ms at 4.3 TB/s.

Under autograd, the backward computes d(logits) from the saved logits instead of scaling a d(logits)
that the forward wrote. The upstream gradient is not known on the host then, and may differ per
term, so that a stored one has to be read and scaled into a second tensor (4 b R N K; autograd may
hold the first). It would also be rounded before it is scaled: in float16, gradients of the order
1 / (N K) lose their bits and loss scaling cannot bring them back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsfast.kernels.common.backend import check_backend, load_kernels
from rsfast.kernels.distillation_loss.checks import check_arguments, check_for_triton
from rsfast.kernels.distillation_loss.reference import (
    DistillationTerms,
    distillation_loss_reference,
    teacher_range,
)

__all__ = ["distillation_loss", "distillation_loss_and_gradients"]


@torch.library.custom_op("rsfast::distillation_loss_fwd", mutates_args=())
def _distillation_loss_fwd(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str,
    label_smoothing: float,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """[3] float32: ce, ensemble, distill."""
    kernels = load_kernels("distillation_loss.launch")
    terms = logits.new_empty(kernels.num_sums(logits, partner_labels), 3, dtype=torch.float32)
    kernels.launch(
        logits,
        labels,
        alpha,
        teacher_range(mode, len(logits)),
        label_smoothing,
        partner_labels=partner_labels,
        share=share,
        ignore_index=ignore_index,
        terms=terms,
    )
    return terms.sum(0)


@_distillation_loss_fwd.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str,
    label_smoothing: float,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    return logits.new_empty(3, dtype=torch.float32)


@torch.library.custom_op("rsfast::distillation_loss_bwd", mutates_args=())
def _distillation_loss_bwd(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str,
    label_smoothing: float,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """d(logits) and d(alpha) for the gradients `upstream` [3] of the three terms."""
    kernels = load_kernels("distillation_loss.launch")
    num_sums = kernels.num_sums(logits, partner_labels)
    dlogits = torch.empty_like(logits)
    dalpha = logits.new_empty(num_sums, len(logits), dtype=torch.float32)
    kernels.launch(
        logits,
        labels,
        alpha,
        teacher_range(mode, len(logits)),
        label_smoothing,
        partner_labels=partner_labels,
        share=share,
        ignore_index=ignore_index,
        upstream=upstream,
        dlogits=dlogits,
        dalpha=dalpha,
    )
    return dlogits, dalpha.sum(0)


@_distillation_loss_bwd.register_fake
def _(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str,
    label_smoothing: float,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty_like(alpha)


@torch.library.custom_op("rsfast::distillation_loss_fwd_bwd", mutates_args=())
def _distillation_loss_fwd_bwd(
    upstream: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str,
    label_smoothing: float,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """[3 + R] float32, the terms and d(alpha), and d(logits), for `upstream` [3] or 1 each."""
    kernels = load_kernels("distillation_loss.launch")
    num_sums = kernels.num_sums(logits, partner_labels)
    dlogits = torch.empty_like(logits)
    sums = logits.new_empty(num_sums, 3 + len(logits), dtype=torch.float32)
    kernels.launch(
        logits,
        labels,
        alpha,
        teacher_range(mode, len(logits)),
        label_smoothing,
        partner_labels=partner_labels,
        share=share,
        ignore_index=ignore_index,
        terms=sums[:, :3],
        upstream=upstream,
        dlogits=dlogits,
        dalpha=sums[:, 3:],
    )
    return sums.sum(0), dlogits


@_distillation_loss_fwd_bwd.register_fake
def _(
    upstream: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str,
    label_smoothing: float,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(3 + len(logits), dtype=torch.float32), torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, alpha, ctx.mode, ctx.label_smoothing, *mix, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, labels, alpha, *mix)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *saved, partner_labels, share = ctx.saved_tensors
    dlogits, dalpha = _distillation_loss_bwd(
        upstream, *saved, ctx.mode, ctx.label_smoothing, partner_labels, share, ctx.ignore_index
    )
    return dlogits, None, dalpha, None, None, None, None, None


_distillation_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str = "full",
    label_smoothing: float = 0.0,
    *,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
    backend: str = "torch",
) -> DistillationTerms:
    """Cross entropy per resolution, ensemble cross entropy and distillation.

    Args:
        logits: [R, N, K] float16, bfloat16, float32 or float64; largest resolution first. For
            "triton" contiguous, not float64, R at most 8, N at least 1.
        labels: [N] int64 or uint8 in [0, K), or `ignore_index`; checked here on a CPU, by a device
            assertion on a GPU.
        alpha: [R] ensemble scores before the softmax; gets gradient from the ensemble term only.
            For "triton" float32.
        mode: which teachers teach whom, one of DISTILL_MODES; see :func:`teacher_weights`.
        label_smoothing: in [0, 1); applies to both cross entropies, not to the distillation.
        partner_labels: [N] int64 in [0, K), checked like `labels`: class of the image that each is
            mixed with, for both cross entropies; together with `share`, or neither.
        share: [N] float32 in [0, 1], weight of the image's own label, the partner's is 1 - share;
            gets no gradient. Its range is checked on a CPU only.
        ignore_index: the label of rows that do not count: no loss and no gradient, and the mean is
            over the others. Where no row counts, loss and gradients are 0. For uint8 labels in
            [0, 256). Not for mixed images.
        backend: "torch" for the reference, "triton" for the fused kernel.

    Returns:
        Scalars `ce`, `ensemble`, `distill` in nats, at least float32.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    check_arguments(
        logits, labels, alpha, mode, label_smoothing, partner_labels, share, ignore_index
    )
    if check_backend(backend) == "torch":
        return distillation_loss_reference(
            logits,
            labels,
            alpha,
            mode,
            label_smoothing,
            partner_labels=partner_labels,
            share=share,
            ignore_index=ignore_index,
        )
    check_for_triton(logits, labels, alpha, partner_labels, share)
    terms = _distillation_loss_fwd(
        logits, labels, alpha, mode, label_smoothing, partner_labels, share, ignore_index
    )
    return DistillationTerms(*terms.unbind())


def distillation_loss_and_gradients(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str = "full",
    label_smoothing: float = 0.0,
    *,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    ignore_index: int | None = None,
    scale: Tensor | None = None,
    backend: str = "torch",
) -> tuple[DistillationTerms, Tensor, Tensor]:
    """The loss and its gradients at once, for a caller that runs the backward itself.

    With "triton" it is one pass over the logits: one read, one write, in one launch, and one sum
    over [N, 3 + R] numbers. Go on with `torch.autograd.backward(logits, dlogits)`.

    Args:
        logits: as in :func:`distillation_loss`; whether it requires gradients does not matter.
        labels: as there.
        alpha: as there.
        mode: as there.
        label_smoothing: as there.
        partner_labels: as there.
        share: as there.
        ignore_index: as there.
        scale: scalar float32 on the device of `logits`, the upstream gradient of the three terms
            (the loss scale of float16); 1 by default.
        backend: as there.

    Returns:
        The terms, not scaled; d(logits) [R, N, K] in the dtype of `logits` and d(alpha) [R] of
        `scale` times their sum.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    if scale is not None and (
        scale.shape != () or scale.dtype != torch.float32 or scale.device != logits.device
    ):
        raise ValueError(
            f"scale must be a scalar float32 on {logits.device}, "
            f"got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
        )
    check_arguments(
        logits, labels, alpha, mode, label_smoothing, partner_labels, share, ignore_index
    )
    logits, alpha = logits.detach(), alpha.detach()
    if check_backend(backend) == "torch":
        with torch.enable_grad():
            logits.requires_grad_()
            alpha.requires_grad_()
            terms = distillation_loss_reference(
                logits,
                labels,
                alpha,
                mode,
                label_smoothing,
                partner_labels=partner_labels,
                share=share,
                ignore_index=ignore_index,
            )
            total = terms.ce + terms.ensemble + terms.distill
            upstream = None if scale is None else scale.to(total.dtype)
            dlogits, dalpha = torch.autograd.grad(total, (logits, alpha), upstream)
        return DistillationTerms(*(term.detach() for term in terms)), dlogits, dalpha
    check_for_triton(logits, labels, alpha, partner_labels, share)
    sums, dlogits = _distillation_loss_fwd_bwd(
        None if scale is None else scale.expand(3),
        logits,
        labels,
        alpha,
        mode,
        label_smoothing,
        partner_labels,
        share,
        ignore_index,
    )
    return DistillationTerms(*sums[:3].unbind()), dlogits, sums[3:]
