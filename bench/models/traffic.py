"""What batch norm reads and writes by itself in a step, computed: `python -m bench.models.traffic`.

Beyond what the convolutions read and write anyway, with the stem's pooling, in MB per image at all
its resolutions, forward and backward, in 16 bits. Nothing is measured; no GPU is needed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from bench.support.shapes import PAPER_RESOLUTIONS, BatchNormLayer, batch_norm_of, calls

__all__ = [
    "KINDS",
    "by_kind",
    "cached",
    "elements",
    "main",
    "one_launch",
    "passes",
    "pooling_apart",
    "rsfast",
]

# The norm of the stem; the first, second and last of a bottleneck; that of a shortcut.
KINDS = ("stem", "bn1", "bn2", "bn3", "shortcut")
_ON_CHIP = 132 * 6 * 2**15  # bytes that the rings of csrc hold on an H100 or H200
# Bytes of an H100's L2 cache, of 50 MB, that hold what was used last: an assumption.
_L2 = 40e6
_SLICE = 128  # bytes of a row in a slice of 64 channels
_BATCHES = (256, 64, 32)


def passes(layer: BatchNormLayer) -> tuple[float, float]:
    """Elements that rsfast's kernels move for one of the map, forward and backward, in 16 bits.

    Forward they read x for the statistics and once more, and write y; backward they read x and dy
    twice and write dx. A residual is read, and its gradient written unless that is dy itself.
    Behind pooling, y and dy are a quarter of the map, each with an index of one byte.
    """
    if layer.pooled:
        end = 0.25 + 0.125
        return 1 + 1 + end, 2 * (1 + end) + 1
    own_gradient = layer.residual and layer.activation is not None
    return 3 + layer.residual, 5 + own_gradient


def elements(layer: BatchNormLayer) -> int:
    """Of the map, for one image."""
    return sum(layer.level_rows(1)) * layer.channels


def rsfast(layer: BatchNormLayer) -> float:
    """Elements moved per image by the kernels of backend "triton"."""
    return elements(layer) * sum(passes(layer))


def cached(layer: BatchNormLayer, batch: int, l2: float = _L2) -> float:
    """As :func:`rsfast`, without what the second pass of each direction finds in the L2 cache.

    It goes backwards over what the first pass read. What it reads again at some distance from the
    end is still there if all that was used since fits: the same distance in every tensor.
    """
    moved = 0.0
    for total, again in zip(passes(layer), (1.0, 1.375 if layer.pooled else 2.0), strict=True):
        reached = min(elements(layer), l2 / 2 / (total - again) / batch)
        moved += elements(layer) * total - reached * again
    return moved


def pooling_apart(layer: BatchNormLayer) -> float:
    """As :func:`rsfast`, with PyTorch's pooling, which keeps indices of 8 bytes, after the norm.

    It reads 1, writes 1/4 and the indices; backward it reads both and writes 1.
    """
    if not layer.pooled:
        return rsfast(layer)
    pooling = 1 + 0.25 + 1 + 0.25 + 1 + 1
    return elements(layer) * (sum(passes(layer._replace(pooled=False))) + pooling)


def one_launch(layer: BatchNormLayer, batch: int, on_chip: int = _ON_CHIP) -> float:
    """Elements moved per image by backend "cuda", which reads once what the chip can hold.

    The stem is left to backend "triton".
    """
    if layer.pooled:
        return rsfast(layer)
    moved = rsfast(layer)
    for height, width in layer.sizes:
        slice_bytes = batch * height * width * _SLICE
        kept = min(1.0, on_chip / slice_bytes), min(1.0, on_chip / (2 * slice_bytes))
        moved -= height * width * layer.channels * (kept[0] + 2 * kept[1])
    return moved


def by_kind(moved: Callable[[BatchNormLayer], float]) -> dict[str, float]:
    """Sums over the batch norms of a ResNet-50 of each kind."""
    total = dict.fromkeys(KINDS, 0.0)
    for call in calls("resnet50", PAPER_RESOLUTIONS):
        layer = batch_norm_of(call)
        if layer is not None:
            last = call.layer.split(".")[-1]
            kind = last if last in KINDS else "shortcut"
            total["stem" if layer.pooled else kind] += moved(layer)
    return total


def main(argv: list[str] | None = None) -> int:
    """The command."""
    argparse.ArgumentParser(prog="bench.models.traffic", description=__doc__).parse_args(argv)
    rows: dict[str, Callable[[BatchNormLayer], float]]
    rows = {"pooling apart": pooling_apart, "rsfast": rsfast}
    for batch in _BATCHES:
        rows[f"rsfast, from the L2 cache, batch {batch}"] = functools.partial(cached, batch=batch)
    for batch in _BATCHES:
        rows[f"one launch each way, batch {batch}"] = functools.partial(one_launch, batch=batch)
    print("| ResNet-50, MB per image | in all |", " | ".join(KINDS), "|")
    print("|---|---|", "---|" * len(KINDS), sep="")
    for name, moved in rows.items():
        parts = [2e-6 * part for part in by_kind(moved).values()]
        print(f"| {name} | {sum(parts):.1f} |", " | ".join(f"{part:.1f}" for part in parts), "|")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
