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

Backend "triton": one launch forward (one read of the logits) and one backward (one read, one
write), one program per image, then a sum over the [N, 3] terms and over the [N, R] gradients of
alpha in fixed order. Up to 1024 classes (2048 for R <= 4) all R rows of an image stay in
registers; above, each launch goes over them twice, and the second pass finds them in the L2 cache
if it is large enough. :func:`distillation_loss_and_gradients` is one launch for both: one read, one
write, 2 b R N K bytes.
Layout: logits [R, N, K] contiguous. With b bytes per logit, forward and backward move 3 b R N K
bytes: 7.7 MB for R = 5, N = 256, K = 1000 in 16 bits, 1.8 us at 4.3 TB/s.

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
from rsfast.kernels.common.checks import check_companion, check_kernel_dtype
from rsfast.kernels.distillation_loss.reference import (
    DISTILL_MODES,
    DistillationTerms,
    distillation_loss_reference,
    teacher_range,
)

__all__ = ["distillation_loss", "distillation_loss_and_gradients"]

MAX_RESOLUTIONS = 8  # of the Triton kernel: registers


@torch.library.custom_op("rsfast::distillation_loss_fwd", mutates_args=())
def _distillation_loss_fwd(
    logits: Tensor, labels: Tensor, alpha: Tensor, mode: str, label_smoothing: float
) -> Tensor:
    """[3] float32: ce, ensemble, distill."""
    terms = logits.new_empty(logits.shape[1], 3, dtype=torch.float32)
    teachers = teacher_range(mode, len(logits))
    load_kernels("distillation_loss.forward").launch(
        logits, labels, alpha, teachers, label_smoothing, terms=terms
    )
    return terms.sum(0)


@_distillation_loss_fwd.register_fake
def _(logits: Tensor, labels: Tensor, alpha: Tensor, mode: str, label_smoothing: float) -> Tensor:
    return logits.new_empty(3, dtype=torch.float32)


@torch.library.custom_op("rsfast::distillation_loss_bwd", mutates_args=())
def _distillation_loss_bwd(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """d(logits) and d(alpha) for the gradients `upstream` [3] of the three terms."""
    dlogits = torch.empty_like(logits)
    dalpha = logits.new_empty(logits.shape[1], len(logits), dtype=torch.float32)
    load_kernels("distillation_loss.forward").launch(
        logits,
        labels,
        alpha,
        teacher_range(mode, len(logits)),
        label_smoothing,
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
) -> tuple[Tensor, Tensor]:
    """[3 + R] float32, the terms and d(alpha), and d(logits), for `upstream` [3] or 1 each."""
    dlogits = torch.empty_like(logits)
    sums = logits.new_empty(logits.shape[1], 3 + len(logits), dtype=torch.float32)
    load_kernels("distillation_loss.forward").launch(
        logits,
        labels,
        alpha,
        teacher_range(mode, len(logits)),
        label_smoothing,
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
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(3 + len(logits), dtype=torch.float32), torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, alpha, ctx.mode, ctx.label_smoothing = inputs
    ctx.save_for_backward(logits, labels, alpha)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dlogits, dalpha = _distillation_loss_bwd(upstream, *saved, ctx.mode, ctx.label_smoothing)
    return dlogits, None, dalpha, None, None


_distillation_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str = "full",
    label_smoothing: float = 0.0,
    *,
    backend: str = "torch",
) -> DistillationTerms:
    """Cross entropy per resolution, ensemble cross entropy and distillation.

    Args:
        logits: [R, N, K] float16, bfloat16, float32 or float64; largest resolution first. For
            "triton" contiguous, not float64, R at most 8, N at least 1.
        labels: [N] int64 in [0, K); checked here on a CPU, by a device assertion on a GPU.
        alpha: [R] ensemble scores before the softmax; gets gradient from the ensemble term only.
            For "triton" float32.
        mode: which teachers teach whom, one of DISTILL_MODES; see :func:`teacher_weights`.
        label_smoothing: in [0, 1); applies to both cross entropies, not to the distillation.
        backend: "torch" for the reference, "triton" for the fused kernel.

    Returns:
        Scalars `ce`, `ensemble`, `distill` in nats, at least float32.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    _check(logits, labels, alpha, mode, label_smoothing)
    if check_backend(backend) == "torch":
        return distillation_loss_reference(logits, labels, alpha, mode, label_smoothing)
    _check_for_triton(logits, labels, alpha)
    terms = _distillation_loss_fwd(logits, labels, alpha, mode, label_smoothing)
    return DistillationTerms(*terms.unbind())


def distillation_loss_and_gradients(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str = "full",
    label_smoothing: float = 0.0,
    *,
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
    _check(logits, labels, alpha, mode, label_smoothing)
    logits, alpha = logits.detach(), alpha.detach()
    if check_backend(backend) == "torch":
        with torch.enable_grad():
            logits.requires_grad_()
            alpha.requires_grad_()
            terms = distillation_loss_reference(logits, labels, alpha, mode, label_smoothing)
            total = terms.ce + terms.ensemble + terms.distill
            upstream = None if scale is None else scale.to(total.dtype)
            dlogits, dalpha = torch.autograd.grad(total, (logits, alpha), upstream)
        return DistillationTerms(*(term.detach() for term in terms)), dlogits, dalpha
    _check_for_triton(logits, labels, alpha)
    sums, dlogits = _distillation_loss_fwd_bwd(
        None if scale is None else scale.expand(3), logits, labels, alpha, mode, label_smoothing
    )
    return DistillationTerms(*sums[:3].unbind()), dlogits, sums[3:]


def _check(
    logits: Tensor, labels: Tensor, alpha: Tensor, mode: str, label_smoothing: float
) -> None:
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
    # The compiler cannot trace a branch on values.
    if labels.device.type == "cpu" and num_images and not torch.compiler.is_compiling():
        low, high = labels.aminmax()
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"labels must be in [0, {num_classes}), got values from {low} to {high}"
            )


def _check_for_triton(logits: Tensor, labels: Tensor, alpha: Tensor) -> None:
    check_kernel_dtype("logits", logits)
    if not logits.is_contiguous() or not logits.numel() or len(logits) > MAX_RESOLUTIONS:
        raise ValueError(
            f"logits must be contiguous, not empty, with at most {MAX_RESOLUTIONS} resolutions, "
            f"got shape {tuple(logits.shape)}, strides {logits.stride()}"
        )
    check_companion("labels", labels, torch.int64, logits.device)
    check_companion("alpha", alpha, torch.float32, logits.device)
