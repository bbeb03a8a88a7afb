"""The configurations of every Triton kernel, compiled for GPUs without a GPU.

`python tests/kernels/compile_ahead.py --write` writes registers.json anew: registers, shared memory
and warps of each configuration. Run as `compile_ahead.py OPERATION CAPABILITY` with names of cases
as JSON on standard input, it prints one JSON line for each; so run the tests, in a process of its
own because Triton may be in interpreter mode in that of the tests. With TRITON_DUMP_PTXAS_LOG=1,
ptxas prints its log, with registers and spills, before each line.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rsfast.kernels import DISTILL_MODES
from rsfast.kernels.bn_act_max_pool import backward as max_pool_backward
from rsfast.kernels.bn_act_max_pool import forward as max_pool_forward
from rsfast.kernels.bn_act_max_pool import tiles as max_pool_tiles
from rsfast.kernels.common.launch import OPTIONS
from rsfast.kernels.common.tiles import tile as bn_tile
from rsfast.kernels.distillation_loss import forward as loss
from rsfast.kernels.distillation_loss import many_rows as loss_rows
from rsfast.kernels.distillation_loss import tiles as loss_tiles
from rsfast.kernels.distillation_loss.op import teacher_range
from rsfast.kernels.global_avg_pool import backward as pool_backward
from rsfast.kernels.global_avg_pool import forward as pool_forward
from rsfast.kernels.global_avg_pool import tiles as pool_tiles
from rsfast.kernels.lq_activation import backward as lq_backward
from rsfast.kernels.lq_activation import forward as lq_forward
from rsfast.kernels.lq_activation import move as lq_move
from rsfast.kernels.lq_activation import tiles as lq_tiles
from rsfast.kernels.normalize import forward as pixels
from rsfast.kernels.subsample import backward as subsample_backward
from rsfast.kernels.subsample import forward as subsample_forward
from rsfast.kernels.subsample import tiles as subsample_tiles

_TESTS = str(Path(__file__).parents[1])
if _TESTS not in sys.path:  # pytest has put it there; a command, or bench, has not
    sys.path.insert(0, _TESTS)

import register_table  # noqa: E402
from kernel_cases import (  # noqa: E402
    NUM_LEVELS,
    TORCH_TYPES,
    Case,
    bn_types,
    switchable_bn_act,
)


def distillation_loss() -> Iterator[Case]:
    modes = [*((mode, "bf16") for mode in DISTILL_MODES), ("full", "fp16"), ("full", "fp32")]
    passes = [(True, False), (False, True), (True, True)]  # writes terms, gradients
    # Every tile: few and many rows, one block of each size and the loop over several.
    sizes = [(5, 1000), *itertools.product((4, 8), (10, 200, 500, 1000, 2000, 32768)), (1, 1)]
    for (resolutions, classes), (mode, dtype), written, more in itertools.product(
        sizes, modes, passes, ("", " mix", " ignore")
    ):
        special = mode != "full" or dtype == "fp16"
        if special and (more or (resolutions, classes) != (5, 1000)):
            continue
        tiles = ((4, 2000), (8, 1000), (8, 32768))
        if more == " ignore" and (dtype == "fp32" or (resolutions, classes) not in tiles):
            continue
        block_k, num_warps = loss_tiles.tile(resolutions, classes)
        types, constants = _of_loss(resolutions, classes, mode, dtype, written, more == " ignore")
        types |= {"stride_terms_n": "i32", "stride_dalpha_n": "i32"}
        if more == " mix":
            types |= {"partner_labels_ptr": "*i64", "share_ptr": "*fp32"}
        terms, grads = written
        yield Case(
            f"R={resolutions} K={classes} {mode} {dtype} terms={terms} grads={grads}{more}",
            loss._distillation_loss_kernel,
            types,
            {**constants, "BLOCK_K": block_k, "HAS_MIX": more == " mix"},
            loss_tiles.options(num_warps),
        )
    yield from _distillation_loss_of_pixels(passes)


def _distillation_loss_of_pixels(passes: Sequence[tuple[bool, bool]]) -> Iterator[Case]:
    # Few and many levels, rows that begin at multiples of 16 bytes and others; 40 classes are those
    # of NYUDv2.
    sizes = [(3, 2), (3, 11), (3, 40), (3, 65), (3, 150), (8, 11), (8, 40), (8, 65), (1, 1)]
    kinds = [("fp32", "full", True), ("fp32", "full", False), ("bf16", "full", True)]
    kinds += [("fp32", mode, True) for mode in DISTILL_MODES if mode != "full"]
    for (resolutions, classes), (dtype, mode, ignore), written in itertools.product(
        sizes, kinds, passes
    ):
        plain = (dtype, mode, ignore) == ("fp32", "full", True)
        if not plain and (
            (resolutions, classes) != (3, 40) or (mode != "full" and not all(written))
        ):
            continue
        block_m, block_k = loss_tiles.row_tile(resolutions, classes)
        types, constants = _of_loss(resolutions, classes, mode, dtype, written, ignore)
        types |= dict.fromkeys(["stride_terms_p", "stride_dalpha_p", "num_rows"], "i32")
        terms, grads = written
        yield Case(
            f"pixels R={resolutions} K={classes} {mode} {dtype} terms={terms} grads={grads}"
            + (" ignore" if ignore else ""),
            loss_rows._distillation_loss_rows_kernel,
            types,
            {**constants, "BLOCK_M": block_m, "BLOCK_K": block_k},
            loss_tiles.row_options(),
            loss_tiles.ROW_PROGRAMS,
        )


def _of_loss(
    resolutions: int, classes: int, mode: str, dtype: str, written: tuple[bool, bool], ignore: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Types and constants that both kernels of the loss have."""
    terms, grads = written
    first, last, _ = teacher_range(mode, resolutions)
    types = {"logits_ptr": "*" + dtype, "alpha_ptr": "*fp32", "stride_upstream": "i32"}
    types |= dict.fromkeys(["hit_target", "miss_target", "teacher_weight"], "fp32")
    types |= {"labels_ptr": "*u8", "counted_ptr": "*i64"} if ignore else {"labels_ptr": "*i64"}
    if terms:
        types |= {"terms_ptr": "*fp32"}
    if grads:
        types |= {"upstream_ptr": "*fp32", "dlogits_ptr": "*" + dtype, "dalpha_ptr": "*fp32"}
    constants = {"R": resolutions, "K": classes, "FIRST_TEACHER": first, "LAST_TEACHER": last}
    constants |= {"HAS_IGNORE": ignore, "IGNORE_INDEX": 255 if ignore else None}
    return types, {**constants, "WRITE_TERMS": terms, "WRITE_GRADS": grads}


