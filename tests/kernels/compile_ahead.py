"""Compiles the kernels of one operation for one GPU, without a GPU: one JSON line each.

Run as `python compile_ahead.py OPERATION CAPABILITY` by test_compile_ahead.py, in a process of its
own because Triton may be in interpreter mode in that of the tests. With TRITON_DUMP_PTXAS_LOG=1,
ptxas prints its log, with registers and spills, before each line.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rsfast.kernels import DISTILL_MODES
from rsfast.kernels import _bn_act_max_pool_triton as max_pool
from rsfast.kernels import _bn_backward as bn_backward
from rsfast.kernels import _bn_forward as bn_forward
from rsfast.kernels import _bn_tiles as bn_tiles
from rsfast.kernels import _deferred_bn_triton as deferred
from rsfast.kernels import _distillation_loss_triton as loss
from rsfast.kernels import _folded_conv2d_backward as conv_backward
from rsfast.kernels import _folded_conv2d_forward as conv_forward
from rsfast.kernels import _folded_conv2d_tiles as conv_tiles
from rsfast.kernels import _global_avg_pool_triton as pool
from rsfast.kernels import _normalize_triton as pixels
from rsfast.kernels._launch import OPTIONS
from rsfast.kernels.distillation_loss import _teacher_range

NUM_LEVELS = 5


class Case(NamedTuple):
    """One kernel to compile: types of its run-time arguments, and its constants."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    before_hopper: dict[str, Any] | None = None  # other options there


def distillation_loss() -> Iterator[Case]:
    modes = [*((mode, "bf16") for mode in DISTILL_MODES), ("full", "fp16"), ("full", "fp32")]
    passes = [(True, False), (False, True), (True, True)]  # writes terms, gradients
    # Every tile: few and many rows, one block of each size and the loop over several.
    sizes = [(5, 1000), *itertools.product((4, 8), (10, 200, 500, 1000, 2000, 32768)), (1, 1)]
    for (resolutions, classes), (mode, dtype), (terms, grads) in itertools.product(
        sizes, modes, passes
    ):
        if (resolutions, classes) != (5, 1000) and (mode != "full" or dtype == "fp16"):
            continue
        block_k, num_warps = loss.tile(resolutions, classes)
        first, last, _ = _teacher_range(mode, resolutions)
        types = {"logits_ptr": "*" + dtype, "labels_ptr": "*i64", "alpha_ptr": "*fp32"}
        types |= dict.fromkeys(["stride_upstream", "stride_terms_n", "stride_dalpha_n"], "i32")
        types |= dict.fromkeys(["hit_target", "miss_target", "teacher_weight"], "fp32")
        if terms:
            types |= {"terms_ptr": "*fp32"}
        if grads:
            types |= {"upstream_ptr": "*fp32", "dlogits_ptr": "*" + dtype, "dalpha_ptr": "*fp32"}
        yield Case(
            f"R={resolutions} K={classes} {mode} {dtype} terms={terms} grads={grads}",
            loss._distillation_loss_kernel,
            types,
            {
                "R": resolutions,
                "K": classes,
                "BLOCK_K": block_k,
                "FIRST_TEACHER": first,
                "LAST_TEACHER": last,
                "WRITE_TERMS": terms,
                "WRITE_GRADS": grads,
            },
            loss.options(num_warps),
        )


def global_avg_pool() -> Iterator[Case]:
    levels = {"level_rows": ("i32",) * NUM_LEVELS, "num_images": "i32"}
    kernels = {
        pool._global_avg_pool_fwd_kernel: ("x_ptr", "y_ptr"),
        pool._global_avg_pool_bwd_kernel: ("dy_ptr", "dx_ptr"),
    }
    for channels, dtype, (kernel, names) in itertools.product(
        (3, 24, 48, 65, 2048), ("bf16", "fp32"), kernels.items()
    ):
        block_p, block_c = pool.tile(channels)
        yield Case(
            f"{kernel.__name__} C={channels} {dtype}",
            kernel,
            {**dict.fromkeys(names, "*" + dtype), **levels},
            {"L": NUM_LEVELS, "C": channels, "BLOCK_P": block_p, "BLOCK_C": block_c},
            OPTIONS,
        )


