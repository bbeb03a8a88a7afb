"""Triton kernels of :mod:`rsfast.kernels.deferred_bn`, which holds the equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels._bn_tiles import find_chunk, load_invstd, share_out
from rsfast.kernels._launch import OPTIONS, level_arguments, on_device_of

__all__ = ["affine_backward", "affine_forward", "moments_backward", "move_running_statistics"]

BLOCK_C = 128  # of the kernels that see [L, C] only


@triton.jit
def _move_running_statistics_kernel(
    mean_ptr,  # [L, C] float32
    var_ptr,  # like mean_ptr, biased
    running_mean_ptr,  # [B, C] float32, moved towards mean
    running_var_ptr,  # [B, C] float32, moved towards the unbiased variance
    num_batches_ptr,  # [B] int64, one added per level
    level_rows,
    banks,
    momentum,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program per set, so that levels that share one move its running statistics in turn.
    bank = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    running_mean_ptr += bank * C + cols
    running_var_ptr += bank * C + cols
    running_mean = tl.load(running_mean_ptr, mask=inside, other=0.0)
    running_var = tl.load(running_var_ptr, mask=inside, other=0.0)
    num_levels = 0
    for level in tl.static_range(L):
        if (banks[level] >> 1) - 1 == bank:
            rows = ((level_rows[level] >> 1) - 1).to(tl.float32)
            mean = tl.load(mean_ptr + level * C + cols, mask=inside, other=0.0)
            var = tl.load(var_ptr + level * C + cols, mask=inside, other=0.0)
            # A single row has a variance of 0, and no unbiased one: it counts as 0.
            var *= rows / tl.maximum(rows - 1, 1)
            running_mean = (1.0 - momentum) * running_mean + momentum * mean
            running_var = (1.0 - momentum) * running_var + momentum * var
            num_levels += 1
    tl.store(running_mean_ptr, running_mean, mask=inside)
    tl.store(running_var_ptr, running_var, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(num_batches_ptr + bank, tl.load(num_batches_ptr + bank) + num_levels)


@triton.jit
def _bn_affine_fwd_kernel(
    var_ptr,  # [L, C] float32, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    scale_ptr,  # [L, C] float32, fully overwritten
    shift_ptr,  # [L, C] float32, fully overwritten
    banks,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    level = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    bank = 0
    for candidate in tl.static_range(L):
        bank = tl.where(level == candidate, (banks[candidate] >> 1) - 1, bank)
    gamma = tl.load(gamma_ptr + bank * C + cols, mask=inside, other=0.0)
    beta = tl.load(beta_ptr + bank * C + cols, mask=inside, other=0.0)
    invstd = load_invstd(var_ptr, level, cols, eps, C)
    tl.store(scale_ptr + level * C + cols, gamma * invstd, mask=inside)
    tl.store(shift_ptr + level * C + cols, beta, mask=inside)


@triton.jit
def _bn_affine_bwd_kernel(
    dscale_ptr,  # [L, C] float32
    dshift_ptr,  # [L, C] float32
    var_ptr,  # [L, C] float32, biased
    gamma_ptr,  # [B, C] float32
    dvar_ptr,  # [L, C] float32, fully overwritten
    dgamma_ptr,  # [B, C] float32, fully overwritten
    dbeta_ptr,  # [B, C] float32, fully overwritten
    banks,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program per set, also for sets without a level: their gradient is 0.
    bank = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    gamma = tl.load(gamma_ptr + bank * C + cols, mask=inside, other=0.0)
    dgamma = tl.zeros((BLOCK_C,), tl.float32)
    dbeta = tl.zeros((BLOCK_C,), tl.float32)
    for level in tl.static_range(L):
        if (banks[level] >> 1) - 1 == bank:
            dscale = tl.load(dscale_ptr + level * C + cols, mask=inside, other=0.0)
            dbeta += tl.load(dshift_ptr + level * C + cols, mask=inside, other=0.0)
            invstd = load_invstd(var_ptr, level, cols, eps, C)
            dgamma += dscale * invstd
            dvar = -0.5 * dscale * gamma * invstd * invstd * invstd
            tl.store(dvar_ptr + level * C + cols, dvar, mask=inside)
    tl.store(dgamma_ptr + bank * C + cols, dgamma, mask=inside)
    tl.store(dbeta_ptr + bank * C + cols, dbeta, mask=inside)


@triton.jit
def _moments_bwd_kernel(
    grad_ptr,  # [M, C] gradient of x without that of its moments
    x_ptr,  # [M, C]
    mean_ptr,  # [L, C] float32
    dmean_ptr,  # [L, C] float32
    dvar_ptr,  # [L, C] float32
    dx_ptr,  # [M, C] like x, fully overwritten
    level_rows,
    banks,
    chunk_rows,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.program_id(1)
    level, _, _, total, first, count = find_chunk(chunk, level_rows, banks, chunk_rows, L)
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    mean = tl.load(mean_ptr + level * C + cols, mask=inside, other=0.0)
    offset = tl.load(dmean_ptr + level * C + cols, mask=inside, other=0.0) / total
    slope = tl.load(dvar_ptr + level * C + cols, mask=inside, other=0.0) * (2.0 / total)
    offsets = first * C + (lanes * C + cols[None, :])
    for start in range(0, count, BLOCK_M):
        mask = (start + lanes < count) & inside[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dx = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dx += offset[None, :] + slope[None, :] * (x - mean[None, :])
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        offsets += BLOCK_M * C


def move_running_statistics(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    momentum: float,
) -> None:
    """Towards mean and biased variance [L, C] of each level. One launch."""
    with on_device_of(mean):
        _move_running_statistics_kernel[_grid(mean, len(running_mean))](
            mean,
            var,
            running_mean,
            running_var,
            num_batches_tracked,
            level_arguments(level_rows),
            level_arguments(banks),
            momentum,
            **_constants(mean),
        )


def affine_forward(
    var: Tensor, weight: Tensor, bias: Tensor, banks: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift [L, C]. One launch."""
    scale, shift = torch.empty_like(var), torch.empty_like(var)
    with on_device_of(var):
        _bn_affine_fwd_kernel[_grid(var, len(var))](
            var, weight, bias, scale, shift, level_arguments(banks), eps, **_constants(var)
        )
    return scale, shift


