"""Compiles the kernels of one operation for one GPU, without a GPU: one JSON line each.

Run as `python compile_ahead.py OPERATION CAPABILITY` by test_compile_ahead.py, in a process of its
own because Triton may be in interpreter mode in that of the tests. With TRITON_DUMP_PTXAS_LOG=1,
ptxas prints its log, with registers and spills, before each line.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rsfast.kernels import DISTILL_MODES
from rsfast.kernels import _bn_backward as bn_backward
from rsfast.kernels import _bn_forward as bn_forward
from rsfast.kernels import _bn_tiles as bn_tiles
from rsfast.kernels import _distillation_loss_triton as loss
from rsfast.kernels import _global_avg_pool_triton as pool
from rsfast.kernels import _normalize_triton as pixels
from rsfast.kernels.distillation_loss import _teacher_range

NUM_LEVELS = 5


class Case(NamedTuple):
    """One kernel to compile: types of its run-time arguments, and its constants."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]


def distillation_loss() -> Iterator[Case]:
    modes = [(mode, "bf16") for mode in DISTILL_MODES] + [("full", "fp32")]
    passes = [(True, False), (False, True), (True, True)]  # writes terms, gradients
    # Every tile: few and many rows, one block of each size and the loop over several.
    sizes = [(5, 1000), *itertools.product((4, 8), (10, 500, 1000, 2000, 32768))]
    for (resolutions, classes), (mode, dtype), (terms, grads) in itertools.product(
        sizes, modes, passes
    ):
        if (resolutions, classes) != (5, 1000) and mode != "full":
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
            pool.OPTIONS,
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
            pixels.OPTIONS,
        )


def switchable_bn_act() -> Iterator[Case]:
    levels = {
        "level_rows": ("i32",) * NUM_LEVELS,
        "banks": ("i32",) * NUM_LEVELS,
        "chunk_rows": "i32",
    }
    # Every tile width, with and without channels to mask; the widest ones in float32 too.
    sizes = [(3, "bf16"), (64, "bf16"), (65, "bf16"), (96, "bf16"), (2047, "bf16"), (2048, "bf16")]
    for channels, dtype in [*sizes, (64, "fp32"), (2048, "fp32")]:
        for case in _switchable_bn_act(channels, "*" + dtype, levels):
            yield case._replace(name=f"{case.kernel.__name__} C={channels} {dtype} {case.name}")
    # Triton makes a constant of a run-time 1.
    one = {
        "level_rows": ("i32", "constexpr"),
        "banks": ("i32", "constexpr"),
        "chunk_rows": "i32",
    }
    for case in _switchable_bn_act(64, "*bf16", one, num_levels=2):
        constants = {("level_rows", 1): 1, ("banks", 1): 1, **case.constants}
        yield case._replace(name=f"{case.kernel.__name__} ones", constants=constants)


def _switchable_bn_act(
    channels: int, rows: str, levels: dict[str, Any], num_levels: int = NUM_LEVELS
) -> Iterator[Case]:
    block_m, block_c = bn_tiles.tile(channels)
    sizes = {"L": num_levels, "C": channels}
    tile = {**sizes, "BLOCK_M": block_m, "BLOCK_C": block_c}
    block_k, final_c = bn_tiles.finalize_tile(channels)
    final = {**sizes, "BLOCK_K": block_k, "BLOCK_C": final_c}
    partial = {"partial_ptr": "*fp32", **levels}
    moments = dict.fromkeys(["mean_ptr", "var_ptr"], "*fp32")
    running = dict.fromkeys(["running_mean_ptr", "running_var_ptr"], "*fp32")
    affine = {**moments, "gamma_ptr": "*fp32", "eps": "fp32", **levels}
    options = bn_tiles.OPTIONS
    yield Case("", bn_forward._bn_statistics_kernel, {"x_ptr": rows, **partial}, tile, options)
    types = {"x_ptr": rows, **partial, **moments, **running}
    types |= {"num_batches_ptr": "*i64", "num_chunks": "i32", "momentum": "fp32"}
    yield Case("", bn_forward._bn_finalize_kernel, types, final, options)
    types = {**partial, **affine, "num_chunks": "i32"}
    types |= dict.fromkeys(["sums_ptr", "dgamma_ptr", "dbeta_ptr"], "*fp32")
    constants = {**final, "BATCH_STATISTICS": True}
    yield Case("", bn_backward._bn_bwd_finalize_kernel, types, constants, options)
    for activation, residual, batch in (
        (None, False, True),
        ("relu", False, True),
        ("relu", True, True),
        ("relu6", True, False),
    ):
        name = f"{activation} residual={residual} batch={batch}"
        types = {**affine, "beta_ptr": "*fp32", "x_ptr": rows}
        mask = {"mask_ptr": "*u8"} if residual else {}
        constants = {**tile, "BATCH_STATISTICS": batch, "ACTIVATION": activation}
        yield Case(
            name,
            bn_forward._bn_apply_kernel,
            {**types, **mask, "y_ptr": rows, **({"residual_ptr": rows} if residual else {})},
            {**constants, "HAS_RESIDUAL": residual, "WRITE_MASK": residual},
            options,
        )
        types |= {**mask, "dy_ptr": rows}
        constants["HAS_MASK"] = residual
        reduce_types = {**types, "partial_ptr": "*fp32"}
        yield Case(name, bn_backward._bn_bwd_reduce_kernel, reduce_types, constants, options)
        types |= {"sums_ptr": "*fp32", "dx_ptr": rows}
        types |= {"dresidual_ptr": rows} if residual else {}
        constants |= {"WRITE_DRESIDUAL": residual}
        yield Case(name, bn_backward._bn_bwd_apply_kernel, types, constants, options)


OPERATIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "distillation_loss": distillation_loss,
    "global_avg_pool": global_avg_pool,
    "normalize": normalize,
    "switchable_bn_act": switchable_bn_act,
}


def compile_case(case: Case, capability: int) -> Any:
    names = case.kernel.arg_names
    # Arguments that are neither typed nor constants of the case are None.
    constants = {name: None for name in names if name not in case.types}
    for key, value in case.constants.items():
        path = (names.index(key[0]), key[1]) if isinstance(key, tuple) else key
        constants[path] = value
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if isinstance(signature[name], str) and signature[name].startswith("*")
    }
    return triton.compile(
        ASTSource(case.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=case.options,
    )


def main(operation: str, capability: str) -> None:
    for case in OPERATIONS[operation]():
        compiled = compile_case(case, int(capability))
        row = {"case": case.name, "warps": case.options["num_warps"]}
        print(json.dumps({**row, "shared_bytes": compiled.metadata.shared}))


if __name__ == "__main__":
    main(*sys.argv[1:])