def normalize() -> Iterator[Case]:
    for channels, dtype in itertools.product((3, 4, 8), ("bf16", "fp32")):
        types = {"pixels_ptr": "*u8", "y_ptr": "*" + dtype, "num_rows": "i32"}
        types |= dict.fromkeys(["scale", "shift"], ("fp32",) * 3)
        padded = triton.next_power_of_2(channels)
        yield Case(
            f"_normalize_kernel C={channels} {dtype}",
            pixels._normalize_kernel,
            types,
            {"C": channels, "PADDED_C": padded, "BLOCK_M": pixels.BLOCK_M},
            OPTIONS,
        )


def folded_conv2d() -> Iterator[Case]:
    # The layers of ResNet-50, and channels that are no multiple of anything.
    shapes = [(64, 64), (64, 256), (512, 128), (2048, 512), (65, 131)]
    cases = [*((shape, "bf16") for shape in shapes), ((64, 256), "fp32"), ((65, 131), "fp32")]
    for (num_in, num_out), dtype in cases:
        for activation, pending, statistics in (("relu", True, True), (None, False, True)):
            options = activation, pending, statistics
            yield from _folded_conv2d((num_in, num_out, 1, 1), dtype, *options)
    yield from _folded_conv2d((96, 24, 1, 1), "fp16", "relu6", True, True)
    # 3x3, with both strides, and a strided shortcut.
    for geometry in ((64, 64, 3, 1), (512, 512, 3, 2), (256, 512, 1, 2)):
        yield from _folded_conv2d(geometry, "bf16", "relu", True, True)
    yield from _folded_conv2d((64, 64, 3, 1), "fp16", None, False, False)
    yield from _folded_conv2d((64, 64, 3, 2), "fp32", "relu", True, True)
    yield from _folded_conv2d((65, 131, 3, 1), "bf16", "relu6", True, True)


def _folded_conv2d(
    geometry: tuple[int, int, int, int],
    dtype: str,
    activation: str | None,
    pending: bool,
    statistics: bool,
) -> Iterator[Case]:
    num_in, num_out, kernel, stride = geometry
    rows, levels = "*" + dtype, {"level_rows": ("i32",) * NUM_LEVELS}
    maps = dict.fromkeys(["heights", "widths"], levels["level_rows"]) | {"num_images": "i32"}
    affine = dict.fromkeys(["center_ptr", "scale_ptr", "shift_ptr"], "*fp32") if pending else {}
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    tile = conv_tiles.tiles(torch_dtype, num_in, num_out)
    constants = {"L": NUM_LEVELS, "C_IN": num_in, "C_OUT": num_out}
    constants |= {"KERNEL": kernel, "STRIDE": stride, "ACTIVATION": activation}
    label = f"{num_in} to {num_out} k={kernel} s={stride} {dtype} {activation}"
    label += f" statistics={statistics}"

    def case(function: Any, types: dict[str, Any], more: dict[str, Any]) -> Case:
        types = {**types, **levels, **maps}
        wide = pending and function is conv_forward._folded_conv2d_fwd_kernel
        wide = wide or stride > 1
        options, before_hopper = (
            {
                **conv_tiles.GEMM_OPTIONS,
                "maxnreg": conv_tiles.max_registers(torch_dtype, capability, wide=wide),
            }
            for capability in ((9, 0), (8, 0))
        )
        name = f"{function.__name__} {label}"
        return Case(name, function, types, {**constants, **more}, options, before_hopper)

    partial = {"partial_ptr": "*fp32"}
    columns = {"num_columns": "i32"}
    types = {"x_ptr": rows, "weight_ptr": rows, "y_ptr": rows, **affine, **columns}
    yield case(
        conv_forward._folded_conv2d_fwd_kernel,
        types | (partial if statistics else {}),
        {
            "HAS_AFFINE": pending,
            "WRITE_STATISTICS": statistics,
            "WRITE_REST": dtype == "fp32",
            **tile,
        },
    )
    if not pending:
        return
    types = {"dy_ptr": rows, "x_ptr": rows, **affine, **partial}
    inner = conv_backward.dgrad_tiles(torch_dtype, num_in, num_out)
    yield case(
        conv_backward._folded_conv2d_dgrad_kernel,
        {**types, "weight_ptr": rows, "dx_ptr": rows, **columns},
        inner,
    )
    inner = conv_backward.wgrad_tiles(torch_dtype, num_in, num_out)
    yield case(
        conv_backward._folded_conv2d_wgrad_kernel, {**types, "tiles_per_split": "i32"}, inner
    )
    if kernel * stride == 1:
        has_rest = dtype == "fp32"
        for last, moments in itertools.product((True, False), repeat=2):
            types = dict.fromkeys(["partial_ptr", "first_ptr", "second_ptr"], "*fp32")
            types |= {} if last or not (has_rest and moments) else {"rest_ptr": "*fp32"}
            types |= dict.fromkeys(["stride_partial", "chunk_rows", "group_rows"], "i32")
            merge = {"L": NUM_LEVELS, "C": num_out, "MOMENTS": moments}
            merge |= {"HAS_REST": has_rest and moments, "LAST": last}
            sizes = {name: conv_tiles.MERGE_OPTIONS[name] for name in ("BLOCK_K", "BLOCK_C")}
            yield Case(
                f"_folded_conv2d_merge_kernel C={num_out} {dtype} {moments=} {last=}",
                conv_tiles._folded_conv2d_merge_kernel,
                {**types, **levels},
                {**merge, **sizes},
                {k: v for k, v in conv_tiles.MERGE_OPTIONS.items() if k not in sizes},
            )