def global_avg_pool() -> Iterator[Case]:
    levels = {"level_rows": ("i32",) * NUM_LEVELS, "num_images": "i32"}
    kernels = {
        pool_forward._global_avg_pool_fwd_kernel: ("x_ptr", "y_ptr"),
        pool_backward._global_avg_pool_bwd_kernel: ("dy_ptr", "dx_ptr"),
    }
    for channels, dtype, (kernel, names) in itertools.product(
        (3, 24, 48, 65, 2048), ("bf16", "fp32"), kernels.items()
    ):
        block_p, block_c = pool_tiles.tile(channels)
        yield Case(
            f"{kernel.__name__} C={channels} {dtype}",
            kernel,
            {**dict.fromkeys(names, "*" + dtype), **levels},
            {"L": NUM_LEVELS, "C": channels, "BLOCK_P": block_p, "BLOCK_C": block_c},
            OPTIONS,
        )


def lq_activation() -> Iterator[Case]:
    bits = (1, 2, 3, 4)
    shapes = [(64, "bf16", bits), (64, "fp32", bits), (2048, "bf16", (2,)), (512, "fp16", (2,))]
    shapes += [(65, "bf16", (2, 4)), (3, "fp32", bits)]
    for channels, dtype, all_bits in shapes:
        for k in all_bits:
            yield from _lq_activation_fwd(channels, dtype, k)
        yield _lq_activation_bwd(channels, dtype)
    for k in bits:
        yield from _lq_move(k)


def _lq_activation_fwd(channels: int, dtype: str, bits: int) -> Iterator[Case]:
    common = bn_types(channels, NUM_LEVELS, lq_tiles.tile_elements(bits))
    types = {"x_ptr": "*" + dtype, "basis_ptr": "*fp32", "y_ptr": "*" + dtype, **common.levels}
    kernel = lq_forward._lq_activation_fwd_kernel
    launch = lq_forward.OPTIONS[bits], lq_tiles.NUM_PROGRAMS[bits]
    # Training, evaluation, and gradients where the basis stays.
    for mask, sums in ((True, True), (False, False), (True, False)):
        more = {"mask_ptr": "*u8"} if mask else {}
        more |= {"counts_ptr": "*i32", "sums_ptr": "*fp32"} if sums else {}
        constants = {**common.tile, "K": bits, "WRITE_MASK": mask, "WRITE_SUMS": sums}
        name = f"{kernel.__name__} C={channels} {dtype} K={bits} {mask=} {sums=}"
        yield Case(name, kernel, {**types, **more}, constants, *launch)


def _lq_activation_bwd(channels: int, dtype: str) -> Case:
    common, kernel = bn_types(channels, 1), lq_backward._lq_activation_bwd_kernel
    types = {"dy_ptr": "*" + dtype, "mask_ptr": "*u8", "dx_ptr": "*" + dtype, **common.levels}
    launch = lq_backward.OPTIONS, lq_backward.PROGRAMS
    return Case(f"{kernel.__name__} C={channels} {dtype}", kernel, types, common.tile, *launch)


