"""Networks for tests of whole runs, which do not ask what they compute: `--arch tiny:network`.

`tiny:quantised` has weights and activations of 2 bits.
"""

from __future__ import annotations

from torch import Tensor, nn

from rsfast.models.lq import LQActivation, LQConv2d

__all__ = ["network", "quantised"]


class Tiny(nn.Module):
    """Three convolutions with batch norm, the last one beside a shortcut; 8 channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)) + x)
        return self.fc(self.pool(x).flatten(1))


class TinyQuantised(Tiny):
    """The same with its inner convolutions quantised, and what they read."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.conv2 = LQConv2d(8, 8, 3, stride=2, padding=1, bits=2)
        self.conv3 = LQConv2d(8, 8, 3, padding=1, bits=2)
        self.quantizer2 = LQActivation(2)
        self.quantizer3 = LQActivation(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantizer2(self.relu(self.bn1(self.conv1(x))))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(self.quantizer3(x))) + x)
        return self.fc(self.pool(x).flatten(1))


def network(num_classes: int) -> nn.Module:
    return Tiny(num_classes)


def quantised(num_classes: int) -> nn.Module:
    return TinyQuantised(num_classes)