def deferred_bn() -> Iterator[Case]:
    by_level = {"L": NUM_LEVELS, "BLOCK_C": deferred.BLOCK_C}
    rows_and_sets = {"level_rows": ("i32",) * NUM_LEVELS, "banks": ("i32",) * NUM_LEVELS}
    banks = {"banks": rows_and_sets["banks"], "eps": "fp32"}

    def floats(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "*fp32")

    moved = floats("mean_ptr", "var_ptr", "running_mean_ptr", "running_var_ptr")
    moved |= {"num_batches_ptr": "*i64", **rows_and_sets, "momentum": "fp32"}
    affine = floats("var_ptr", "gamma_ptr", "beta_ptr", "scale_ptr", "shift_ptr")
    grads = floats("dscale_ptr", "dshift_ptr", "var_ptr", "gamma_ptr")
    grads |= floats("dvar_ptr", "dgamma_ptr", "dbeta_ptr")
    kernels = {
        deferred._move_running_statistics_kernel: moved,
        deferred._bn_affine_fwd_kernel: affine | banks,
        deferred._bn_affine_bwd_kernel: grads | banks,
    }
    for channels, (kernel, types) in itertools.product((65, 2048), kernels.items()):
        yield Case(
            f"{kernel.__name__} C={channels}", kernel, types, {**by_level, "C": channels}, OPTIONS
        )
    for channels, dtype in ((64, "bf16"), (65, "fp16"), (2048, "bf16"), (96, "fp32")):
        rows = dict.fromkeys(["grad_ptr", "x_ptr", "dx_ptr"], "*" + dtype)
        block_m, block_c = bn_tiles.tile(channels)
        yield Case(
            f"_moments_bwd_kernel C={channels} {dtype}",
            deferred._moments_bwd_kernel,
            rows
            | floats("mean_ptr", "dmean_ptr", "dvar_ptr")
            | rows_and_sets
            | {"chunk_rows": "i32"},
            {"L": NUM_LEVELS, "C": channels, "BLOCK_M": block_m, "BLOCK_C": block_c},
            OPTIONS,
        )


