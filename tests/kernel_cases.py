"""Cases of kernels to compile ahead of time: what one is, and those of batch norm.

tests/kernels/compile_ahead.py has the others and compiles them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rsfast.kernels.common.tiles import TILE_ELEMENTS
from rsfast.kernels.common.tiles import tile as bn_tile
from rsfast.kernels.switchable_bn_act import backward as bn_backward
from rsfast.kernels.switchable_bn_act import forward as bn_forward
from rsfast.kernels.switchable_bn_act import tiles as bn_tiles

__all__ = ["NUM_LEVELS", "TORCH_TYPES", "Case", "bn_types", "switchable_bn_act"]

NUM_LEVELS = 5
TORCH_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """One kernel to compile: types of its run-time arguments, and its constants."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    programs: int | None = None  # that are to fit on a multiprocessor


class Variant(NamedTuple):
    """What the batch-norm kernels are specialised for, besides C and the type of the rows."""

    activation: str | None
    residual: bool
    batch_statistics: bool
    backward: bool = True  # False: evaluation without gradients, which keeps no mask


ALL_VARIANTS = [
    *(
        Variant(activation, residual, batch)
        for activation in (None, "relu", "relu6", "silu", "hardswish")
        for residual in (False, True)
        for batch in (True, False)
    ),
    Variant("relu", True, False, backward=False),
]
CUTTING = ("relu", "relu6")
SMOOTH_VARIANTS = [Variant("silu", False, True), Variant("silu", True, True)]
SMOOTH_VARIANTS += [Variant("hardswish", False, True), Variant("hardswish", True, True)]
MAIN_VARIANTS = [Variant("relu", False, True), Variant("relu", True, True)]


def switchable_bn_act() -> Iterator[Case]:
    yield from _switchable_bn_act(64, "bf16", NUM_LEVELS, ALL_VARIANTS)
    yield from _switchable_bn_act(64, "bf16", 1, MAIN_VARIANTS)
    # Every tile width, with and without channels to mask, and the other types.
    for channels in (3, 65, 96, 2047, 2048):
        yield from _switchable_bn_act(channels, "bf16", NUM_LEVELS, MAIN_VARIANTS)
    for channels, dtype in ((64, "fp16"), (64, "fp32"), (2048, "fp32")):
        yield from _switchable_bn_act(channels, dtype, NUM_LEVELS, MAIN_VARIANTS)
    for channels, dtype in ((96, "bf16"), (2047, "bf16"), (64, "fp32")):
        yield from _of_variants(channels, dtype, NUM_LEVELS, SMOOTH_VARIANTS)


def _switchable_bn_act(
    channels: int, dtype: str, num_levels: int, variants: Sequence[Variant]
) -> Iterator[Case]:
    batches = sorted({variant.batch_statistics for variant in variants})
    yield from _statistics_and_finalize(channels, dtype, num_levels, batches)
    yield from _of_variants(channels, dtype, num_levels, variants)


class BnTypes(NamedTuple):
    """What kernels of batch norm have in common for C channels and L levels."""

    sizes: dict[str, int]
    levels: dict[str, Any]
    tile: dict[str, int]


def bn_types(channels: int, num_levels: int, elements: int = TILE_ELEMENTS) -> BnTypes:
    levels = {"level_rows": ("i32",) * num_levels, "banks": ("i32",) * num_levels}
    block_m, block_c = bn_tile(channels, elements)
    sizes = {"L": num_levels, "C": channels}
    tile = {**sizes, "BLOCK_M": block_m, "BLOCK_C": block_c}
    return BnTypes(sizes, levels | {"share_rows": "i32"}, tile)


def _pointers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*fp32")


def _statistics_and_finalize(
    channels: int, dtype: str, num_levels: int, batches: Sequence[bool]
) -> Iterator[Case]:
    elements = bn_forward.statistics_elements(TORCH_TYPES[dtype])
    common = bn_types(channels, num_levels, elements)
    rows, label = "*" + dtype, f"L={num_levels} C={channels} {dtype}"
    final = {**common.sizes, **bn_tiles.finalize_tile(channels)}
    types = {"x_ptr": rows, "partial_ptr": "*fp32", **common.levels}
    kernel = bn_forward._bn_statistics_kernel
    options, programs = bn_forward.OPTIONS, bn_tiles.FORWARD_PROGRAMS
    yield Case(f"{kernel.__name__} {label}", kernel, types, common.tile, options, programs)
    types |= _pointers("mean_ptr", "var_ptr", "running_mean_ptr", "running_var_ptr")
    types |= {"num_batches_ptr": "*i64", "stride_partial": "i32", "momentum": "fp32"}
    options, kernel = bn_tiles.FINALIZE_OPTIONS, bn_forward._bn_finalize_kernel
    constants = {**common.tile, **final}
    yield Case(f"{kernel.__name__} {label}", kernel, types, constants, options)
    types = {"partial_ptr": "*fp32", **common.levels, "stride_partial": "i32", "eps": "fp32"}
    types |= _pointers("var_ptr", "sums_ptr", "dgamma_ptr", "dbeta_ptr")
    kernel = bn_backward._bn_bwd_finalize_kernel
    for batch in batches:
        constants = {**final, "BATCH_STATISTICS": batch}
        yield Case(f"{kernel.__name__} {label} {batch=}", kernel, types, constants, options)


def _of_variants(
    channels: int, dtype: str, num_levels: int, variants: Sequence[Variant]
) -> Iterator[Case]:
    common = bn_types(channels, num_levels)
    rows = "*" + dtype
    for variant in variants:
        activation, residual, batch, backward = variant
        label = f"L={num_levels} C={channels} {dtype} {activation} {residual=} {batch=}"
        label += "" if backward else " no gradient"

        def case(kernel: Any, types: dict[str, Any], constants: dict[str, Any]) -> Case:
            forward = kernel is bn_forward._bn_apply_kernel
            options = bn_forward.OPTIONS if forward else bn_backward.OPTIONS
            programs = bn_tiles.FORWARD_PROGRAMS if forward else bn_tiles.BACKWARD_PROGRAMS
            name = f"{kernel.__name__} {label}"  # noqa: B023
            return Case(name, kernel, types, constants, options, programs)

        has_mask = residual and activation in CUTTING and backward
        keeps_residual = residual and activation not in (None, *CUTTING)
        types = _pointers("mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr")
        types |= {"eps": "fp32", **common.levels, "x_ptr": rows}
        types |= {"mask_ptr": "*u8"} if has_mask else {}
        constants = {**common.tile, "BATCH_STATISTICS": batch, "ACTIVATION": activation}
        more = {"residual_ptr": rows} if residual else {}
        yield case(
            bn_forward._bn_apply_kernel,
            {**types, "y_ptr": rows, **more},
            {**constants, "HAS_RESIDUAL": residual, "WRITE_MASK": has_mask},
        )
        if not backward:
            continue
        constants |= {"HAS_RESIDUAL": keeps_residual, "HAS_MASK": has_mask}
        types |= {"dy_ptr": rows, **({"residual_ptr": rows} if keeps_residual else {})}
        yield case(bn_backward._bn_bwd_reduce_kernel, {**types, "partial_ptr": "*fp32"}, constants)
        types |= {"sums_ptr": "*fp32", "dx_ptr": rows}
        types |= {"dresidual_ptr": rows} if has_mask or keeps_residual else {}
        yield case(bn_backward._bn_bwd_apply_kernel, types, constants)
