"""Switchable batch norm in pieces, for what applies it later (:mod:`rsfast.kernels.folded_conv2d`).

Training batch norm of the rows x of level l with set b = banks[l] (RS-Net paper, equation 3) is

    mean[l], var[l] = moments of the level's rows            `batch_moments`
    scale[l] = weight[b] / sqrt(var[l] + eps)                `bn_affine`
    shift[l] = bias[b]
    y = act((x - mean[l]) * scale[l] + shift[l] + residual)  whoever reads x, or `apply_bn_act`

Its gradient comes in one of two ways. `apply_bn_act` takes the moments for functions of its x, and
has the whole of batch norm's. Where the next convolution applies scale and shift, autograd goes
through the tensors of [L, C], and ends at the moments: `with_moments_gradient` adds, over m rows,

    dx = dx + dmean / m + 2 dvar (x - mean) / m

Layout: rows are [M, C] contiguous, all levels one after another; everything else is [L, C] or, for
sets, [B, C]. Overwritten in place by `batch_moments`: running_mean, running_var,
num_batches_tracked. Bytes per element of x in 16 bits, backend "triton": 2 for the moments, 4 to
apply them, 6 for the gradient of moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.kernels._bn_checks import check_batch_norm, check_batch_norm_for_triton
from rsfast.kernels._checks import (
    check_backend,
    check_companion,
    check_kernel_dtype,
    check_levels,
    check_rows,
    load_kernels,
)
from rsfast.kernels._ranks import move_running_statistics
from rsfast.kernels.switchable_bn_act import (
    ACTIVATIONS,
    apply_given_moments,
    switchable_bn_act_reference,
)

__all__ = [
    "apply_bn_act",
    "batch_moments",
    "bn_affine",
    "check_moments",
    "with_moments_gradient",
]


def batch_moments(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    *,
    known: tuple[Tensor, Tensor] | None = None,
    momentum: float = 0.1,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every level, without gradients; moves the running statistics.

    Args:
        x: [M, C], as in :func:`switchable_bn_act`, like all that is not named here.
        running_mean: [B, C]; updated in place, as is what follows.
        running_var: [B, C], unbiased.
        num_batches_tracked: [B] int64; incremented for each level.
        level_rows: rows of each of the L levels.
        banks: the set of each.
        known: mean and biased variance [L, C] of x, where they have been computed before.
        momentum: weight of the batch in the running statistics.
        backend: "torch" or "triton".

    Returns:
        Two [L, C], at least float32; `known` itself where it is given.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    running = {
        "running_mean": running_mean,
        "running_var": running_var,
        "num_batches_tracked": num_batches_tracked,
    }
    check_batch_norm(x, running, level_rows, banks, None)
    if known is not None:
        check_moments(*known, x, len(level_rows), backend)
    settings = level_rows, banks, momentum
    if check_backend(backend) == "torch":
        mean, var = known or _moments(x.detach(), level_rows)
        move_running_statistics(running_mean, running_var, mean.detach(), var.detach(), *settings)
        for bank in banks:
            num_batches_tracked[bank] += 1
        return mean, var
    check_batch_norm_for_triton(x, running, level_rows, None)
    if known is None:
        stats = torch.ops.rsfast.switchable_bn_act_stats
        return stats(x.detach(), *running.values(), *settings)
    mean, var = known
    torch.ops.rsfast.move_running_statistics(
        mean.detach(), var.detach(), *running.values(), *settings
    )
    return mean, var


def _moments(x: Tensor, level_rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    moments = [torch.var_mean(rows, 0, correction=0) for rows in wide.split(list(level_rows))]
    var, mean = (torch.stack(part) for part in zip(*moments, strict=True))
    return mean, var


@torch.library.custom_op(
    "rsfast::move_running_statistics",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def _move(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    momentum: float,
) -> None:
    kernels = load_kernels("_deferred_bn_triton")
    running = running_mean, running_var, num_batches_tracked
    kernels.move_running_statistics(mean, var, *running, level_rows, banks, momentum)


@_move.register_fake
def _(*_: Any) -> None:
    return None


def bn_affine(
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    banks: Sequence[int],
    *,
    eps: float = 1e-5,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Scale and shift that batch norm amounts to, level by level; differentiable.

    Args:
        var: [L, C] biased variance; for "triton" contiguous float32, like weight and bias.
        weight: [B, C] gamma of each set.
        bias: [B, C] beta.
        banks: the set of each level, in [0, B).
        eps: added to the variance.
        backend: "torch" or "triton".

    Returns:
        Two [L, C].

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    _check_by_level("var", var, len(banks), weight.shape[-1])
    if not all(0 <= bank < len(weight) for bank in banks):
        raise ValueError(f"banks must name some of {len(weight)} sets, got {tuple(banks)}")
    if bias.shape != weight.shape:
        raise ValueError(
            f"bias must be {list(weight.shape)} like weight, got shape {tuple(bias.shape)}"
        )
    if check_backend(backend) == "triton":
        for name, tensor in (("var", var), ("weight", weight), ("bias", bias)):
            check_companion(name, tensor, torch.float32, weight.device)
        return torch.ops.rsfast.bn_affine_fwd(var, weight, bias, banks, eps)
    # Stacked, because an index of a list would be copied to the device.
    gamma, beta = (torch.stack([sets[bank] for bank in banks]) for sets in (weight, bias))
    return gamma * (var + eps).rsqrt(), beta


@torch.library.custom_op("rsfast::bn_affine_fwd", mutates_args=())
def _affine_fwd(
    var: Tensor, weight: Tensor, bias: Tensor, banks: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    return load_kernels("_deferred_bn_triton").affine_forward(var, weight, bias, banks, eps)


@_affine_fwd.register_fake
def _(var: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(var), torch.empty_like(var)


@torch.library.custom_op("rsfast::bn_affine_bwd", mutates_args=())
def _affine_bwd(
    dscale: Tensor, dshift: Tensor, var: Tensor, weight: Tensor, banks: Sequence[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dvar, dweight and dbias."""
    kernels = load_kernels("_deferred_bn_triton")
    grads = dscale.contiguous(), dshift.contiguous()
    return kernels.affine_backward(*grads, var, weight, banks, eps)


