"""MobileNetV2 at width 1.0, in torchvision's layout and names.

Initialisation: convolutions normal with variance 2 / (k * k * C_out), depthwise ones too, the
classifier normal with deviation 0.01. No dropout, as in the authors' code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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
_WIDTH_OUT = 1280


class InvertedResidual(nn.Module):
    """1x1 expansion (absent at factor 1), 3x3 depthwise, linear 1x1 projection."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.identity = stride == 1 and in_channels == out_channels
        layers = [] if expansion == 1 else [_conv_bn_relu6(in_channels, width, 1)]
        self.conv = nn.Sequential(
            *layers,
            _conv_bn_relu6(width, width, 3, stride, groups=width),
            _conv(width, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.identity else self.conv(x)


class MobileNetV2(nn.Module):
    """Images [N, 3, H, W] to logits [N, K].

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv_bn_relu6(3, 32, 3, stride=2))
        channels = 32
        for expansion, out_channels, depth, first in STAGES:
            for index in range(depth):
                stride = first if index == 0 else 1
                self.features.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        self.features.append(_conv_bn_relu6(channels, _WIDTH_OUT, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        # At torchvision's place behind a dropout, which the authors do not have.
        linear = nn.Linear(_WIDTH_OUT, num_classes)
        nn.init.normal_(linear.weight, 0.0, 0.01)
        nn.init.zeros_(linear.bias)
        self.classifier = nn.Sequential(nn.Identity(), linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _conv(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    padding = size // 2
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, groups=groups, bias=False)
    # Random weights are drawn in the order in which they lie in memory.
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _conv_bn_relu6(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        _conv(in_channels, out_channels, size, stride, groups),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )
