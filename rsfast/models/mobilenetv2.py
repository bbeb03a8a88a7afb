"""MobileNetV2 trunk at width 1.0, over pyramids.

Initialisation: normal with variance 2 / (k * k * C_out), for depthwise convolutions too.
"""

from __future__ import annotations

import math

from torch import nn

from rsfast.models.layers import Conv2d, SwitchableBatchNorm2d
from rsfast.pyramid import Pyramid

__all__ = ["InvertedResidual", "MobileNetV2"]

# expansion, out channels, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion (absent at factor 1), 3x3 depthwise, linear 1x1 projection."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expansion: int, num_banks: int
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.identity = stride == 1 and in_channels == out_channels
        self.expand = nn.Sequential()
        if expansion != 1:
            self.expand.append(Conv2d(in_channels, width, 1))
            self.expand.append(SwitchableBatchNorm2d(width, num_banks, "relu6"))
        self.depthwise = Conv2d(width, width, 3, stride, groups=width)
        self.depthwise_bn = SwitchableBatchNorm2d(width, num_banks, "relu6")
        self.project = Conv2d(width, out_channels, 1)
        self.project_bn = SwitchableBatchNorm2d(out_channels, num_banks)

    def forward(self, x: Pyramid) -> Pyramid:
        y = self.depthwise_bn(self.depthwise(self.expand(x)))
        return self.project_bn(self.project(y), x if self.identity else None)


class MobileNetV2(nn.Module):
    """Images to the 1280-channel feature map before pooling."""

    out_channels = 1280

    def __init__(self, num_banks: int) -> None:
        super().__init__()
        self.stem = Conv2d(3, 32, 3, stride=2)
        self.stem_bn = SwitchableBatchNorm2d(32, num_banks, "relu6")
        self.blocks = nn.Sequential()
        channels = 32
        for expansion, out_channels, depth, stride in STAGES:
            for index in range(depth):
                self.blocks.append(
                    InvertedResidual(
                        channels, out_channels, stride if index == 0 else 1, expansion, num_banks
                    )
                )
                channels = out_channels
        self.head = Conv2d(channels, self.out_channels, 1)
        self.head_bn = SwitchableBatchNorm2d(self.out_channels, num_banks, "relu6")
        for module in self.modules():
            if isinstance(module, Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def forward(self, x: Pyramid) -> Pyramid:
        x = self.blocks(self.stem_bn(self.stem(x)))
        return self.head_bn(self.head(x))
