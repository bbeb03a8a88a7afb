"""Block sizes and compiler options of the Triton kernel of the loss."""

from __future__ import annotations

from typing import Any

import triton

__all__ = ["options", "tile"]

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


def tile(num_resolutions: int, num_classes: int) -> tuple[int, int]:
    """(BLOCK_K, num_warps) for R rows of K logits."""
    many = num_resolutions > 4
    one_block = num_classes <= MAX_BLOCK_K[many]
    block_k = triton.next_power_of_2(num_classes) if one_block else LOOP_BLOCK_K
    return block_k, _NUM_WARPS[max(block_k, 256), many]


def options(num_warps: int) -> dict[str, Any]:
    """How Triton is to compile the kernel."""
    return {
        "num_warps": num_warps,
        # All registers there are: left alone, ptxas spills a few bytes to fit more programs onto a
        # multiprocessor, and there are only N of them.
        "maxnreg": min(255, 65536 // (32 * num_warps)),
        # Without it Triton drops the assertion on the labels; its overflow checks are not wanted.
        "debug": True,
        "sanitize_overflow": False,
        "enable_fp_fusion": True,  # Triton 3.10 is to stop it by default
    }
