"""ResNets whose convolutions are quantised, all but the stem; the classifier is not, either.

With activations in full precision it is :mod:`rsfast.models.resnet`, the last batch norm of each
block beginning at 0. With quantised activations blocks begin with batch norm, activation and
quantiser (pre-activation), so that what a convolution reads is quantised and what blocks add up is
not; shortcuts that change the shape are quantised 1x1 convolutions with batch norm. Each stage ends
with a batch norm, ReLU and, but for the last, a quantiser of its own: the first block of a stage
finds its input quantised, for its shortcut, too. Only the first block of all has a shortcut that
starts in front of its quantiser.
"""

from __future__ import annotations

from torch import Tensor, nn

from rsfast.models.lq import FULL_PRECISION, Bits, LQActivation, LQConv2d
from rsfast.models.resnet import DEPTHS, Bottleneck, init_residual, resnet

__all__ = ["LQ_RESNETS", "PreActBlock", "PreActResNet", "resnet_lq"]

LQ_RESNETS = {"resnet18_lq": "resnet18", "resnet50_lq": "resnet50"}


def resnet_lq(name: str, num_classes: int, bits: Bits) -> nn.Module:
    """A network of :data:`LQ_RESNETS`, for one resolution at a time."""
    if bits.activation == FULL_PRECISION:
        return _post_activation(name, num_classes, bits.weight)
    return PreActResNet(name, num_classes, bits)


def _post_activation(name: str, num_classes: int, bits: int) -> nn.Module:
    network = resnet(LQ_RESNETS[name], num_classes)
    for block in (block for stage in _stages(network) for block in stage.children()):
        for owner in block.modules():
            for child, conv in list(owner.named_children()):
                if isinstance(conv, nn.Conv2d):
                    setattr(owner, child, _quantised(conv, bits))
    init_residual(network, 0.0)
    return network


def _stages(network: nn.Module) -> list[nn.Sequential]:
    return [getattr(network, f"layer{stage}") for stage in range(1, 5)]


def _quantised(conv: nn.Conv2d, bits: int) -> LQConv2d:
    """The same convolution, its weight taken over."""
    size, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    made = LQConv2d(conv.in_channels, conv.out_channels, size, stride, padding, bits=bits)
    made.weight = conv.weight
    return made


class PreActBlock(nn.Module):
    """Convolutions with a quantiser in front of each, and a shortcut.

    Args:
        in_channels: of the input.
        width: of the inner convolutions; C_out is that, or four times as much in a bottleneck.
        stride: of the first 3x3 convolution.
        bottleneck: 1x1, 3x3 and 1x1 convolution instead of two 3x3 ones.
        place: "first" of the network, whose input is an activation that is not quantised; "entry"
            of a later stage, whose input is quantised; or "inner", whose input is neither.
        bits: of weights and activations.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        bottleneck: bool,
        place: str,
        bits: Bits,
    ) -> None:
        super().__init__()
        out_channels = 4 * width if bottleneck else width
        self.preact = nn.Sequential()
        if place == "inner":
            self.preact.append(nn.BatchNorm2d(in_channels)).append(nn.ReLU(inplace=True))
        if place != "entry":
            self.preact.append(LQActivation(bits.activation))
        sizes = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        self.body = nn.Sequential()
        channels = in_channels
        for index, (size, step) in enumerate(zip(sizes, strides, strict=True)):
            last = index == len(sizes) - 1
            wide = out_channels if last else width
            self.body.append(_conv(channels, wide, size, step, bits))
            self.body.append(nn.BatchNorm2d(wide))
            if not last:
                self.body.append(nn.ReLU(inplace=True)).append(LQActivation(bits.activation))
            channels = wide
        self.downsample: nn.Sequential | None = None
        if in_channels != out_channels:
            projection = _conv(in_channels, out_channels, 1, stride, bits)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.body(self.preact(x)) + shortcut


class PreActResNet(nn.Module):
    """Images [N, 3, H, W] to logits [N, K].

    Args:
        name: of :data:`LQ_RESNETS`.
        num_classes: K.
        bits: of weights and activations.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, name: str, num_classes: int, bits: Bits) -> None:
        super().__init__()
        block, depths, _, _ = DEPTHS[LQ_RESNETS[name]]
        bottleneck = block is Bottleneck
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            layers = nn.Sequential()
            for index in range(depth):
                place = "inner" if index else ("entry" if stage else "first")
                stride = 2 if place == "entry" else 1
                layers.append(PreActBlock(channels, width, stride, bottleneck, place, bits))
                channels = width * block.expansion
            layers.append(nn.BatchNorm2d(channels)).append(nn.ReLU(inplace=True))
            if stage < len(depths) - 1:
                layers.append(LQActivation(bits.activation))
            self.add_module(f"layer{stage + 1}", layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _conv(in_channels: int, out_channels: int, size: int, stride: int, bits: Bits) -> LQConv2d:
    return LQConv2d(in_channels, out_channels, size, stride, size // 2, bits=bits.weight)
