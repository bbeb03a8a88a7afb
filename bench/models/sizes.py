"""What networks take in files, computed: `python -m bench.models.sizes`.

Of five resolutions and 1000 classes: in full precision, as one packed 2-bit network, and as five
packed networks of one resolution each. Tensors are counted, not a file's header of some 20 kB.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import nn

from rsfast import create_model
from rsfast.models import RSNet
from rsfast.models.lq import LQConv2d
from rsfast.models.lq_codes import codes_shape

__all__ = ["Size", "main", "rows", "size_of"]

_RESOLUTIONS = (224, 192, 160, 128, 96)
_BITS = {"2/32": (2, 32), "2/2": (2, 2)}


class Size(NamedTuple):
    """Of a packed file, or of one in full precision.

    Attributes:
        total: bytes.
        weights: of all convolutions and the classifier.
        inner: bytes of the weights of convolutions but the first, with their bases.
        inner_weights: how many those are.
    """

    total: int
    weights: int
    inner: int
    inner_weights: int


def size_of(model: RSNet) -> Size:
    """Of the file that save_packed writes, or save_weights of a network in full precision."""
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    total += 4 * len(model.resolutions)  # the ensemble's scores
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)][1:]
    inner = 0
    for conv in convolutions:
        size = conv.weight.nbytes
        if isinstance(conv, LQConv2d):
            size = math.prod(codes_shape(conv.weight.shape, conv.quantizer.bits))
            total += size - conv.weight.nbytes
            size += conv.quantizer.basis.nbytes
        inner += size
    weights = [sum(m.weight.numel() for m in some) for some in (layers, convolutions)]
    return Size(total, weights[0], inner, weights[1])


def rows() -> list[str]:
    """The table, in Markdown."""
    found = [
        "| network | stored as | MB | bits per weight | of these in quantised convolutions |",
        "|---|---|---|---|---|",
    ]
    for arch in ("resnet18", "resnet50"):
        found.append(_row(arch, "RS-Net, full precision", _size(arch, _RESOLUTIONS)))
        for name, (weight, activation) in _BITS.items():
            bits = {"weight_bits": weight, "activation_bits": activation}
            one = _size(f"{arch}_lq", _RESOLUTIONS, **bits)
            alone = _size(f"{arch}_lq", _RESOLUTIONS[:1], **bits)
            found.append(_row(f"{arch}_lq {name}", "RS-Net, packed", one))
            found.append(_row(f"{arch}_lq {name}", "five networks, packed", alone, 5))
    return found


def _size(arch: str, resolutions: tuple[int, ...], **bits: int) -> Size:
    with torch.device("meta"):
        return size_of(create_model(arch, resolutions, **bits))


def _row(network: str, what: str, size: Size, copies: int = 1) -> str:
    total = copies * size.total
    return (
        f"| {network} | {what} | {total / 1e6:.1f} | {8 * total / size.weights:.1f} "
        f"| {8 * copies * size.inner / size.inner_weights:.2f} |"
    )


def main() -> int:
    """Prints the table."""
    print("\n".join(rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
