"""What batch norm reads and writes by itself in a step, computed: `python -m bench.traffic`.

Beyond what the convolutions read and write anyway, with the stem's pooling, in MB per image at all
its resolutions, forward and backward, in 16 bits. Nothing is measured; no GPU is needed.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.shapes import PAPER_RESOLUTIONS, walk
from rsfast import Pyramid
from rsfast.models.layers import SwitchableBatchNorm2d

__all__ = ["PASSES", "elements", "main", "one_pass_mb"]

# Passes over the elements of each kind of batch norm: that of the stem; the first, second and last
# of a bottleneck; that of a shortcut. A pass of batch norm's three launches each way reads 2 and
# writes 1 forward, 4 and 1 backward; the last one's residual adds 1 and 1. PyTorch's pooling reads
# 1, writes 1/4, and indices of 8 bytes; backward it reads both and writes 1. What a folded
# convolution reads once more backward, x for the activation, is counted, and the pass that adds the
# gradient of the moments: 2 read, 1 written.
_POOLED = 1 + 1 + 0.25 + 0.125 + 2 * (1 + 0.25 + 0.125) + 1
PASSES = {
    "rsfast": (8 + 1 + 0.25 + 1 + 0.25 + 1 + 1, 8, 8, 10, 8),
    "pooling fused": (_POOLED, 8, 8, 10, 8),
    "folded statistics": (_POOLED, 2 + 5, 8, 2 + 1 + 5 + 1, 2 + 5),
    "folded 1x1": (_POOLED, 2 + 5, 1 + 1 + 3, 2 + 1 + 5 + 1, 2 + 5),
    "folded all": (_POOLED, 1 + 3, 1 + 3, 2 + 1 + 5 + 1, 2 + 5),
}
_KINDS = ("stem", "bn1", "bn2", "bn3", "shortcut")
_ON_CHIP = 132 * 6 * 2**15  # bytes that the rings of csrc hold on an H100 or H200
_SLICE = 128  # bytes of a row in a slice of 64 channels


def elements() -> dict[str, int]:
    """Elements per image that each kind of batch norm of a ResNet-50 works on."""
    found: dict[Any, int] = {}

    def record(module: Any, inputs: tuple[Pyramid, ...], _: Any) -> None:
        if isinstance(module, SwitchableBatchNorm2d):
            found[module] = inputs[0].rows.numel()

    total = dict.fromkeys(_KINDS, 0)
    for name, module in walk("resnet50", PAPER_RESOLUTIONS, record).named_modules():
        if module in found:
            last = "stem" if name == "backbone.bn1" else name.split(".")[-1]
            total[last if last in _KINDS else "shortcut"] += found[module]
    return total


def one_pass_mb(batch: int, on_chip: int = _ON_CHIP) -> float:
    """MB per image of one launch each way, which reads once what the chip can hold; no pooling."""
    total = 0.0

    def record(module: Any, inputs: tuple[Pyramid, ...], _: Any) -> None:
        nonlocal total
        if not isinstance(module, SwitchableBatchNorm2d):
            return
        added = 2 * (len(inputs) > 1)
        for height, width in inputs[0].sizes:
            slice_bytes = batch * height * width * _SLICE
            kept = min(1.0, on_chip / slice_bytes), min(1.0, on_chip / (2 * slice_bytes))
            passes = 8 + added - kept[0] - 2 * kept[1]
            total += 2e-6 * height * width * module.num_features * passes

    walk("resnet50", PAPER_RESOLUTIONS, record)
    return total


def main(argv: list[str] | None = None) -> int:
    """The command."""
    argparse.ArgumentParser(prog="bench.traffic", description=__doc__).parse_args(argv)
    sizes = elements()
    print("| ResNet-50, MB per image | in all |", " | ".join(_KINDS), "|")
    print("|---|---|", "---|" * len(_KINDS), sep="")
    for name, passes in PASSES.items():
        parts = [2e-6 * sizes[kind] * n for kind, n in zip(_KINDS, passes, strict=True)]
        print(f"| {name} | {sum(parts):.1f} |", " | ".join(f"{part:.1f}" for part in parts), "|")
    print(
        f"\nWithout pooling: {one_pass_mb(1, on_chip=0):.1f} MB in three launches each way; in one"
    )
    print(*(f"at batch {batch}: {one_pass_mb(batch):.1f} MB" for batch in (256, 64, 32)), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