def affine_backward(
    dscale: Tensor, dshift: Tensor, var: Tensor, weight: Tensor, banks: Sequence[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dvar [L, C], dweight and dbias [B, C]. One launch."""
    dvar, dweight, dbias = (torch.empty_like(like) for like in (var, weight, weight))
    with on_device_of(var):
        _bn_affine_bwd_kernel[_grid(var, len(weight))](
            dscale,
            dshift,
            var,
            weight,
            dvar,
            dweight,
            dbias,
            level_arguments(banks),
            eps,
            **_constants(var),
        )
    return dvar, dweight, dbias


def moments_backward(
    grad: Tensor, x: Tensor, mean: Tensor, dmean: Tensor, dvar: Tensor, level_rows: Sequence[int]
) -> Tensor:
    """`grad` and the gradient that comes through mean and variance. One launch."""
    chunks = share_out(level_rows, level_rows, x.shape[1])
    dx = torch.empty_like(x)
    with on_device_of(x):
        _moments_bwd_kernel[chunks.grid](
            grad, x, mean, dmean, dvar, dx, *chunks.levels, **chunks.sizes, **chunks.tile, **OPTIONS
        )
    return dx


def _grid(by_level: Tensor, programs: int) -> tuple[int, int]:
    return triton.cdiv(by_level.shape[1], BLOCK_C), programs


def _constants(by_level: Tensor) -> dict[str, object]:
    num_levels, num_channels = by_level.shape
    return {"L": num_levels, "C": num_channels, "BLOCK_C": BLOCK_C, **OPTIONS}
