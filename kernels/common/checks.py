"""What the operations ask of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsfast.kernels.common.levels import MAX_LEVELS, Levels, Norm

__all__ = [
    "KERNEL_DTYPES",
    "check_activation",
    "check_batch_norm",
    "check_batch_norm_for_triton",
    "check_companion",
    "check_kernel_dtype",
    "check_levels",
    "check_residual",
    "check_rows",
]

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_kernel_dtype(name: str, tensor: Tensor) -> None:
    """Refuses what the Triton kernels do not compute in.

    Raises:
        ValueError: unless the tensor is float16, bfloat16 or float32.
    """
    if tensor.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")


def check_companion(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a tensor that a kernel cannot read beside its main argument.

    Raises:
        ValueError: unless the tensor is contiguous, of this type and on this device.
    """
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"{name} must be contiguous {dtype} on {device}, "
            f"got {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )


def check_rows(x: Tensor, level_rows: Sequence[int] | None = None, name: str = "x") -> None:
    """Refuses what is not packed rows, or not as many as the levels have.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if x.dim() != 2 or not x.is_contiguous() or not x.is_floating_point():
        raise ValueError(
            f"{name} must be contiguous floating point [M, C], got {x.dtype} of shape "
            f"{tuple(x.shape)}, strides {x.stride()}"
        )
    if level_rows is not None and sum(level_rows) != x.shape[0]:
        raise ValueError(
            f"level_rows must add up to the {x.shape[0]} rows of {name}, got {tuple(level_rows)}"
        )


def check_levels(level_rows: Sequence[int]) -> None:
    """Refuses row counts that the Triton kernels do not find their way in.

    Raises:
        ValueError: unless there are 1 to 8 levels of at least one row.
    """
    if not 1 <= len(level_rows) <= MAX_LEVELS or min(level_rows) < 1:
        raise ValueError(
            f"level_rows must be 1 to {MAX_LEVELS} counts of at least 1, got {tuple(level_rows)}"
        )


def check_activation(activation: str | None, choices: Sequence[str | None]) -> None:
    """Refuses an activation that is none of the choices.

    Raises:
        ValueError: naming them.
    """
    if activation not in choices:
        raise ValueError(f"activation must be one of {list(choices)}, got {activation!r}")


def check_batch_norm(norm: Norm, num_channels: int, num_levels: int, banks: Sequence[int]) -> None:
    """Refuses banks of batch norm that do not fit each other, the rows or the levels.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    num_banks = len(norm.weight)
    for name, tensor in norm._asdict().items():
        shape = (num_banks,) if name == "num_batches_tracked" else (num_banks, num_channels)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)}: B banks as in weight, "
                f"C channels as in x, got shape {tuple(tensor.shape)}"
            )
    if len(banks) != num_levels or not all(0 <= bank < num_banks for bank in banks):
        raise ValueError(
            f"banks must name one of {num_banks} banks for each of {num_levels} levels, "
            f"got {tuple(banks)}"
        )


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    """Refuses what cannot be added to `x`.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {tuple(x.shape)} {x.dtype} like x, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )


def check_batch_norm_for_triton(
    x: Tensor, norm: Norm, levels: Levels, residual: Tensor | None = None
) -> None:
    """Refuses what the Triton kernels of batch norm do not compute.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    check_kernel_dtype("x", x)
    check_levels(levels.rows)
    if residual is not None:
        check_companion("residual", residual, x.dtype, x.device)
    for name, tensor in norm._asdict().items():
        dtype = torch.int64 if name == "num_batches_tracked" else torch.float32
        check_companion(name, tensor, dtype, x.device)
