"""A program for many rows: the kernel for few classes, where rows are pixels.

:mod:`rsfast.kernels.distillation_loss.op` holds the equations, and the kernel computes them as that
of :mod:`rsfast.kernels.distillation_loss.forward` does, for tiles [BLOCK_M, BLOCK_K] of rows with
all of their classes. There is one wave of programs, and each goes over every P-th tile: with a
program for each row most threads would have no class, and their sums would be as many as the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.common.launch import on_device_of
from rsfast.kernels.distillation_loss.forward import softmax_of_scalars
from rsfast.kernels.distillation_loss.tiles import num_programs, row_options, row_tile

__all__ = ["launch"]


@triton.jit
def _softmax(
    z,  # [BLOCK_M, BLOCK_K]
    mask_k,  # [1, BLOCK_K]
):
    """(x, p, S): z minus its maximum, its softmax, both 0 where masked, and sum exp(x) [BLOCK_M].

    Without a maximum of -inf: a row that is not loaded is 0.
    """
    top = tl.max(tl.where(mask_k, z, -float("inf")), 1)
    x = tl.where(mask_k, z - top[:, None], 0.0)
    exps = tl.where(mask_k, tl.exp(x), 0.0)
    total = tl.sum(exps, 1)
    return x, exps * (1.0 / total)[:, None], total


@triton.jit
def _tile_of_rows(
    rows,  # z_0 .. z_R, [BLOCK_M, BLOCK_K] each
    target,  # [BLOCK_M, BLOCK_K] target probabilities, 0 where masked
    counts,  # [BLOCK_M], whether a row is one, and counts
    totals,  # [BLOCK_M] each: ce, ensemble, distill / W of earlier tiles
    slopes,  # R times [BLOCK_M], <p_0 - target, x_r> of earlier tiles
    d_ce,  # upstream gradient of ce / N, [BLOCK_M, 1] or a scalar
    d_distill,  # upstream gradient of distill * W / N, like d_ce
    dz_ptr,  # where d(z_1) of the tile goes
    offs,  # [BLOCK_M, BLOCK_K], from there on
    stride_zr,  # M * K, elements from one level to the next
    mask_k,  # [1, BLOCK_K]
    mask,  # [BLOCK_M, BLOCK_K], of offs
    R: tl.constexpr,
    FIRST_TEACHER: tl.constexpr,
    LAST_TEACHER: tl.constexpr,
    WRITE_TERMS: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
):
    """Adds one tile to `totals` and `slopes` and writes its part of d(logits)."""
    x, probs, total_0 = _softmax(rows[0], mask_k)
    ensemble_error = tl.where(counts[:, None], probs - target, 0.0)
    ensemble = target * x
    ce = tl.zeros_like(target)
    distill = tl.zeros_like(target)
    mixed = tl.zeros_like(target)  # sum of p_t over the teachers of the next student
    mixed_x = tl.zeros_like(target)  # and of p_t x_t
    ce_logs = tl.zeros_like(total_0)
    # Relative to row 0, which cancels and leaves nearly nothing when the rows agree.
    distill_logs = tl.zeros_like(total_0)
    teacher_logs = tl.zeros_like(total_0)
    num_teachers = 0
    if (FIRST_TEACHER <= 0) and (LAST_TEACHER >= 0):
        mixed += probs
        mixed_x += probs * x
        num_teachers = num_teachers + 1

    new_slopes = ()
    for s in tl.static_range(1, R + 1):
        x, probs, total = _softmax(rows[s], mask_k)
        relative_log = tl.log(total * (1.0 / total_0))
        if WRITE_TERMS:
            ce += target * x
            ce_logs += tl.log(total)
            distill += mixed_x - mixed * x
            distill_logs += num_teachers * relative_log - teacher_logs
        if WRITE_GRADS:
            dz = d_ce * (probs - target) + d_distill * (num_teachers * probs - mixed)
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            dz_ptr += stride_zr
            new_slopes = new_slopes + (slopes[s - 1] + tl.sum(ensemble_error * x, 1),)
        if (s >= FIRST_TEACHER) and (s <= LAST_TEACHER):
            mixed += probs
            mixed_x += probs * x
            teacher_logs += relative_log
            num_teachers = num_teachers + 1

    if WRITE_TERMS:
        totals = (
            totals[0] + tl.where(counts, ce_logs - tl.sum(ce, 1), 0.0),
            totals[1] + tl.where(counts, tl.log(total_0) - tl.sum(ensemble, 1), 0.0),
            totals[2] + tl.where(counts, distill_logs + tl.sum(distill, 1), 0.0),
        )
    if WRITE_GRADS:
        slopes = new_slopes
    return totals, slopes


@triton.jit
def _distillation_loss_rows_kernel(
    logits_ptr,  # [R, M, K] float16, bfloat16 or float32, contiguous
    labels_ptr,  # [M] int64 or uint8
    alpha_ptr,  # [R] float32
    counted_ptr,  # int64, how many labels are not IGNORE_INDEX; None where all count
    upstream_ptr,  # gradients of (ce, ensemble, distill), float32; None if all are 1
    stride_upstream,
    terms_ptr,  # [P, 3] float32 for P programs, fully overwritten; None without WRITE_TERMS
    stride_terms_p,
    dlogits_ptr,  # [R, M, K] like logits, fully overwritten; None without WRITE_GRADS
    dalpha_ptr,  # [P, R] float32, fully overwritten; None without WRITE_GRADS
    stride_dalpha_p,
    num_rows,  # M
    hit_target,  # target probability of the labelled class, 1 - smoothing + smoothing / K
    miss_target,  # and of every other, smoothing / K
    teacher_weight,  # W of every pair of teacher and student
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
    FIRST_TEACHER: tl.constexpr,  # teachers of student s: FIRST .. LAST, those below s
    LAST_TEACHER: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,  # label of rows that do not count; not used without HAS_IGNORE
    WRITE_TERMS: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
):
    program = tl.program_id(0)
    stride_zr = num_rows.to(tl.int64) * K
    shares = softmax_of_scalars(alpha_ptr, R)
    num_counted = num_rows
    if HAS_IGNORE:
        num_counted = tl.maximum(tl.load(counted_ptr), 1)
    d_ce = 0.0
    d_ensemble = 0.0
    d_distill = 0.0
    if WRITE_GRADS:
        d_ce = 1.0 / num_counted
        d_ensemble = d_ce
        d_distill = d_ce * teacher_weight
        if upstream_ptr is not None:
            d_ce *= tl.load(upstream_ptr)
            d_ensemble *= tl.load(upstream_ptr + stride_upstream)
            d_distill *= tl.load(upstream_ptr + 2 * stride_upstream)

    offs_k = tl.arange(0, BLOCK_K)[None, :]
    mask_k = offs_k < K
    offs = tl.arange(0, BLOCK_M)[:, None] * K + offs_k  # within a tile
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    totals = (zeros, zeros, zeros)
    slopes = (zeros,) * R
    step = tl.num_programs(0) * BLOCK_M
    for first in range(program * BLOCK_M, num_rows, step):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < num_rows
        label = tl.load(labels_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
        counts = mask_m
        if HAS_IGNORE:
            counts = mask_m & (label != IGNORE_INDEX)
            label = tl.where(counts, label, 0)
        tl.device_assert((label >= 0) & (label < K), "labels must be in [0, K)")
        label = label.to(tl.int32)
        tile_ptr = logits_ptr + tl.cast(first, tl.int64) * K
        rows = ()
        z0 = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for r in tl.static_range(R):
            # Rows that do not count are 0 without being read.
            z = tl.load(tile_ptr + offs, mask=counts[:, None] & mask_k, other=0.0).to(tl.float32)
            tile_ptr += stride_zr
            z0 += shares[r] * z
            rows = rows + (z,)
        target = tl.where(offs_k == label[:, None], hit_target, miss_target)
        target = tl.where(mask_k, target, 0.0)
        d_ce_of_rows = d_ce
        d_distill_of_rows = d_distill
        if HAS_IGNORE:
            d_ce_of_rows = tl.where(counts, d_ce, 0.0)[:, None]
            d_distill_of_rows = tl.where(counts, d_distill, 0.0)[:, None]
        totals, slopes = _tile_of_rows(
            (z0,) + rows,
            target,
            counts,
            totals,
            slopes,
            d_ce_of_rows,
            d_distill_of_rows,
            dlogits_ptr + tl.cast(first, tl.int64) * K if WRITE_GRADS else None,
            offs,
            stride_zr,
            mask_k,
            mask_m[:, None] & mask_k,
            R,
            FIRST_TEACHER,
            LAST_TEACHER,
            WRITE_TERMS,
            WRITE_GRADS,
        )

    if WRITE_TERMS:
        terms_ptr += program * stride_terms_p
        tl.store(terms_ptr, tl.sum(totals[0], 0) / num_counted)
        tl.store(terms_ptr + 1, tl.sum(totals[1], 0) / num_counted)
        tl.store(terms_ptr + 2, tl.sum(totals[2], 0) * teacher_weight / num_counted)
    if WRITE_GRADS:
        sums = ()
        mean_slope = 0.0
        for r in tl.static_range(R):
            sums = sums + (tl.sum(slopes[r], 0),)
            mean_slope += shares[r] * sums[r]
        for r in tl.static_range(R):
            dalpha = d_ensemble * shares[r] * (sums[r] - mean_slope)
            tl.store(dalpha_ptr + program * stride_dalpha_p + r, dalpha)


def launch(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    teachers: tuple[int, int, float],
    label_smoothing: float,
    *,
    ignore_index: int | None = None,
    counted: Tensor | None = None,
    terms: Tensor | None = None,
    upstream: Tensor | None = None,
    dlogits: Tensor | None = None,
    dalpha: Tensor | None = None,
) -> None:
    """As that of :mod:`rsfast.kernels.distillation_loss.forward`.

    `terms` are [P, 3] and `dalpha` [P, R] for the P programs of :func:`tiles.num_programs`.
    """
    num_resolutions, num_rows, num_classes = logits.shape
    first_teacher, last_teacher, teacher_weight = teachers
    block_m, block_k = row_tile(num_resolutions, num_classes)
    miss_target = label_smoothing / num_classes
    with on_device_of(logits):
        _distillation_loss_rows_kernel[(num_programs(num_resolutions, num_rows, num_classes),)](
            logits,
            labels,
            alpha,
            counted,
            upstream,
            0 if upstream is None else upstream.stride(0),
            terms,
            0 if terms is None else terms.stride(0),
            dlogits,
            dalpha,
            0 if dalpha is None else dalpha.stride(0),
            num_rows,
            1.0 - label_smoothing + miss_target,
            miss_target,
            teacher_weight,
            R=num_resolutions,
            K=num_classes,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            FIRST_TEACHER=first_teacher,
            LAST_TEACHER=last_teacher,
            HAS_IGNORE=ignore_index is not None,
            IGNORE_INDEX=ignore_index,
            WRITE_TERMS=terms is not None,
            WRITE_GRADS=dlogits is not None,
            **row_options(),
        )
