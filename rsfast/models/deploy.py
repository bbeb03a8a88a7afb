"""Single-resolution networks out of an RS-Net: plain torch modules, any resolution."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rsfast.models.layers import BatchNormAct2d, Conv2d, MaxPool2d, SwitchableBatchNorm2d

if TYPE_CHECKING:
    from rsfast.models.rsnet import RSNet

__all__ = [
    "BETWEEN",
    "SingleResolutionNet",
    "bn_mixture",
    "calibrate",
    "multiply_adds",
    "single_resolution",
]

BETWEEN = ("interpolate", "nearest")


class SingleResolutionNet(nn.Module):
    """[N, 3, r, r] -> [N, K] with plain torch layers; see :meth:`RSNet.at`.

    Attributes:
        resolution: r in pixels.
        input_mean, input_std: normalisation the weights expect, on RGB values in [0, 1].
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Module, resolution: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier
        self.resolution = resolution
        self.input_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
        self.input_std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def features(self, images: Tensor) -> Tensor:
        """[N, C]: what the classifier sees of images [N, 3, r, r]."""
        return self.pool(self.backbone(images)).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def bn_mixture(
    resolutions: Sequence[int], resolution: int, between: str = "interpolate"
) -> tuple[tuple[int, float], ...]:
    """Which batch-norm sets, in which shares, serve a resolution (paper, section on new sizes).

    Gamma, beta, mean and variance are interpolated linearly in pixels. The paper gives no rule
    outside the trained range; there the nearest set is used.

    Args:
        resolutions: trained, descending.
        resolution: in pixels.
        between: "interpolate" or "nearest" (the larger one of two equally near).

    Returns:
        (set, share) pairs, larger resolution first; the shares add up to 1.
    """
    if between not in BETWEEN:
        raise ValueError(f"between must be one of {BETWEEN}, got {between!r}")
    if resolution < 1:
        raise ValueError(f"resolution must be positive, got {resolution}")
    nearest = min(range(len(resolutions)), key=lambda i: abs(resolutions[i] - resolution))
    inside = resolutions[-1] < resolution < resolutions[0]
    if between == "nearest" or not inside or resolution in resolutions:
        return ((nearest, 1.0),)
    below = next(i for i, trained in enumerate(resolutions) if trained < resolution)
    larger, smaller = resolutions[below - 1], resolutions[below]
    share = (resolution - smaller) / (larger - smaller)
    return ((below - 1, share), (below, 1.0 - share))


def single_resolution(model: RSNet, resolution: int, between: str) -> SingleResolutionNet:
    """The implementation of :meth:`RSNet.at`."""
    mixture = bn_mixture(model.resolutions, resolution, between)
    if model.bn == "shared":
        mixture = ((0, 1.0),)
    net = SingleResolutionNet(
        _as_single(model.backbone, mixture), copy.deepcopy(model.classifier), resolution
    )
    net.input_mean, net.input_std = model.input_mean, model.input_std
    return net.to(model.classifier.weight.device).eval()


def _as_single(module: nn.Module, mixture: Sequence[tuple[int, float]]) -> nn.Module:
    """A copy of a module tree with every pyramid layer replaced by its plain counterpart."""
    if isinstance(module, SwitchableBatchNorm2d):
        return module.single(mixture)
    if isinstance(module, Conv2d | MaxPool2d):
        return module.single()
    clone = copy.copy(module)
    # copy.copy shares the dict of children; the clone gets its own.
    clone._modules = {
        name: None if child is None else _as_single(child, mixture)
        for name, child in module._modules.items()
    }
    return clone


@torch.no_grad()
def calibrate(net: SingleResolutionNet, batches: Iterable[Tensor]) -> None:
    """Re-estimates the running statistics as plain averages over batches, in place.

    Args:
        net: a single-resolution network.
        batches: tensors [N, 3, r, r], normalised, of training images.

    Raises:
        ValueError: if there is no batch.
    """
    norms = [m for m in net.modules() if isinstance(m, BatchNormAct2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    seen = False
    for batch in batches:
        net(batch)
        seen = True
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    if not seen:
        raise ValueError("batches must hold at least one batch to calibrate on, got none")


def multiply_adds(net: SingleResolutionNet) -> int:
    """Multiply-adds of the convolutions and the classifier for one image."""
    net = copy.deepcopy(net).to("meta")
    images = torch.empty(1, 3, net.resolution, net.resolution, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(images)
    return counter.get_total_flops() // 2
