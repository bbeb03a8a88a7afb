"""Block sizes and compiler options of the Triton kernels of the loss."""

from __future__ import annotations

from typing import Any

import triton

from rsfast.kernels.common.tiles import MULTIPROCESSORS

__all__ = ["is_tall", "num_programs", "options", "row_options", "row_tile", "tile"]

# Up to this many classes all rows of an image stay in registers (keyed by whether there are more
# than four), above it they are read twice, in smaller blocks.
MAX_BLOCK_K = {False: 2048, True: 1024}
LOOP_BLOCK_K = 512

# Warps by (BLOCK_K, more than four rows): at most 8 logits of a row per thread, 4 of many rows.
# Free of spills on sm_80 and sm_90 (tests/kernels/test_compile_ahead.py); not timed on a GPU yet.
_NUM_WARPS = {
    (256, False): 1,
    (256, True): 2,
    (512, False): 4,
    (512, True): 4,
    (1024, False): 4,
    (1024, True): 8,
    (2048, False): 8,
}

# From so many rows on, tiles of several rows: fewer are at work in one wave of programs for each.
MANY_ROWS = 4096
_MOST_CLASSES = 256
# Logits of a tile, by whether there are more than three levels: 8 or 4 for each thread. Half
# where rows do not begin at multiples of four: each logit of a thread is of another row then, and
# what is known of a row takes as many registers as a logit.
_TILE_ELEMENTS = {False: 1024, True: 512}
_MOST_ROWS = 128  # one for each thread
_ROW_WARPS = 4
ROW_PROGRAMS = 3  # of a multiprocessor at a time; not timed on a GPU yet


def tile(num_resolutions: int, num_classes: int) -> tuple[int, int]:
    """(BLOCK_K, num_warps) for R rows of K logits."""
    many = num_resolutions > 4
    one_block = num_classes <= MAX_BLOCK_K[many]
    block_k = triton.next_power_of_2(num_classes) if one_block else LOOP_BLOCK_K
    return block_k, _NUM_WARPS[max(block_k, 256), many]


def is_tall(num_resolutions: int, num_rows: int, num_classes: int) -> bool:
    """Whether rows go in tiles of several: there are many, and several fit into a tile."""
    if num_rows < MANY_ROWS or num_classes > _MOST_CLASSES:
        return False
    return row_tile(num_resolutions, num_classes)[0] > 1


def row_tile(num_resolutions: int, num_classes: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_K) for many rows."""
    block_k = triton.next_power_of_2(num_classes)
    elements = _TILE_ELEMENTS[num_resolutions > 3] // (2 if num_classes % 4 else 1)
    return min(elements // block_k, _MOST_ROWS), block_k


def num_programs(num_resolutions: int, num_rows: int, num_classes: int) -> int:
    """Programs for many rows: one wave, if there are tiles enough."""
    block_m, _ = row_tile(num_resolutions, num_classes)
    return min(ROW_PROGRAMS * MULTIPROCESSORS, triton.cdiv(num_rows, block_m))


def row_options() -> dict[str, Any]:
    """How Triton is to compile the kernel for many rows."""
    return options(_ROW_WARPS, ROW_PROGRAMS)


def options(num_warps: int, programs: int = 1) -> dict[str, Any]:
    """How Triton is to compile a kernel of which so many programs are to fit at a time."""
    return {
        "num_warps": num_warps,
        # All registers there are: left alone, ptxas spills a few bytes to fit more programs onto a
        # multiprocessor, and with one for each image there are only N of them.
        "maxnreg": min(255, 65536 // (32 * num_warps * programs) // 8 * 8),
        # Without it Triton drops the assertion on the labels; its overflow checks are not wanted.
        "debug": True,
        "sanitize_overflow": False,
        "enable_fp_fusion": True,  # Triton 3.10 is to stop it by default
    }