def bn_act_max_pool() -> Iterator[Case]:
    names = ("level_rows", "banks", "heights", "widths")
    levels = dict.fromkeys(names, ("i32",) * NUM_LEVELS) | {"chunk_rows": "i32", "eps": "fp32"}
    affine = dict.fromkeys(["mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr"], "*fp32")
    shapes = [(64, "bf16", "relu"), (64, "fp16", "relu"), (64, "fp32", "relu")]
    for channels, dtype, activation in (*shapes, (64, "bf16", None), (65, "bf16", "relu6")):
        rows = "*" + dtype
        block_m, block_c = bn_tiles.tile(channels, max_pool.TILE_ELEMENTS)
        constants = {"L": NUM_LEVELS, "C": channels, "ACTIVATION": activation}
        constants |= {"BLOCK_M": block_m, "BLOCK_C": block_c}
        label = f"C={channels} {dtype} {activation}"
        types = {"x_ptr": rows, "largest_ptr": "*u8", "num_images": "i32", **affine, **levels}
        kernel = max_pool._bn_act_max_pool_fwd_kernel
        yield Case(
            f"{kernel.__name__} {label}", kernel, {**types, "y_ptr": rows}, constants, OPTIONS
        )
        kernel = max_pool._bn_act_max_pool_bwd_kernel
        types |= {"dy_ptr": rows}
        for more in ({"partial_ptr": "*fp32"}, {"sums_ptr": "*fp32", "dx_ptr": rows}):
            writes = {"WRITE_DX": "dx_ptr" in more}
            name = f"{kernel.__name__} {label} {writes}"
            yield Case(name, kernel, {**types, **more}, {**constants, **writes}, OPTIONS)


class Variant(NamedTuple):
    """What the batch-norm kernels are specialised for, besides C and the type of the rows."""

    activation: str | None
    residual: bool
    batch_statistics: bool
    backward: bool = True  # False: evaluation without gradients, which keeps no mask


ALL_VARIANTS = [
    *(
        Variant(activation, residual, batch)
        for activation in (None, "relu", "relu6")
        for residual in (False, True)
        for batch in (True, False)
    ),
    Variant("relu", True, False, backward=False),
]
MAIN_VARIANTS = [Variant("relu", False, True), Variant("relu", True, True)]


def switchable_bn_act() -> Iterator[Case]:
    yield from _switchable_bn_act(64, "bf16", NUM_LEVELS, ALL_VARIANTS)
    yield from _switchable_bn_act(64, "bf16", 1, MAIN_VARIANTS)
    # Every tile width, with and without channels to mask, and the other types.
    for channels in (3, 65, 96, 2047, 2048):
        yield from _switchable_bn_act(channels, "bf16", NUM_LEVELS, MAIN_VARIANTS)
    for channels, dtype in ((64, "fp16"), (64, "fp32"), (2048, "fp32")):
        yield from _switchable_bn_act(channels, dtype, NUM_LEVELS, MAIN_VARIANTS)


