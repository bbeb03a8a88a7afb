"""Learned quantisation of activations over packed rows, and the refit of its basis.

With the 2^K levels of a basis v, l_0 <= l_1 <= ..., the sums of digit_j v_j over digits 0 and 1
(Zhang et al., "LQ-Nets", ECCV 2018):

    y  = l_c    c = how many of the thresholds (l_i + l_i+1) / 2 are below x; NaN if x is not finite
    dx = dy     where x <= l_top, else 0 (with backend "torch" NaN where that dy is not finite)

All levels are quantised with the basis found at the start. Then each of the first `moving` levels
in turn refits the basis to its own x and codes, v* = argmin sum (x - sum_j digit_j(c) v_j)^2, and
v* is taken into the moving average; :mod:`rsfast.kernels.common.basis` has both.

Layout: x and y are [M, C] contiguous, the rows of all levels one after another. Overwritten in
place: basis and updates, unless `moving` is 0.

Backend "triton": one launch forward and, if the basis moves, a second one of a single program
(with `synced` and several ranks two, and a collective between them); one launch backward. Per
element x is read and y written once, and one bit kept of where x <= l_top; backward reads dy and
the bit and writes dx. In 16 bits that is 4.125 bytes each way. The levels are sorted, and compared
with, in float32. What the refit needs, of each code a count and a sum, is gathered on the way: per
program in int32 and float32, over programs in float64 in a fixed order. The host reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rsfast.kernels.common.backend import check_backend, load_kernels
from rsfast.kernels.common.checks import (
    check_companion,
    check_kernel_dtype,
    check_levels,
    check_rows,
)
from rsfast.kernels.common.ranks import sum_over_ranks
from rsfast.kernels.lq_activation.checks import check_state
from rsfast.kernels.lq_activation.reference import lq_activation_reference

__all__ = ["lq_activation"]


@torch.library.custom_op("rsfast::lq_activation_fwd", mutates_args=())
def _fwd(
    x: Tensor, basis: Tensor, *, level_rows: Sequence[int], save_mask: bool, summed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the bits of the mask, and counts and sums above each threshold [2^K, P].

    The mask is [M, ceil(C / 8)] uint8, without rows unless `save_mask`; P is the number of
    programs, or 0 unless `summed`.
    """
    y, mask, counts, sums = outputs = _empty_outputs(x, basis, level_rows, save_mask, summed)
    load_kernels("lq_activation.forward").forward(
        x,
        basis,
        y,
        mask if save_mask else None,
        (counts, sums) if summed else None,
        level_rows,
    )
    return outputs


@_fwd.register_fake
def _(
    x: Tensor, basis: Tensor, *, level_rows: Sequence[int], save_mask: bool, summed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(x, basis, level_rows, save_mask, summed)


def _empty_outputs(
    x: Tensor, basis: Tensor, level_rows: Sequence[int], save_mask: bool, summed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_channels = x.shape
    bits, programs = len(basis), 0
    if summed:
        tiles = load_kernels("lq_activation.tiles")
        # Kernels are compiled for the channels anyway: no symbols here.
        programs = tiles.num_programs(tuple(map(int, level_rows)), int(num_channels), bits)
    mask = x.new_empty(num_rows if save_mask else 0, (num_channels + 7) // 8, dtype=torch.uint8)
    counts = x.new_empty(2**bits, programs, dtype=torch.int32)
    sums = x.new_empty(2**bits, programs, dtype=torch.float32)
    return torch.empty_like(x), mask, counts, sums


@torch.library.custom_op("rsfast::lq_activation_move", mutates_args=("basis", "updates"))
def _move(
    counts: Tensor,
    sums: Tensor,
    basis: Tensor,
    updates: Tensor,
    *,
    level_rows: Sequence[int],
    num_channels: int,
    moving: int,
    synced: bool,
) -> None:
    """Moves the basis by what `_fwd` gathered."""
    kernels = load_kernels("lq_activation.move")
    by_code = None
    if synced and dist.is_initialized() and dist.get_world_size() > 1:
        by_code = sum_over_ranks(kernels.code_sums(counts, sums, level_rows, num_channels, moving))
    kernels.move(counts, sums, by_code, basis, updates, level_rows, num_channels, moving)


@_move.register_fake
def _(counts: Tensor, *_: Tensor, **__: Any) -> None:
    return None


@torch.library.custom_op("rsfast::lq_activation_bwd", mutates_args=())
def _bwd(dy: Tensor, mask: Tensor) -> Tensor:
    dx = dy.new_empty(dy.shape)
    load_kernels("lq_activation.backward").backward(dy.contiguous(), mask, dx)  # a sum's has none
    return dx


@_bwd.register_fake
def _(dy: Tensor, mask: Tensor) -> Tensor:
    return dy.new_empty(dy.shape)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    _, mask, *partial = output
    if not keyword_only_inputs["save_mask"]:
        raise ValueError("save_mask must be True for gradients")
    ctx.set_materialize_grads(False)  # none of zeros for the mask
    ctx.mark_non_differentiable(mask, *partial)
    ctx.save_for_backward(mask)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return None if dy is None else _bwd(dy, *ctx.saved_tensors), None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def lq_activation(
    x: Tensor,
    basis: Tensor,
    updates: Tensor,
    level_rows: Sequence[int],
    *,
    moving: int = 0,
    synced: bool = False,
    backend: str = "torch",
) -> Tensor:
    """Quantises all levels with one basis, and moves it.

    Args:
        x: [M, C] contiguous rows of all levels, floating point, which should not be negative. For
            "triton" float16, bfloat16 or float32, at most 8 levels of at least one row; the rest
            contiguous and on the same device.
        basis: [K], 1 to 4 bits; float32, for "torch" also float64. Moved in place, see `moving`.
        updates: [] int64, how often the basis was moved; counted up.
        level_rows: rows of each of the L levels; their sum is M.
        moving: how many of the levels, from the first, move the basis.
        synced: whether the basis is fitted to the values of all ranks of the default process group.
        backend: "torch" for the reference, "triton" for the fused kernels.

    Returns:
        [M, C] in the dtype of `x`.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    level_rows = tuple(level_rows)
    check_rows(x, level_rows)
    check_state(basis, updates, moving, len(level_rows))
    if check_backend(backend) == "torch":
        return lq_activation_reference(x, basis, updates, level_rows, moving=moving, synced=synced)
    check_kernel_dtype("x", x)
    check_levels(level_rows)
    check_companion("basis", basis, torch.float32, x.device)
    check_companion("updates", updates, torch.int64, x.device)
    save_mask = x.requires_grad and torch.is_grad_enabled()
    y, _, counts, sums = _fwd(
        x, basis, level_rows=level_rows, save_mask=save_mask, summed=moving > 0
    )
    if moving:
        _move(
            counts,
            sums,
            basis,
            updates,
            level_rows=level_rows,
            num_channels=x.shape[1],
            moving=moving,
            synced=synced,
        )
    return y
