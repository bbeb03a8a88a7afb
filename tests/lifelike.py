"""Small networks of every kind of layer, with batch norms as different as trained ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rsfast
from rsfast.deploy.manifest import Manifest
from rsfast.models import RSNet

__all__ = ["NETWORKS", "calibration", "images", "lifelike", "manifest"]


def _conv(c_in: int, c_out: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Residual(nn.Module):
    """Sums and ReLU, max pooling, as in ResNets."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = _conv(3, 16, stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv1, self.conv2 = _conv(16, 16), _conv(16, 16)
        self.conv3, self.short = _conv(16, 24, stride=2), _conv(16, 24, 1, stride=2)
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem(x)))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + x)
        x = F.relu(self.conv3(x) + self.short(x))
        return self.fc(self.mean(x).flatten(1))


class Inverted(nn.Module):
    """ReLU6, depthwise convolutions and sums without activation, as in MobileNetV2."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = _conv(3, 8, stride=2)
        self.expand, self.depth = _conv(8, 32, 1), _conv(32, 32, groups=32)
        self.project, self.last = _conv(32, 8, 1), _conv(8, 48, 1)
        self.fc = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = self.project(F.relu6(self.depth(F.relu6(self.expand(x))))) + x
        return self.fc(F.relu6(self.last(x)).mean([2, 3]))


class Excited(nn.Module):
    """SiLU, hard swish and squeeze-and-excitation, as in EfficientNets and MobileNetV3."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.conv = _conv(3, 16, stride=2), _conv(16, 24, stride=2)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.last, self.fc = _conv(24, 32, 1), nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(F.silu(self.stem(x))))
        squeezed = F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = x * torch.sigmoid(self.excite(squeezed))
        x = F.hardswish(self.last(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Preactivated(nn.Module):
    """Batch norm before convolutions, and concatenation, as in DenseNets."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.norm1, self.conv1 = nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, 1, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, 2, 1, bias=False)
        self.norm3, self.fc = nn.BatchNorm2d(24), nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = F.avg_pool2d(self.conv2(F.relu(self.norm2(x))), 2)
        x = F.relu(self.norm3(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Joined(nn.Module):
    """Concatenations that convolutions read, and 1x1 beside 3x3, as in SqueezeNets."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.one, self.three = _conv(3, 12, stride=2), _conv(12, 8, 1), _conv(12, 16)
        self.squeeze, self.fc = _conv(24, 16, 1), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([F.relu(self.one(x)), self.three(x)], 1)
        x = F.relu(self.squeeze(F.max_pool2d(x, 2)))
        return self.fc(x.mean((2, 3)))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "residual": Residual,
    "inverted": Inverted,
    "excited": Excited,
    "preactivated": Preactivated,
    "joined": Joined,
}


def images(num_images: int, resolution: int, seed: int = 0) -> Tensor:
    """Noise of many wavelengths, normalised: neighbouring pixels are alike, as in photographs."""
    g = torch.Generator().manual_seed(seed)
    waves = [torch.randn(num_images, 3, k, k, generator=g) for k in (2, 4, 8, 16, 32)]
    x = sum(F.interpolate(wave, size=(64, 64), mode="bicubic") for wave in waves)
    assert isinstance(x, Tensor)
    x = F.interpolate(x, size=(resolution, resolution), mode="bilinear", antialias=True)
    return (x / x.std()).contiguous()


def calibration(resolution: int) -> list[np.ndarray]:
    """Batches of images, [16, 3, r, r] each, of other seeds than those of most tests."""
    return [images(16, resolution, seed).numpy() for seed in range(100, 104)]


def manifest(model: RSNet) -> Manifest:
    """What an exported network says, as far as the int8 file asks."""
    return Manifest(
        arch=model.arch,
        resolutions=model.resolutions,
        sizes=(16, 128),
        between="interpolate" if model.bn == "private" else "shared",
        num_classes=model.num_classes,
        class_names=None,
        input_dtype="float32",
        mean=model.input_mean,
        std=model.input_std,
        crop="center",
        scale=0.875,
        filter="bilinear",
        calibration_images=64,
        checkpoint="model_best.pt",
        checkpoint_sha256="0" * 64,
        versions={},
    )


@torch.no_grad()
def lifelike(name: str, resolutions: tuple[int, ...], bn: str = "private", seed: int = 0) -> RSNet:
    """A network whose batch norms have the statistics of images and differ per resolution.

    Args:
        name: of `NETWORKS`, or what `create_model` knows.
        resolutions: in pixels, descending.
        bn: "private" or "shared".
        seed: of the weights.
    """
    torch.manual_seed(seed)
    if name in NETWORKS:
        model = rsfast.convert(NETWORKS[name](10), resolutions, bn)
    else:
        model = rsfast.create_model(name, resolutions, 10, bn)
    for norm in model.batch_norms():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
        norm.momentum = 1.0
    model.train()
    model([images(16, r, seed=1) for r in resolutions])
    for norm in model.batch_norms():
        norm.momentum = 0.1
        norm.running_mean += 0.2 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
        norm.weight *= 1 + 0.3 * torch.randn_like(norm.weight)
    return model.eval()