def _switchable_bn_act(
    channels: int, dtype: str, num_levels: int, variants: Sequence[Variant]
) -> Iterator[Case]:
    rows = "*" + dtype
    levels = {"level_rows": ("i32",) * num_levels, "banks": ("i32",) * num_levels}
    levels |= {"chunk_rows": "i32"}
    block_m, block_c = bn_tiles.tile(channels)
    sizes = {"L": num_levels, "C": channels}
    tile = {**sizes, "BLOCK_M": block_m, "BLOCK_C": block_c}
    final = {**sizes, **bn_tiles.finalize_tile(channels)}
    partial = {"partial_ptr": "*fp32", **levels}
    moments = dict.fromkeys(["mean_ptr", "var_ptr"], "*fp32")
    running = dict.fromkeys(["running_mean_ptr", "running_var_ptr"], "*fp32")
    affine = {**moments, "gamma_ptr": "*fp32", "eps": "fp32", **levels}

    def case(kernel: Any, types: dict[str, str], constants: dict[str, Any], name: str = "") -> Case:
        label = f"{kernel.__name__} L={num_levels} C={channels} {dtype} {name}"
        final = "finalize" in kernel.__name__
        options = bn_tiles.FINALIZE_OPTIONS if final else OPTIONS
        return Case(label, kernel, types, constants, options)

    yield case(bn_forward._bn_statistics_kernel, {"x_ptr": rows, **partial}, tile)
    types = {"x_ptr": rows, **partial, **moments, **running}
    types |= {"num_batches_ptr": "*i64", "stride_partial": "i32", "momentum": "fp32"}
    yield case(bn_forward._bn_finalize_kernel, types, final)
    types = {**partial, "stride_partial": "i32", "eps": "fp32"}
    types |= dict.fromkeys(["var_ptr", "sums_ptr", "dgamma_ptr", "dbeta_ptr"], "*fp32")
    for batch in sorted({variant.batch_statistics for variant in variants}):
        constants = {**final, "BATCH_STATISTICS": batch}
        yield case(bn_backward._bn_bwd_finalize_kernel, types, constants, f"batch={batch}")
    for variant in variants:
        activation, residual, batch, _ = variant
        name = f"{activation} residual={residual} batch={batch}"
        has_mask = residual and activation is not None and variant.backward
        mask = {"mask_ptr": "*u8"} if has_mask else {}
        types = {**affine, **mask, "beta_ptr": "*fp32", "x_ptr": rows}
        constants = {**tile, "BATCH_STATISTICS": batch, "ACTIVATION": activation}
        yield case(
            bn_forward._bn_apply_kernel,
            {**types, "y_ptr": rows, **({"residual_ptr": rows} if residual else {})},
            {**constants, "HAS_RESIDUAL": residual, "WRITE_MASK": has_mask},
            name,
        )
        if not variant.backward:
            continue
        types |= {"dy_ptr": rows}
        constants["HAS_MASK"] = has_mask
        reduce_types = {**types, "partial_ptr": "*fp32"}
        yield case(bn_backward._bn_bwd_reduce_kernel, reduce_types, constants, name)
        types |= {"sums_ptr": "*fp32", "dx_ptr": rows}
        types |= {"dresidual_ptr": rows} if has_mask else {}
        yield case(bn_backward._bn_bwd_apply_kernel, types, constants, name)


OPERATIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "bn_act_max_pool": bn_act_max_pool,
    "folded_conv2d": folded_conv2d,
    "deferred_bn": deferred_bn,
    "distillation_loss": distillation_loss,
    "global_avg_pool": global_avg_pool,
    "normalize": normalize,
    "switchable_bn_act": switchable_bn_act,
}


def compile_case(case: Case, capability: int) -> Any:
    names = case.kernel.arg_names
    # Arguments that are neither typed nor constants of the case are None.
    constants: dict[str, Any] = {name: None for name in names if name not in case.types}
    constants |= case.constants
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if (name == "chunk_rows" and name not in case.kernel.do_not_specialize)
        or str(signature[name]).startswith("*")
    }
    return triton.compile(
        ASTSource(case.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=(case.before_hopper if capability < 90 else None) or case.options,
    )


def main(operation: str, capability: str) -> None:
    for case in OPERATIONS[operation]():
        compiled = compile_case(case, int(capability))
        row = {"case": case.name, "warps": case.options["num_warps"]}
        if case.types.get("partial_ptr") and case.kernel in _READ_AGAIN:
            row["waits"] = _waits_before_reading_again(compiled.asm["ptx"])
        print(json.dumps({**row, "shared_bytes": compiled.metadata.shared}))


# Products whose threads read again what other threads have stored.
_READ_AGAIN = (conv_forward._folded_conv2d_fwd_kernel, conv_backward._folded_conv2d_dgrad_kernel)


def _waits_before_reading_again(ptx: str) -> bool:
    """Whether a barrier stands between the first stores to memory and the loads behind them."""
    stored = re.search(r"\bst\.global", ptx)
    behind = ptx[stored.start() :] if stored else ""
    read, wait = re.search(r"\bld\.global", behind), re.search(r"\bbar\.sync", behind)
    return read is not None and wait is not None and wait.start() < read.start()


if __name__ == "__main__":
    main(*sys.argv[1:])
