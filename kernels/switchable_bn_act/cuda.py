"""Training batch norm of :mod:`rsfast.kernels.switchable_bn_act.op` in one CUDA launch each way.

The kernels are those of csrc/switchable_bn_act.cuh, in the optional extension `rsfast._C`. What
fits into the chip's shared memory is read once: 2 elements per element are moved forward (1 read,
1 write) and 3 backward (2, 1), instead of 3 and 5; what does not is read again, last rows first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.kernels.common.backend import load_extension
from rsfast.kernels.common.levels import Levels, Norm

__all__ = ["check_one_pass_activation", "switchable_bn_act_one_pass"]

_VECTOR = 8  # channels that a thread reads at once
_ACTIVATIONS = (None, "relu", "relu6")


def check_one_pass_activation(activation: str | None) -> None:
    """Refuses an activation that the kernels do not compute.

    Raises:
        ValueError: unless it is None, "relu" or "relu6".
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {list(_ACTIVATIONS)} for backend cuda, "
            f"got {activation!r}: choose backend triton"
        )


def _check_rows(x: Tensor) -> None:
    """Refuses rows that the kernels do not compute on.

    Raises:
        ValueError: unless they are float16 or bfloat16, of a multiple of 8 channels.
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or x.shape[1] % _VECTOR:
        raise ValueError(
            f"x must be float16 or bfloat16 with a multiple of {_VECTOR} channels for backend "
            f"cuda, got {x.dtype} of shape {tuple(x.shape)}"
        )


@torch.library.custom_op(
    "rsfast::switchable_bn_act_one_pass_fwd",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def _fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    *,
    level_rows: Sequence[int],
    banks: Sequence[int],
    activation: str | None,
    save_mask: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, bits of the mask [M, C / 8] (no rows without `save_mask`), mean and biased var [L, C]."""
    load_extension()
    return torch.ops.rsfast_C.switchable_bn_act_fwd(
        x,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        level_rows,
        banks,
        activation,
        save_mask,
        momentum,
        eps,
    )


@_fwd.register_fake
def _(
    x: Tensor, *_: Tensor | None, level_rows: Sequence[int], save_mask: bool, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_channels = x.shape
    mask = x.new_empty(num_rows if save_mask else 0, num_channels // _VECTOR, dtype=torch.uint8)
    mean = x.new_empty(len(level_rows), num_channels, dtype=torch.float32)
    return torch.empty_like(x), mask, mean, torch.empty_like(mean)


@torch.library.custom_op("rsfast::switchable_bn_act_one_pass_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    level_rows: Sequence[int],
    banks: Sequence[int],
    activation: str | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual (no rows where `mask` has none), dweight and dbias."""
    dy = dy.contiguous()  # a sum's gradient has strides of 0
    load_extension()
    return torch.ops.rsfast_C.switchable_bn_act_bwd(
        dy, x, mask, weight, bias, mean, var, level_rows, banks, activation, eps
    )


@_bwd.register_fake
def _(
    dy: Tensor, x: Tensor, mask: Tensor, weight: Tensor, *_: Tensor, **__: Any
) -> tuple[Tensor, ...]:
    dresidual = x.new_empty(mask.shape[0], x.shape[1])
    return torch.empty_like(x), dresidual, torch.empty_like(weight), torch.empty_like(weight)


class _OnePass(torch.autograd.Function):
    """Joins the operators: PyTorch takes no gradient formula for one that writes to its inputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, settings: dict[str, Any], *norm: Tensor
    ) -> Tensor:
        y, mask, mean, var = _fwd(x, residual, *norm, **settings)
        names = "level_rows", "banks", "activation", "eps"
        ctx.settings = {name: settings[name] for name in names}
        ctx.has_residual, ctx.has_mask = residual is not None, settings["save_mask"]
        parameters = Norm(*norm)
        ctx.save_for_backward(x, mask, parameters.weight, parameters.bias, mean, var)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        dx, dresidual, dweight, dbias = _bwd(dy, *ctx.saved_tensors, **ctx.settings)
        if not ctx.has_residual:
            dresidual = None
        elif not ctx.has_mask:  # without an activation
            dresidual = dy
        return dx, dresidual, None, dweight, dbias, None, None, None


def switchable_bn_act_one_pass(
    x: Tensor,
    norm: Norm,
    levels: Levels,
    residual: Tensor | None,
    activation: str | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Training batch norm of :func:`switchable_bn_act`, whose checks come before.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if `rsfast._C` is absent.
    """
    _check_rows(x)
    settings = {
        "level_rows": levels.rows,
        "banks": levels.banks,
        "activation": activation,
        "save_mask": activation is not None and residual is not None and torch.is_grad_enabled(),
        "momentum": momentum,
        "eps": eps,
    }
    return _OnePass.apply(x, residual, settings, *norm)
