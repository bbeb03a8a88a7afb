"""ResNet trunks (stride on the 3x3 convolution of a bottleneck), over pyramids.

Initialisation: Kaiming normal, fan out; batch norm 1 and 0, the last of a block included.
"""

from __future__ import annotations

from torch import nn

from rsfast.models.layers import Conv2d, MaxPool2d, SwitchableBatchNorm2d
from rsfast.pyramid import Pyramid

__all__ = ["BasicBlock", "Bottleneck", "DEPTHS", "ResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, num_banks: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, width, 3, stride)
        self.bn1 = SwitchableBatchNorm2d(width, num_banks, "relu")
        self.conv2 = Conv2d(width, width, 3)
        self.bn2 = SwitchableBatchNorm2d(width, num_banks, "relu")
        self.downsample = _shortcut(in_channels, width, stride, num_banks)

    def forward(self, x: Pyramid) -> Pyramid:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a shortcut; four times as many channels out as `width`."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, num_banks: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = Conv2d(in_channels, width, 1)
        self.bn1 = SwitchableBatchNorm2d(width, num_banks, "relu")
        self.conv2 = Conv2d(width, width, 3, stride)
        self.bn2 = SwitchableBatchNorm2d(width, num_banks, "relu")
        self.conv3 = Conv2d(width, out_channels, 1)
        self.bn3 = SwitchableBatchNorm2d(out_channels, num_banks, "relu")
        self.downsample = _shortcut(in_channels, out_channels, stride, num_banks)

    def forward(self, x: Pyramid) -> Pyramid:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return self.bn3(self.conv3(x), shortcut)


DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """Images to the feature map before pooling; `out_channels` wide."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, arch: str, num_banks: int) -> None:
        super().__init__()
        block, depths = DEPTHS[arch]
        self.conv1 = Conv2d(3, 64, 7, stride=2)
        self.bn1 = SwitchableBatchNorm2d(64, num_banks, "relu")
        self.maxpool = MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = nn.Sequential()
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width, stride, num_banks))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", blocks)
        self.out_channels = channels
        for module in self.modules():
            if isinstance(module, Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Pyramid) -> Pyramid:
        x = self.maxpool(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _shortcut(in_channels: int, out_channels: int, stride: int, num_banks: int) -> nn.Module | None:
    """Projection where the shape changes, else None for the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        Conv2d(in_channels, out_channels, 1, stride),
        SwitchableBatchNorm2d(out_channels, num_banks),
    )