def _lq_move(bits: int) -> Iterator[Case]:
    shape = dict.fromkeys(["share_rows", "groups", "num_programs"], "i32")
    shape |= {"level_rows": ("i32",) * NUM_LEVELS}
    partial, by_code = {"counts_ptr": "*i32", "sums_ptr": "*fp32"}, {"by_code_ptr": "*fp64"}
    constants = {"L": NUM_LEVELS, "K": bits, "BLOCK_P": lq_move.BLOCK_P}
    kernel = lq_move._lq_code_sums_kernel
    types = {**shape, **partial, **by_code}
    yield Case(f"{kernel.__name__} K={bits}", kernel, types, constants, OPTIONS)
    constants = {**constants, "SIZE": lq_move.size_of(bits), **lq_move.CONSTANTS}
    types, kernel = {**shape, "basis_ptr": "*fp32", "updates_ptr": "*i64"}, lq_move._lq_move_kernel
    for moving, found in ((NUM_LEVELS, partial), (NUM_LEVELS, by_code), (1, partial)):
        given = {"MOVING": moving, "FROM_PARTIAL": found is partial}
        name = f"{kernel.__name__} K={bits} {moving=} partial={found is partial}"
        yield Case(name, kernel, {**types, **found}, {**constants, **given}, OPTIONS)


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


def subsample() -> Iterator[Case]:
    maps = dict.fromkeys(("heights", "widths"), ("i32",) * NUM_LEVELS) | {"num_images": "i32"}
    kernels = {
        subsample_forward._subsample_fwd_kernel: ("x_ptr", "y_ptr"),
        subsample_backward._subsample_bwd_kernel: ("dy_ptr", "dx_ptr"),
        subsample_backward._subsample_add_kernel: ("dy_ptr", "dx_ptr"),
    }
    shapes = [(256, "bf16", (2, 2)), (256, "fp32", (2, 2)), (64, "bf16", (2, 2))]
    shapes += [(65, "bf16", (2, 1)), (24, "bf16", (3, 3)), (3, "fp32", (1, 4))]
    for (channels, dtype, stride), (kernel, names) in itertools.product(shapes, kernels.items()):
        down, right = stride
        block_p, block_c = subsample_tiles.tile(channels)
        constants = {"L": NUM_LEVELS, "C": channels, "DOWN": down, "RIGHT": right}
        yield Case(
            f"{kernel.__name__} C={channels} {dtype} {down}x{right}",
            kernel,
            {**dict.fromkeys(names, "*" + dtype), **maps},
            {**constants, "BLOCK_P": block_p, "BLOCK_C": block_c},
            OPTIONS,
        )


def bn_act_max_pool() -> Iterator[Case]:
    names = ("level_rows", "banks", "heights", "widths")
    levels = dict.fromkeys(names, ("i32",) * NUM_LEVELS) | {"share_rows": "i32", "eps": "fp32"}
    affine = dict.fromkeys(["mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr"], "*fp32")
    forward = max_pool_forward._bn_act_max_pool_fwd_kernel
    backward = max_pool_backward._bn_act_max_pool_bwd_kernel
    launch = max_pool_tiles.OPTIONS, max_pool_tiles.PROGRAMS
    shapes = {(64, "bf16"): (None, "relu"), (64, "fp16"): ("relu",), (64, "fp32"): ("relu",)}
    shapes |= {(65, "bf16"): ("relu6",)}
    for ((channels, dtype), activations), batch in itertools.product(shapes.items(), (True, False)):
        rows = "*" + dtype
        block_m, block_c = bn_tile(channels, max_pool_tiles.tile_elements(TORCH_TYPES[dtype]))
        constants = {"L": NUM_LEVELS, "C": channels, "BATCH_STATISTICS": batch}
        constants |= {"BLOCK_M": block_m, "BLOCK_C": block_c}
        label = f"C={channels} {dtype} {batch=}"
        types = {"x_ptr": rows, "largest_ptr": "*u8", "num_images": "i32", **affine, **levels}
        for activation in activations:
            yield Case(
                f"{forward.__name__} {label} {activation}",
                forward,
                {**types, "y_ptr": rows},
                {**constants, "ACTIVATION": activation},
                *launch,
            )
        types |= {"dy_ptr": rows}
        for more in ({"partial_ptr": "*fp32"}, {"sums_ptr": "*fp32", "dx_ptr": rows}):
            writes = {"WRITE_DX": "dx_ptr" in more}
            name = f"{backward.__name__} {label} {writes}"
            yield Case(name, backward, {**types, **more}, {**constants, **writes}, *launch)


OPERATIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "bn_act_max_pool": bn_act_max_pool,
    "distillation_loss": distillation_loss,
    "global_avg_pool": global_avg_pool,
    "lq_activation": lq_activation,
    "normalize": normalize,
    "subsample": subsample,
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
        if str(signature[name]).startswith("*")
    }
    return triton.compile(
        ASTSource(case.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=case.options,
    )


def main(operation: str, capability: str) -> None:
    cases = {case.name: case for case in OPERATIONS[operation]()}
    for name in json.load(sys.stdin):
        compiled = compile_case(cases[name], int(capability))
        row = {"case": name, "warps": cases[name].options["num_warps"]}
        print(json.dumps({**row, "shared_bytes": compiled.metadata.shared}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        register_table.main(OPERATIONS, sys.argv[1:])
    else:
        main(*sys.argv[1:])
