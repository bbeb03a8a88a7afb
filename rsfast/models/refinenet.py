"""RefineNet (Lin et al., CVPR 2017) on a ResNet: logits of each pixel, at a quarter of the size.

Four cascades, from the coarsest stage of the ResNet to the finest. Each takes the stage's features
through residual convolution units, adds what the cascade before has found at half the size
(multi-resolution fusion), spreads it over wider surroundings (chained residual pooling), and passes
it through units again. The trunk is :class:`rsfast.models.resnet.ResNet` without its classifier,
with its names. Batch norm is in the trunk only.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rsfast.models.resnet import DEPTHS, ResNet

__all__ = [
    "REFINENETS",
    "ChainedResidualPooling",
    "Refinement",
    "RefineNet",
    "ResidualConvUnits",
    "refinenet",
]

# The trunk, and channels of the coarsest cascade and of the others. Those of ResNet-18 are ours: a
# quarter of the published width, as its blocks have a quarter of the channels of a bottleneck.
REFINENETS = {
    "refinenet18": ("resnet18", 128, 64),
    "refinenet50": ("resnet50", 512, 256),
    "refinenet101": ("resnet101", 512, 256),
    "refinenet152": ("resnet152", 512, 256),
}
_STD = 0.01  # of the decoder's weights, as published, at this many channels
_STD_CHANNELS = 256
_DROPOUT = 0.5  # of the two coarsest stages, as published
_POOLINGS = 4


class ResidualConvUnits(nn.Sequential):
    """Units of ReLU, 3x3 convolution with bias, ReLU, 3x3 convolution, and what came in."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__(
            *(
                _Residual(
                    nn.ReLU(), _conv(channels, channels, bias=True), nn.ReLU(), _conv(channels)
                )
                for _ in range(units)
            )
        )


class _Residual(nn.Sequential):
    """Layers, and what came in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class ChainedResidualPooling(nn.Module):
    """ReLU, then the sum of what 0, 1, 2, ... times 5x3 pooling and convolution make of it."""

    def __init__(self, channels: int, poolings: int = _POOLINGS) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.convs = nn.ModuleList(_conv(channels) for _ in range(poolings))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        link = x
        for conv in self.convs:
            link = conv(self.pool(link))
            x = x + link
        return x


class Refinement(nn.Module):
    """One cascade.

    Args:
        in_channels: of the stage's features.
        channels: of its own.
        out_channels: of what it hands on; None for the last one, which hands on its own.
        first: whether nothing came before it.
        dropout: of the features.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int | None,
        *,
        first: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.reduce = _conv(in_channels, channels)
        self.adapt = ResidualConvUnits(channels, 2)
        self.fuse = None if first else _conv(channels)
        self.pooling = ChainedResidualPooling(channels)
        self.refine = ResidualConvUnits(channels, 3)
        self.hand_on = None if out_channels is None else _conv(channels, out_channels)

    def forward(self, features: Tensor, coarser: Tensor | None) -> Tensor:
        x = self.adapt(self.reduce(self.dropout(features)))
        if self.fuse is not None and coarser is not None:
            size = features.shape[-2:]
            x = self.fuse(x) + F.interpolate(
                coarser, size=size, mode="bilinear", align_corners=False
            )
        x = self.refine(self.pooling(x))
        return x if self.hand_on is None else self.hand_on(x)


class RefineNet(nn.Module):
    """Images [N, 3, H, W] to logits [N, K, ceil(H / 4), ceil(W / 4)].

    Args:
        name: of :data:`REFINENETS`.
        num_classes: K.
    """

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        trunk, coarsest, channels = REFINENETS[name]
        block, depths, groups, base = DEPTHS[trunk]
        self.trunk = ResNet(block, depths, 1, groups, base)
        del self.trunk.avgpool, self.trunk.fc
        widths = [64 * 2**stage * block.expansion for stage in range(4)]
        self.refinements = nn.ModuleList(
            Refinement(
                widths[stage],
                coarsest if stage == 3 else channels,
                channels if stage else None,
                first=stage == 3,
                dropout=_DROPOUT if stage >= 2 else 0.0,
            )
            for stage in reversed(range(4))
        )
        self.dropout = nn.Dropout(_DROPOUT)
        self.classifier = _conv(channels, num_classes, bias=True)
        # No norm sets the scale of what the decoder adds up, so a narrower one needs wider weights
        # to pass on as much: the variance of a sum over 3 x 3 x channels products stays.
        std = _STD * (_STD_CHANNELS / channels) ** 0.5
        for part in (self.refinements, self.classifier):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    _init(module, std)

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.trunk
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
        features = []
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            x = stage(x)
            features.append(x)
        found = None
        for refinement, of_stage in zip(self.refinements, reversed(features), strict=True):
            found = refinement(of_stage, found)
        return self.classifier(self.dropout(found))


def refinenet(name: str, num_classes: int) -> RefineNet:
    """A network of :data:`REFINENETS`, for one resolution at a time."""
    return RefineNet(name, num_classes)


def _conv(in_channels: int, out_channels: int | None = None, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels or in_channels, 3, padding=1, bias=bias)


def _init(conv: nn.Conv2d, std: float) -> None:
    nn.init.normal_(conv.weight, std=std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