@_affine_bwd.register_fake
def _(dscale: Tensor, dshift: Tensor, var: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(var), torch.empty_like(weight), torch.empty_like(weight)


def _affine_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    var, weight, _, ctx.banks, ctx.eps = inputs
    ctx.save_for_backward(var, weight)


def _affine_backward(ctx: Any, dscale: Tensor, dshift: Tensor) -> tuple[Tensor | None, ...]:
    return *_affine_bwd(dscale, dshift, *ctx.saved_tensors, ctx.banks, ctx.eps), None, None


_affine_fwd.register_autograd(_affine_backward, setup_context=_affine_context)


def with_moments_gradient(
    x: Tensor, mean: Tensor, var: Tensor, level_rows: Sequence[int], *, backend: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Its arguments, where gradients of the moments have become gradients of x.

    Args:
        x: [M, C] contiguous rows of all levels.
        mean: [L, C] of x, without gradient.
        var: [L, C] of x, biased, without gradient.
        level_rows: rows of each of the L levels.
        backend: "torch" or "triton".

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    check_rows(x, level_rows)
    check_moments(mean, var, x, len(level_rows), backend)
    if backend == "triton":
        check_kernel_dtype("x", x)
        check_levels(level_rows)
    return _WithMoments.apply(x, mean, var, tuple(level_rows), backend)


class _WithMoments(torch.autograd.Function):
    """Hands tensors on: an operator of torch.library may not return what it is given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, level_rows: tuple[int, ...], backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, mean)
        ctx.level_rows, ctx.backend = level_rows, backend
        return x.view_as(x), mean.view_as(mean), var.view_as(var)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        triton = ctx.backend == "triton"
        total = torch.ops.rsfast.moments_bwd if triton else _moments_gradient_reference
        return total(grads[0], x, mean, *grads[1:], ctx.level_rows), None, None, None, None


def _moments_gradient_reference(
    dx: Tensor, x: Tensor, mean: Tensor, dmean: Tensor, dvar: Tensor, level_rows: Sequence[int]
) -> Tensor:
    """Plain PyTorch."""
    parts = zip(x.to(mean.dtype).split(list(level_rows)), mean, dmean, dvar, strict=True)
    more = [(dm + 2 * dv * (rows - m)) / len(rows) for rows, m, dm, dv in parts]
    return (dx.to(mean.dtype) + torch.cat(more)).to(dx.dtype)


@torch.library.custom_op("rsfast::moments_bwd", mutates_args=())
def _moments_bwd(
    dx: Tensor, x: Tensor, mean: Tensor, dmean: Tensor, dvar: Tensor, level_rows: Sequence[int]
) -> Tensor:
    """The gradient of x with that of its moments."""
    grads = dmean.contiguous(), dvar.contiguous()
    kernels = load_kernels("_deferred_bn_triton")
    return kernels.moments_backward(dx.contiguous(), x, mean, *grads, level_rows)


@_moments_bwd.register_fake
def _(dx: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def apply_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    level_rows: Sequence[int],
    banks: Sequence[int],
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-5,
    backend: str = "torch",
) -> Tensor:
    """Training batch norm of x, whose moments are known; see :func:`switchable_bn_act`.

    Args:
        mean: [L, C], that of x, whatever its own gradient: it is taken for a function of x.
        var: [L, C], biased, likewise.

    Returns:
        [M, C] like x, with the gradients of a whole batch norm. Backend "torch" computes the
        moments once more.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    norm = {"weight": weight, "bias": bias}
    check_batch_norm(x, norm, level_rows, banks, residual)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    check_moments(mean, var, x, len(level_rows), backend)
    if check_backend(backend) == "triton":
        check_batch_norm_for_triton(x, norm, level_rows, residual)
        moments = mean.detach(), var.detach()
        given = x, residual, weight, bias, *moments, level_rows, banks, activation, eps
        return apply_given_moments(*given)
    forgotten = torch.zeros_like(weight), torch.ones_like(weight)
    return switchable_bn_act_reference(
        x,
        weight,
        bias,
        *forgotten,
        torch.zeros(len(weight), dtype=torch.int64, device=x.device),
        level_rows,
        banks,
        residual=residual,
        activation=activation,
        training=True,
        eps=eps,
    )


def check_moments(mean: Tensor, var: Tensor, x: Tensor, num_levels: int, backend: str) -> None:
    """Refuses moments of another shape and, for the kernels, of another type.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    for name, tensor in (("mean", mean), ("var", var)):
        _check_by_level(name, tensor, num_levels, x.shape[1])
        if check_backend(backend) == "triton":
            check_companion(name, tensor, torch.float32, x.device)


def _check_by_level(name: str, tensor: Tensor, num_levels: int, num_channels: int) -> None:
    if tensor.shape != (num_levels, num_channels):
        raise ValueError(
            f"{name} must be {[num_levels, num_channels]}, a row per level, "
            f"got shape {tuple(tensor.shape)}"
        )
