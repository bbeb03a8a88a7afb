"""RandAugment's operations by DALI, on a CPU or a GPU: near to Pillow's, step by step.

Of each operation only the images that it is drawn for are computed: the batch is split before it
and merged behind it, which moves no pixel. Pillow rounds results of its enhancements down, so that
is done here, too. On a CPU the pictures are Pillow's bit for bit, with two exceptions: sharpness at
the outermost pixels of a crop, which Pillow leaves as they are while DALI mirrors what lies behind
them, and about one pixel in 1000 of a rotated picture, whose source lies between two pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
from nvidia.dali import math, types

from rsfast.data.operations import (
    OPERATIONS,
    Operations,
    is_geometric,
    posterize_mask,
    solarize_threshold,
    source_matrix,
)

__all__ = ["fields_of", "num_fields", "operated"]

# What is computed by one branch of the graph.
_BRANCHES = ("identity", "move", *(n for n in OPERATIONS[1:] if not is_geometric(n)))
_BRANCH_OF = np.array(
    [_BRANCHES.index("move" if is_geometric(name) else name) for name in OPERATIONS], dtype=np.int32
)
_GREY = np.array([19595, 38470, 7471], dtype=np.int32)  # in 2**16ths, Pillow's
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
_filter = getattr(fn, "filter", None) or fn.experimental.filter  # as older releases call it
_equalize = getattr(fn, "equalize", None) or fn.experimental.equalize


def num_fields(operations: int, windows: int) -> int:
    """Of an external source: so many arrays tell a graph what to do."""
    return operations * (2 + windows)


def fields_of(operations: Operations, shapes: np.ndarray) -> list[np.ndarray]:
    """What a graph is told of a batch.

    Args:
        operations: of N images.
        shapes: [W, N, 2] height and width of the windows of each image.

    Returns:
        For each operation of the row: [N] int32 branch, [N] float32 amount, and for each window
        [N, 2, 3] float32 matrix.
    """
    fields = []
    for numbers, amounts in zip(operations.numbers.T, operations.amounts.T, strict=True):
        fields += [_BRANCH_OF[numbers], amounts.astype(np.float32)]
        for windows in shapes.tolist():
            drawn = zip(numbers, amounts, windows, strict=True)
            matrices = [source_matrix(OPERATIONS[k], a, *shape) for k, a, shape in drawn]
            fields.append(np.stack(matrices).astype(np.float32))
    return fields


def operated(regions: list, fields: list, magnitude: int, on_gpu: bool) -> list:
    """The windows of a batch after all operations.

    Args:
        regions: W batches of windows.
        fields: as `fields_of` orders them.
        magnitude: of the operations without an amount.
        on_gpu: where the windows are.
    """
    per_operation = 2 + len(regions)
    # Arrays are batches, too, and are split like them.
    where = "gpu" if on_gpu else "cpu"
    constants = {
        "grey": types.Constant(_GREY, device=where),
        "smooth": types.Constant(_SMOOTH, device=where),
    }
    for start in range(0, len(fields), per_operation):
        branch, amount, *matrices = fields[start : start + per_operation]
        there = amount.gpu() if on_gpu else amount
        regions = [
            _operate(region, branch, there, matrix, magnitude, constants)
            for region, matrix in zip(regions, matrices, strict=True)
        ]
    return regions


def _operate(
    images: Any, branch: Any, amount: Any, matrix: Any, magnitude: int, constants: dict[str, Any]
) -> Any:
    for number, name in enumerate(_BRANCHES):
        if name == "identity":
            continue
        drawn = branch == number
        chosen, others = _split(images, drawn)
        if name == "move":
            changed = _move(chosen, _split(matrix, drawn)[0])
        elif name in _WITH_AMOUNT:
            enhance, constant = _WITH_AMOUNT[name]
            more = [amount] if constant is None else [amount, constants[constant]]
            changed = enhance(chosen, *(_split(part, drawn)[0] for part in more))
        elif name == "posterize":
            changed = chosen & types.Constant(posterize_mask(magnitude), dtype=types.UINT8)
        elif name == "solarize":
            changed = _solarize(chosen, solarize_threshold(magnitude))
        else:
            changed = _autocontrast(chosen) if name == "autocontrast" else _equalize(chosen)
        images = fn._conditional.merge(changed, others, predicate=drawn)
    return images


def _split(batch: Any, predicate: Any) -> Any:
    """The samples for which it holds, and the others: what DALI makes of an `if`."""
    return fn._conditional.split(batch, predicate=predicate, _if_stmt=True)


def _move(images: Any, matrix: Any) -> Any:
    return fn.warp_affine(
        images, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0, inverse_map=True
    )


def _blend(duller: Any, images: Any, factor: Any) -> Any:
    """From a duller picture (factor 0) to this one (1) and beyond, rounded down as Pillow does."""
    duller = fn.cast(duller, dtype=types.FLOAT)
    return _down(duller + factor * (fn.cast(images, dtype=types.FLOAT) - duller))


def _down(values: Any) -> Any:
    return fn.cast(math.floor(values), dtype=types.UINT8)


def _grey(images: Any, weights: Any) -> Any:
    """[H, W, 1] int32."""
    weighted = fn.reductions.sum(images * weights, axes=2, keep_dims=True)
    return (weighted + 32768) // 65536


def _brightness(images: Any, factor: Any) -> Any:
    return _down(images * factor)


def _color(images: Any, factor: Any, weights: Any) -> Any:
    return _blend(_grey(images, weights), images, factor)


def _contrast(images: Any, factor: Any, weights: Any) -> Any:
    mean = fn.reductions.mean(_grey(images, weights), axes=(0, 1, 2), keep_dims=True)
    return _blend(math.floor(mean + 0.5), images, factor)


def _sharpness(images: Any, factor: Any, smooth: Any) -> Any:
    return _blend(_filter(images, smooth), images, factor)


def _solarize(images: Any, threshold: float) -> Any:
    kept = images < threshold
    return kept * images + (kept ^ True) * (types.Constant(255, dtype=types.UINT8) - images)


def _autocontrast(images: Any) -> Any:
    low = fn.cast(fn.reductions.min(images, axes=(0, 1), keep_dims=True), dtype=types.FLOAT)
    high = fn.cast(fn.reductions.max(images, axes=(0, 1), keep_dims=True), dtype=types.FLOAT)
    flat = high == low  # such a channel stays as it is
    scale = (255.0 * (flat ^ True) + flat) / (high - low + flat)
    return _down((fn.cast(images, dtype=types.FLOAT) - low * (flat ^ True)) * scale + 1e-4)


# With the array that each needs besides.
_WITH_AMOUNT: dict[str, tuple[Callable[..., Any], str | None]] = {
    "brightness": (_brightness, None),
    "color": (_color, "grey"),
    "contrast": (_contrast, "grey"),
    "sharpness": (_sharpness, "smooth"),
}
