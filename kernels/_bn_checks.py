"""What batch norm asks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsfast.kernels._checks import (
    check_companion,
    check_kernel_dtype,
    check_levels,
    check_rows,
)

__all__ = ["check_batch_norm", "check_batch_norm_for_triton"]


def check_batch_norm(
    x: Tensor,
    norm: dict[str, Tensor],
    level_rows: Sequence[int],
    banks: Sequence[int],
    residual: Tensor | None,
) -> None:
    """Refuses arguments that do not fit each other.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    check_rows(x)
    num_banks = len(next(iter(norm.values())))
    for name, tensor in norm.items():
        shape = (num_banks,) if name == "num_batches_tracked" else (num_banks, x.shape[1])
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)}: B sets as in {next(iter(norm))}, "
                f"C channels as in x, got shape {tuple(tensor.shape)}"
            )
    check_rows(x, level_rows)
    if len(banks) != len(level_rows) or not all(0 <= bank < num_banks for bank in banks):
        raise ValueError(
            f"banks must name one of {num_banks} sets for each of {len(level_rows)} levels, "
            f"got {tuple(banks)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {tuple(x.shape)} {x.dtype} like x, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )


def check_batch_norm_for_triton(
    x: Tensor, norm: dict[str, Tensor], level_rows: Sequence[int], residual: Tensor | None
) -> None:
    """Refuses what the Triton kernels do not compute.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    check_kernel_dtype("x", x)
    check_levels(level_rows)
    if residual is not None:
        check_companion("residual", residual, x.dtype, x.device)
    for name, tensor in norm.items():
        dtype = torch.int64 if name == "num_batches_tracked" else torch.float32
        check_companion(name, tensor, dtype, x.device)
