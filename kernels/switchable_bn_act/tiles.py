"""What both directions of the Triton kernels of switchable batch norm have in common."""

from __future__ import annotations

import triton
import triton.language as tl

from rsfast.kernels.common.launch import OPTIONS

__all__ = [
    "BACKWARD_PROGRAMS",
    "FINALIZE_OPTIONS",
    "FORWARD_PROGRAMS",
    "activate",
    "finalize_tile",
    "gradient_before",
    "keeps_gradient",
    "load_affine",
    "load_invstd",
    "load_origin",
    "mask_tile",
    "merge_lanes",
    "merge_shares",
]

# Of the kernels that stream, programs that fit on a multiprocessor, by registers: those of the
# backward read up to three tensors.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4, 3

# Left alone, ptxas spills to fit more programs onto a multiprocessor; here there are few.
FINALIZE_OPTIONS = {**OPTIONS, "maxnreg": 255}


def finalize_tile(num_channels: int) -> dict[str, int]:
    """BLOCK_K shares and BLOCK_C channels of the kernels that add up partial results.

    Few channels come with many shares, and need narrow tiles to occupy more than a few programs.
    """
    block_k, block_c = (64, 16) if num_channels < 512 else (16, 64)
    return {"BLOCK_K": block_k, "BLOCK_C": block_c}


@triton.jit
def load_origin(
    x_ptr,  # [M, C]
    first,  # int64, row of a level
    count,  # rows of the level
    cols,
    C: tl.constexpr,
):
    """[BLOCK_C] a value near the level's mean: the median of its first, middle and last row."""
    x_ptr += first * C + cols
    a = tl.load(x_ptr, mask=cols < C, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + (count // 2).to(tl.int64) * C, mask=cols < C, other=0.0).to(tl.float32)
    c = tl.load(x_ptr + (count - 1).to(tl.int64) * C, mask=cols < C, other=0.0).to(tl.float32)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def merge_lanes(
    mean,  # [LANES, BLOCK_C] means, m2 sums of squared deviations from them
    m2,
    count,  # [LANES, 1] rows behind them; lane 0 has some, a lane without any has m2 = 0
):
    """(mean, m2) [BLOCK_C] of all lanes together."""
    lane = tl.arange(0, mean.shape[0])[:, None]
    total = tl.sum(count, 0)
    # Relative to one lane, so that a large mean does not cost the digits of its differences; twice,
    # for when that lane is an outlier.
    center = tl.sum(tl.where(lane == 0, mean, 0.0), 0)
    for _ in range(2):
        deviation = tl.where(count > 0, mean - center[None, :], 0.0)
        center += tl.sum(deviation * count, 0) / total
    deviation = tl.where(count > 0, mean - center[None, :], 0.0)
    return center, tl.sum(m2 + deviation * deviation * count, 0)


@triton.jit
def merge_shares(
    partial_ptr,  # [2, shares, C] float32: mean and m2, shares of all levels
    stride_partial,  # shares * C
    first_share,  # of a level
    rows,  # of the level
    share_rows,
    cols,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of the tiles that the shares consist of
    BLOCK_K: tl.constexpr,  # shares
    BLOCK_C: tl.constexpr,
):
    """(mean, m2) [BLOCK_C] of the level."""
    lanes = tl.arange(0, BLOCK_K)[:, None]
    shares = tl.cdiv(rows, share_rows)
    tiles = tl.cdiv(rows, BLOCK_M)
    mean = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_K, 1), tl.float32)
    for start in range(0, shares, BLOCK_K):
        index = start + lanes
        mask = (index < shares) & (cols < C)[None, :]
        ptrs = partial_ptr + (first_share + index).to(tl.int64) * C + cols[None, :]
        new_count = tl.cdiv(tiles - index, shares) * BLOCK_M
        # The last tile may lack rows.
        new_count -= tl.where(index == (tiles - 1) % shares, tiles * BLOCK_M - rows, 0)
        new_count = tl.where(index < shares, new_count, 0).to(tl.float32)
        delta = tl.load(ptrs, mask=mask, other=0.0)
        delta = tl.where(mask, delta - mean, 0.0)
        share = new_count / tl.maximum(count + new_count, 1.0)
        mean += delta * share
        m2 += tl.load(ptrs + stride_partial, mask=mask, other=0.0)
        m2 += delta * delta * (count * share)
        count += new_count
    return merge_lanes(mean, m2, count)


