"""The shapes that the operations really meet: read off the networks, not written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rsfast import Pyramid, create_model
from rsfast.models.layers import SwitchableBatchNorm2d

__all__ = ["ARCHITECTURES", "RESOLUTIONS", "BatchNormLayer", "batch_norm_layers", "pooled_map"]

ARCHITECTURES = ("resnet50", "resnet18", "mobilenetv2")
RESOLUTIONS = (224, 192, 160, 128, 96)


class BatchNormLayer(NamedTuple):
    """What one or several batch-norm layers of a network work on.

    Attributes:
        sizes: (H, W) of each level.
        channels: C.
        activation: None, "relu" or "relu6".
        residual: whether a shortcut is added.
    """

    sizes: tuple[tuple[int, int], ...]
    channels: int
    activation: str | None
    residual: bool

    def __str__(self) -> str:
        added = "-add" if self.residual else ""
        activated = f"-{self.activation}" if self.activation else ""
        return f"{self.sizes[0][0]}px-C{self.channels}{added}{activated}"

    def level_rows(self, num_images: int) -> tuple[int, ...]:
        """Rows of each level."""
        return tuple(num_images * height * width for height, width in self.sizes)


def batch_norm_layers(
    arch: str, resolutions: Sequence[int] = RESOLUTIONS
) -> Counter[BatchNormLayer]:
    """The batch-norm layers of a network, and how many there are of each."""
    found: Counter[BatchNormLayer] = Counter()

    def record(norm: SwitchableBatchNorm2d, inputs: tuple[Pyramid, ...]) -> None:
        residual = len(inputs) > 1 and inputs[1] is not None
        layer = BatchNormLayer(inputs[0].sizes, norm.num_features, norm.activation, residual)
        found[layer] += 1

    with torch.device("meta"):
        model = create_model(arch, resolutions).eval()
        images: list[Tensor] = [torch.empty(1, 3, r, r) for r in resolutions]
    for norm in model.batch_norms():
        norm.register_forward_pre_hook(record)
    model(images)
    return found


def pooled_map(arch: str, resolutions: Sequence[int] = RESOLUTIONS) -> BatchNormLayer:
    """The feature map before pooling: the smallest and widest one."""
    return min(batch_norm_layers(arch, resolutions), key=lambda norm: (norm.sizes, -norm.channels))
