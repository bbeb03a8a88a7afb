"""How windows, of a convolution or a pooling, move over maps, and how large they leave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["Geometry", "IntOrPair", "conv2d_sizes", "geometry_of"]

IntOrPair = int | Sequence[int]


class Geometry(NamedTuple):
    """Pairs, for the height and the width."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def geometry_of(stride: IntOrPair, padding: IntOrPair, dilation: IntOrPair) -> Geometry:
    """Numbers and pairs, as `F.conv2d` takes them, as pairs.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    return Geometry(
        stride=_pair("stride", stride, 1),
        padding=_pair("padding", padding, 0),
        dilation=_pair("dilation", dilation, 1),
    )


def conv2d_sizes(
    sizes: Sequence[tuple[int, int]],
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
) -> tuple[tuple[int, int], ...]:
    """Sizes of the levels behind a convolution or a pooling.

    Args:
        sizes: (H, W) of each level.
        kernel_size: k, (k_h, k_w), or the shape of a weight, which ends in them.
        stride: as in `F.conv2d`, like what follows.
        padding: zeros at either end.
        dilation: distance between the pixels that a kernel reads.

    Returns:
        (H', W') of each level, with H' = (H + 2 padding - dilation (k_h - 1) - 1) // stride + 1.

    Raises:
        ValueError: if a level would have no pixels left, naming it, or naming the argument.
    """
    kernel = kernel_size if isinstance(kernel_size, int) else tuple(kernel_size)[-2:]
    window = _pair("kernel_size", kernel, 1)
    geometry = geometry_of(stride, padding, dilation)
    axes = list(zip(window, *geometry, strict=True))
    results = []
    for level, size in enumerate(sizes):
        height, width = (
            (length + 2 * pad - gap * (k - 1) - 1) // step + 1
            for length, (k, step, pad, gap) in zip(size, axes, strict=True)
        )
        if min(height, width) < 1:
            raise ValueError(
                f"level {level} of {size[0]}x{size[1]} pixels has none left behind a kernel of "
                f"{window[0]}x{window[1]} with padding {tuple(geometry.padding)} and "
                f"dilation {tuple(geometry.dilation)}"
            )
        results.append((height, width))
    return tuple(results)


def _pair(name: str, value: IntOrPair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    # While a compiler traces with sizes unknown, those of a weight are SymInt.
    if len(pair) != 2 or not all(isinstance(n, int | torch.SymInt) and n >= least for n in pair):
        raise ValueError(f"{name} must be an int or two, at least {least}, got {value!r}")
    return pair[0], pair[1]