@triton.jit
def load_invstd(
    var_ptr,  # [L or B, C] float32, biased
    row,
    cols,
    eps,
    C: tl.constexpr,
):
    """[BLOCK_C] 1 / deviation."""
    var = tl.load(var_ptr + row * C + cols, mask=cols < C, other=1.0)
    return 1.0 / tl.sqrt_rn(var + eps)


@triton.jit
def load_affine(
    mean_ptr,  # [L or B, C] float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    row,  # of mean and var
    bank,
    cols,
    eps,
    C: tl.constexpr,
):
    """(mean, gamma / deviation, beta, 1 / deviation) [BLOCK_C]."""
    inside = cols < C
    mean = tl.load(mean_ptr + row * C + cols, mask=inside, other=0.0)
    gamma = tl.load(gamma_ptr + bank * C + cols, mask=inside, other=0.0)
    beta = tl.load(beta_ptr + bank * C + cols, mask=inside, other=0.0)
    invstd = load_invstd(var_ptr, row, cols, eps, C)
    return mean, gamma * invstd, beta, invstd


@triton.jit
def mask_tile(
    mask_ptr,  # [M, ceil(C / 8)] uint8
    first,  # int64, row
    lanes,  # [BLOCK_M, 1]
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(pointers [BLOCK_M, BLOCK_C / 8] from a row on, which of their columns exist)."""
    MASK_C: tl.constexpr = (C + 7) // 8
    cols = tl.program_id(0) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)[None, :]
    return mask_ptr + first * MASK_C + (lanes * MASK_C + cols), cols < MASK_C


@triton.jit
def _sigmoid(z):
    # Below -80 it is as good as 0. Lanes without a row get there wherever a variance is tiny, and
    # exp would overflow: no harm on a GPU, an error in the interpreter.
    return tl.sigmoid(tl.maximum(z, -80.0))


@triton.jit
def activate(
    z,
    ACTIVATION: tl.constexpr,  # None, "relu", "relu6", "silu" or "hardswish", as everywhere
):
    """act(z); NaN stays NaN."""
    if ACTIVATION == "silu":
        z = z * _sigmoid(z)
    elif ACTIVATION == "hardswish":
        z = z * tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0)
    elif ACTIVATION is not None:
        z = tl.where(z <= 0, 0.0, z)
        if ACTIVATION == "relu6":
            z = tl.where(z >= 6, 6.0, z)
    return z


@triton.jit
def keeps_gradient(
    z,
    ACTIVATION: tl.constexpr,  # "relu" or "relu6"
):
    """Where act(z) has a gradient; NaN does."""
    cut = z <= 0
    if ACTIVATION == "relu6":
        cut = cut | (z >= 6)
    return ~cut


@triton.jit
def gradient_before(
    dy,
    z,
    ACTIVATION: tl.constexpr,
):
    """dz, the gradient before the activation."""
    if ACTIVATION == "silu":
        share = _sigmoid(z)
        dy *= share * (1.0 + z * (1.0 - share))
    elif ACTIVATION == "hardswish":
        slope = tl.where(z >= 3, 1.0, z * (1.0 / 3.0) + 0.5)
        dy *= tl.where(z <= -3, 0.0, slope)
    elif ACTIVATION is not None:
        dy = tl.where(keeps_gradient(z, ACTIVATION), dy, 0.0)
    return dy
