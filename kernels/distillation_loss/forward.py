"""A program for each row: the kernel for few rows, and for many classes.

:mod:`rsfast.kernels.distillation_loss.op` holds the equations.

With x_t = z_t - max z_t and S_t = sum exp(x_t), log p_t = x_t - log S_t. As probabilities add up
to 1, the logarithms leave the sums over K, and with them most of the rounding:

    CE(z_s, y)     = log S_s - <target, x_s>      also for a target that is mixed from two labels
    KL(p_t || p_s) = <p_t, x_t - x_s> - log S_t + log S_s

Only :mod:`rsfast.kernels.distillation_loss.launch` imports this module, and that one only once the
kernel is asked for: everything else works without Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.launch import on_device_of
from rsfast.kernels.distillation_loss.tiles import options, tile

__all__ = ["launch", "softmax_of_scalars"]


@triton.jit
def softmax_of_scalars(
    alpha_ptr,  # [R] float32
    R: tl.constexpr,
):
    """R scalars that add up to 1."""
    top = tl.load(alpha_ptr)
    for r in tl.static_range(1, R):
        top = tl.maximum(top, tl.load(alpha_ptr + r))
    total = tl.exp(tl.load(alpha_ptr) - top)
    for r in tl.static_range(1, R):
        total += tl.exp(tl.load(alpha_ptr + r) - top)
    shares = ()
    for r in tl.static_range(R):
        shares = shares + (tl.exp(tl.load(alpha_ptr + r) - top) / total,)
    return shares


@triton.jit
def _load_rows(
    logits_ptr,  # first logit of the image in row 1
    stride_zr,  # N * K, elements from one row to the next
    shares,  # R scalars, softmax(alpha)
    offs_k,
    mask_k,
    R: tl.constexpr,
):
    """(z_0, z_1 .. z_R) in float32, -inf where masked."""
    rows = ()
    z0 = tl.zeros_like(offs_k).to(tl.float32)
    for r in tl.static_range(R):
        z = tl.load(logits_ptr + r * stride_zr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        z0 += shares[r] * z
        rows = rows + (tl.where(mask_k, z, -float("inf")),)
    return (tl.where(mask_k, z0, -float("inf")),) + rows


@triton.jit
def _fold_maxima_and_sums(
    rows,  # z_0 .. z_R
    maxima,  # R + 1 scalars, largest logit of each row in earlier blocks
    sums,  # R + 1 scalars, sums of exp(z - maximum) over earlier blocks
    R: tl.constexpr,
):
    """`maxima` and `sums` with one more block in them."""
    new_maxima = ()
    new_sums = ()
    for t in tl.static_range(R + 1):
        top = tl.maximum(maxima[t], tl.max(rows[t], 0))
        block_sum = tl.sum(tl.exp(rows[t] - top), 0)
        new_maxima = new_maxima + (top,)
        new_sums = new_sums + (sums[t] * tl.exp(maxima[t] - top) + block_sum,)
    return new_maxima, new_sums


@triton.jit
def _reciprocals(
    sums,  # R + 1 scalars
    R: tl.constexpr,
):
    reciprocals = ()
    for t in tl.static_range(R + 1):
        reciprocals = reciprocals + (1.0 / sums[t],)
    return reciprocals


@triton.jit
def _block_of_target(
    label,  # class of the image
    partner,  # class of the image that it is mixed with; not used without HAS_MIX
    share,  # weight of `label`, the other's is 1 - share
    hit_target,  # as in _distillation_loss_kernel
    miss_target,
    offs_k,
    mask_k,
    HAS_MIX: tl.constexpr,
):
    """[BLOCK_K] target probabilities, 0 where masked."""
    target = tl.where(offs_k == label, hit_target, miss_target)
    if HAS_MIX:  # of two smoothed labels: smoothing is linear; a share of 1 leaves every bit
        other = tl.where(offs_k == partner, hit_target, miss_target)
        target = share * target + (1.0 - share) * other
    return tl.where(mask_k, target, 0.0)


@triton.jit
def _emit_block(
    rows,  # z_0 .. z_R
    maxima,  # R + 1 scalars
    scales,  # R + 1 scalars, so that p_t = exp(x_t) * scales[t] with x_t = z_t - maxima[t]
    totals,  # [BLOCK_K] each: ce, ensemble, distill / W so far, with x_t in the place of log p_t
    slopes,  # R scalars, <p_0 - target, x_r> of earlier blocks
    target,  # [BLOCK_K] of _block_of_target
    d_ce,  # upstream gradient of ce / N
    d_distill,  # upstream gradient of distill * W / N
    dlogits_ptr,  # like logits_ptr in _load_rows
    stride_zr,
    offs_k,
    mask_k,
    R: tl.constexpr,
    FIRST_TEACHER: tl.constexpr,
    LAST_TEACHER: tl.constexpr,
    WRITE_TERMS: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
):
    """Adds one block to `totals` and `slopes` and writes its part of d(logits).

    Masked lanes have p = x = 0, never 0 * -inf.
    """
    zeros = tl.zeros_like(target)
    ce = zeros
    distill = zeros
    mixed = zeros  # sum of p_t over the teachers of the next student
    mixed_x = zeros  # and of p_t x_t
    num_teachers = 0
    x = tl.where(mask_k, rows[0] - maxima[0], 0.0)
    probs = tl.where(mask_k, tl.exp(x) * scales[0], 0.0)
    ensemble_error = probs - target
    ensemble = target * x
    if (FIRST_TEACHER <= 0) and (LAST_TEACHER >= 0):
        mixed += probs
        mixed_x += probs * x
        num_teachers = num_teachers + 1

    new_slopes = ()
    for s in tl.static_range(1, R + 1):
        x = tl.where(mask_k, rows[s] - maxima[s], 0.0)
        probs = tl.where(mask_k, tl.exp(x) * scales[s], 0.0)
        if WRITE_TERMS:
            ce += target * x
            distill += mixed_x - mixed * x
        if WRITE_GRADS:
            dz = d_ce * (probs - target) + d_distill * (num_teachers * probs - mixed)
            dz_ptrs = dlogits_ptr + (s - 1) * stride_zr + offs_k
            tl.store(dz_ptrs, dz.to(dlogits_ptr.dtype.element_ty), mask=mask_k)
            new_slopes = new_slopes + (slopes[s - 1] + tl.sum(ensemble_error * x, 0),)
        if (s >= FIRST_TEACHER) and (s <= LAST_TEACHER):
            mixed += probs
            mixed_x += probs * x
            num_teachers = num_teachers + 1

    if WRITE_TERMS:
        totals = (
            totals[0] - ce,
            totals[1] - ensemble,
            totals[2] + distill,
        )
    if WRITE_GRADS:
        slopes = new_slopes
    return totals, slopes


@triton.jit
def _distillation_loss_kernel(
    logits_ptr,  # [R, N, K] float16, bfloat16 or float32, contiguous; N programs, one per image
    labels_ptr,  # [N] int64 or uint8
    alpha_ptr,  # [R] float32
    partner_labels_ptr,  # [N] int64, None without HAS_MIX
    share_ptr,  # [N] float32, weight of the image's own label; None without HAS_MIX
    counted_ptr,  # int64, how many labels are not IGNORE_INDEX; None where all count
    upstream_ptr,  # gradients of (ce, ensemble, distill), float32; None if all are 1
    stride_upstream,
    terms_ptr,  # [N, 3] float32, fully overwritten; None without WRITE_TERMS
    stride_terms_n,
    dlogits_ptr,  # [R, N, K] like logits, fully overwritten; None without WRITE_GRADS
    dalpha_ptr,  # [N, R] float32, fully overwritten; None without WRITE_GRADS
    stride_dalpha_n,
    hit_target,  # target probability of the labelled class, 1 - smoothing + smoothing / K
    miss_target,  # and of every other, smoothing / K
    teacher_weight,  # W of every pair of teacher and student
    R: tl.constexpr,
    K: tl.constexpr,  # constexpr for vector loads: rows of 1000 logits are 8, not 16, apart
    BLOCK_K: tl.constexpr,
    FIRST_TEACHER: tl.constexpr,  # teachers of student s: FIRST .. LAST, those below s
    LAST_TEACHER: tl.constexpr,
    HAS_MIX: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,  # label of images that do not count; not used without HAS_IGNORE
    WRITE_TERMS: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    num_images = tl.num_programs(0)
    stride_zr = num_images.to(tl.int64) * K
    logits_ptr += image * K
    label = tl.load(labels_ptr + image).to(tl.int64)
    num_counted = num_images
    if HAS_IGNORE:
        counts = label != IGNORE_INDEX
        label = tl.where(counts, label, 0)
        num_counted = tl.maximum(tl.load(counted_ptr), 1)
    tl.device_assert((label >= 0) & (label < K), "labels must be in [0, K)")
    partner = label
    share = 1.0
    if HAS_MIX:
        partner = tl.load(partner_labels_ptr + image)
        tl.device_assert((partner >= 0) & (partner < K), "partner_labels must be in [0, K)")
        share = tl.load(share_ptr + image)
    shares = softmax_of_scalars(alpha_ptr, R)

    d_ce = 0.0
    d_ensemble = 0.0
    d_distill = 0.0
    if WRITE_GRADS:
        dlogits_ptr += image * K
        d_ce = 1.0 / num_counted
        if HAS_IGNORE:
            d_ce = tl.where(counts, d_ce, 0.0)
        d_ensemble = d_ce
        d_distill = d_ce * teacher_weight
        if upstream_ptr is not None:
            d_ce *= tl.load(upstream_ptr)
            d_ensemble *= tl.load(upstream_ptr + stride_upstream)
            d_distill *= tl.load(upstream_ptr + 2 * stride_upstream)

    maxima = (-float("inf"),) * (R + 1)
    sums = (0.0,) * (R + 1)
    zeros = tl.zeros((BLOCK_K,), tl.float32)
    totals = (zeros, zeros, zeros)
    slopes = (0.0,) * R
    if K <= BLOCK_K:  # read once, then in registers
        offs_k = tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        rows = _load_rows(logits_ptr, stride_zr, shares, offs_k, mask_k, R)
        maxima, sums = _fold_maxima_and_sums(rows, maxima, sums, R)
        scales = _reciprocals(sums, R)
        target = _block_of_target(
            label, partner, share, hit_target, miss_target, offs_k, mask_k, HAS_MIX
        )
        totals, slopes = _emit_block(
            rows,
            maxima,
            scales,
            totals,
            slopes,
            target,
            d_ce,
            d_distill,
            dlogits_ptr,
            stride_zr,
            offs_k,
            mask_k,
            R,
            FIRST_TEACHER,
            LAST_TEACHER,
            WRITE_TERMS,
            WRITE_GRADS,
        )
    else:  # read twice, the second time from the L2 cache where it holds the rows of the programs
        for start in range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            rows = _load_rows(logits_ptr, stride_zr, shares, offs_k, offs_k < K, R)
            maxima, sums = _fold_maxima_and_sums(rows, maxima, sums, R)
        scales = _reciprocals(sums, R)
        for start in range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            rows = _load_rows(logits_ptr, stride_zr, shares, offs_k, mask_k, R)
            target = _block_of_target(
                label, partner, share, hit_target, miss_target, offs_k, mask_k, HAS_MIX
            )
            totals, slopes = _emit_block(
                rows,
                maxima,
                scales,
                totals,
                slopes,
                target,
                d_ce,
                d_distill,
                dlogits_ptr,
                stride_zr,
                offs_k,
                mask_k,
                R,
                FIRST_TEACHER,
                LAST_TEACHER,
                WRITE_TERMS,
                WRITE_GRADS,
            )

    if WRITE_TERMS:
        # Each sum of logarithms is added once: it is small beside the total. For the distillation
        # relative to row 0, which cancels and leaves nearly nothing when the rows agree.
        ce_logs = 0.0
        distill_logs = 0.0
        teacher_logs = 0.0
        num_teachers = 0
        if (FIRST_TEACHER <= 0) and (LAST_TEACHER >= 0):
            num_teachers = num_teachers + 1
        for s in tl.static_range(1, R + 1):
            ce_logs += tl.log(sums[s])
            relative_log = tl.log(sums[s] * scales[0])
            distill_logs += num_teachers * relative_log - teacher_logs
            if (s >= FIRST_TEACHER) and (s <= LAST_TEACHER):
                num_teachers = num_teachers + 1
                teacher_logs += relative_log
        ce = tl.sum(totals[0], 0) + ce_logs
        ensemble = tl.sum(totals[1], 0) + tl.log(sums[0])
        distill = (tl.sum(totals[2], 0) + distill_logs) * teacher_weight
        if HAS_IGNORE:
            ce = tl.where(counts, ce, 0.0)
            ensemble = tl.where(counts, ensemble, 0.0)
            distill = tl.where(counts, distill, 0.0)
        terms_ptr += image * stride_terms_n
        tl.store(terms_ptr, ce / num_counted)
        tl.store(terms_ptr + 1, ensemble / num_counted)
        tl.store(terms_ptr + 2, distill / num_counted)
    if WRITE_GRADS:
        mean_slope = 0.0
        for r in tl.static_range(R):
            mean_slope += shares[r] * slopes[r]
        for r in tl.static_range(R):
            dalpha = d_ensemble * shares[r] * (slopes[r] - mean_slope)
            tl.store(dalpha_ptr + image * stride_dalpha_n + r, dalpha)


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
    counted: Tensor | None = None,
    terms: Tensor | None = None,
    upstream: Tensor | None = None,
    dlogits: Tensor | None = None,
    dalpha: Tensor | None = None,
) -> None:
    """Fills `terms` [N, 3], or `dlogits` [R, N, K] and `dalpha` [N, R] for `upstream` [3], or all.

    `teachers` are first teacher, last teacher and the weight of every pair; see the kernel for the
    other arguments. Sums over N are left to the caller.
    """
    num_resolutions, num_images, num_classes = logits.shape
    first_teacher, last_teacher, teacher_weight = teachers
    block_k, num_warps = tile(num_resolutions, num_classes)
    miss_target = label_smoothing / num_classes
    with on_device_of(logits):
        _distillation_loss_kernel[(num_images,)](
            logits,
            labels,
            alpha,
            partner_labels,
            share,
            counted,
            upstream,
            0 if upstream is None else upstream.stride(0),
            terms,
            0 if terms is None else terms.stride(0),
            dlogits,
            dalpha,
            0 if dalpha is None else dalpha.stride(0),
            1.0 - label_smoothing + miss_target,
            miss_target,
            teacher_weight,
            R=num_resolutions,
            K=num_classes,
            BLOCK_K=block_k,
            FIRST_TEACHER=first_teacher,
            LAST_TEACHER=last_teacher,
            HAS_MIX=partner_labels is not None,
            HAS_IGNORE=ignore_index is not None,
            IGNORE_INDEX=ignore_index,
            WRITE_TERMS=terms is not None,
            WRITE_GRADS=dlogits is not None,
            **options(num_warps),
        )
