"""What a user of the authors' code runs: a list of R tensors through every layer.

Written from the description of the method, with the authors' parameter names, so that it serves
as the opponent in benchmarks, as the oracle of the network tests, and as the other side of the
checkpoint tests. Plain `torch.nn` throughout; nothing here is imported by rsfast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast.models.mobilenetv2 import STAGES
from rsfast.models.resnet import DEPTHS, Bottleneck

__all__ = ["AuthorsNet", "authors_loss"]

Levels = list[Tensor]


class Shared(nn.Module):
    """One module for all levels."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, levels: Levels) -> Levels:
        return [self.module(x) for x in levels]


class PrivateNorm(nn.Module):
    """One `nn.BatchNorm2d` per level."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        for index in range(count):
            self.add_module(f"bn_{index}", nn.BatchNorm2d(channels))

    def forward(self, levels: Levels) -> Levels:
        return [self.get_submodule(f"bn_{i}")(x) for i, x in enumerate(levels)]


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> Shared:
    return Shared(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False))


class ResidualBlock(nn.Module):
    """A basic or bottleneck block."""

    def __init__(
        self,
        c_in: int,
        width: int,
        stride: int,
        count: int,
        *,
        bottleneck: bool,
        groups: int,
        base: int,
    ) -> None:
        super().__init__()
        shapes: list[tuple[int, ...]] = [(c_in, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            inner = width * base // 64 * groups
            shapes = [(c_in, inner, 1), (inner, inner, 3, stride, groups), (inner, 4 * width, 1)]
        self.depth = len(shapes)
        for number, shape in enumerate(shapes, start=1):
            self.add_module(f"conv{number}", conv(*shape))
            self.add_module(f"bn{number}", PrivateNorm(shape[1], count))
        c_out = shapes[-1][1]
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride), PrivateNorm(c_out, count))

    def forward(self, levels: Levels) -> Levels:
        shortcuts = levels if self.downsample is None else self.downsample(levels)
        for number in range(1, self.depth + 1):
            levels = self.get_submodule(f"conv{number}")(levels)
            levels = self.get_submodule(f"bn{number}")(levels)
            if number < self.depth:
                levels = [F.relu(x) for x in levels]
        return [F.relu(x + shortcut) for x, shortcut in zip(levels, shortcuts, strict=True)]


class InvertedBlock(nn.Module):
    """An inverted residual block."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int, count: int) -> None:
        super().__init__()
        width = c_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [conv(c_in, width, 1), PrivateNorm(width, count), Shared(nn.ReLU6())]
        layers += [conv(width, width, 3, stride, groups=width), PrivateNorm(width, count)]
        layers += [Shared(nn.ReLU6()), conv(width, c_out, 1), PrivateNorm(c_out, count)]
        self.conv = nn.Sequential(*layers)
        self.identity = stride == 1 and c_in == c_out

    def forward(self, levels: Levels) -> Levels:
        outputs = self.conv(levels)
        if not self.identity:
            return outputs
        return [x + y for x, y in zip(levels, outputs, strict=True)]


class AuthorsNet(nn.Module):
    """Images of R resolutions, a list [N, 3, r, r], to a list of logits [N, K].

    Args:
        arch: as in `rsfast.create_model`.
        num_resolutions: R.
        num_classes: K.
    """

    def __init__(self, arch: str, num_resolutions: int, num_classes: int = 1000) -> None:
        super().__init__()
        self.arch = arch
        if arch == "mobilenetv2":
            self._build_mobilenet(num_resolutions, num_classes)
        else:
            self._build_resnet(num_resolutions, num_classes)
        self.alpha = nn.Parameter(torch.ones(num_resolutions))

    def _build_resnet(self, count: int, num_classes: int) -> None:
        block, depths, groups, base = DEPTHS[self.arch]
        kind = {"bottleneck": block is Bottleneck, "groups": groups, "base": base}
        self.conv1 = conv(3, 64, 7, 2)
        self.bn1 = PrivateNorm(64, count)
        channels = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                width = 64 << stage
                blocks.append(ResidualBlock(channels, width, stride, count, **kind))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = Shared(nn.Linear(channels, num_classes))

    def _build_mobilenet(self, count: int, num_classes: int) -> None:
        features: list[nn.Module] = [
            nn.Sequential(conv(3, 32, 3, 2), PrivateNorm(32, count), Shared(nn.ReLU6()))
        ]
        channels = 32
        for expansion, c_out, depth, stride in STAGES:
            for index in range(depth):
                step = stride if index == 0 else 1
                features.append(InvertedBlock(channels, c_out, step, expansion, count))
                channels = c_out
        self.features = nn.Sequential(*features)
        self.conv = nn.Sequential(
            conv(channels, 1280, 1), PrivateNorm(1280, count), Shared(nn.ReLU6())
        )
        self.classifier = Shared(nn.Linear(1280, num_classes))

    def forward(self, levels: Sequence[Tensor]) -> Levels:
        levels = list(levels)
        if self.arch == "mobilenetv2":
            levels = self.conv(self.features(levels))
            head = self.classifier
        else:
            levels = [F.relu(x) for x in self.bn1(self.conv1(levels))]
            levels = [F.max_pool2d(x, 3, 2, 1) for x in levels]
            for stage in range(1, 5):
                levels = self.get_submodule(f"layer{stage}")(levels)
            head = self.fc
        return head([x.mean((2, 3)) for x in levels])


def authors_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    alpha: Tensor,
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """The full loss as R cross entropies, one of the ensemble, and R (R + 1) / 2 KL terms."""
    weights = F.softmax(alpha, dim=0)
    ensemble = sum(w * z.detach() for w, z in zip(weights, logits, strict=True))
    loss = cross_entropy(ensemble, labels)
    teachers = [ensemble.detach()]
    for z in logits:
        loss = loss + cross_entropy(z, labels)
        for teacher in teachers:
            divergence = F.kl_div(
                F.log_softmax(z, dim=1), F.softmax(teacher, dim=1), reduction="batchmean"
            )
            loss = loss + 2.0 / (len(logits) + 1) * divergence
        teachers.append(z.detach())
    return loss
