"""There and back: any network with batch norm made switchable, and a plain one taken out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rsfast.pyramid.batchnorm import SwitchableBatchNorm2d

__all__ = [
    "BETWEEN",
    "bn_mixture",
    "replace_norms",
    "to_single",
    "to_switchable",
    "with_plain_modules",
]

BETWEEN = ("interpolate", "nearest")


def to_switchable(network: nn.Module, num_banks: int) -> nn.Module:
    """Swaps every batch norm for one with banks, in place; returns the network.

    Args:
        network: any; its own batch norm if it is one.
        num_banks: B.

    Raises:
        ValueError: naming the module, if there is no batch norm, or one that has no banks here.
    """
    swapped: dict[int, nn.Module] = {}

    def swap(path: str, module: nn.Module) -> nn.Module | None:
        _refuse(path, module)
        if not isinstance(module, _BatchNorm):
            return None
        assert isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
        if id(module) not in swapped:  # a layer that is used twice stays one
            swapped[id(module)] = SwitchableBatchNorm2d.of(module, num_banks)  # type: ignore[arg-type]
        return swapped[id(module)]

    network = _swap(network, swap)
    if not swapped:
        raise ValueError(
            f"network {type(network).__name__} has no batch norm: there is nothing to switch"
        )
    return network


def to_single(network: nn.Module, mixture: Sequence[tuple[int, float]]) -> nn.Module:
    """A copy whose batch norms are plain ones, their values a weighted sum of banks.

    So are other modules, see :func:`with_plain_modules`.

    Args:
        network: that :func:`to_switchable` made.
        mixture: (bank, weight) pairs; the weights add up to 1.
    """
    return with_plain_modules(replace_norms(network, lambda norm: norm.single(mixture)))


def with_plain_modules(network: nn.Module) -> nn.Module:
    """Puts in what stands in for modules that only training needs, in place; returns the network.

    They say it by a method `as_plain_module`.
    """

    def swap(path: str, module: nn.Module) -> nn.Module | None:
        make: Callable[[], nn.Module] | None = getattr(module, "as_plain_module", None)
        return None if make is None else make()

    return _swap(network, swap)


def replace_norms(
    network: nn.Module, make: Callable[[SwitchableBatchNorm2d], nn.Module]
) -> nn.Module:
    """A copy with other layers in the place of switchable batch norms.

    Args:
        network: that :func:`to_switchable` made.
        make: the layer for each of them, in the order of the modules.
    """
    made: dict[int, nn.Module] = {}

    def swap(path: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, SwitchableBatchNorm2d):
            return None
        if id(module) not in made:
            made[id(module)] = make(module)
        return made[id(module)]

    return _swap(copy.deepcopy(network), swap)


def _swap(
    module: nn.Module, swap: Callable[[str, nn.Module], nn.Module | None], path: str = ""
) -> nn.Module:
    other = swap(path, module)
    if other is not None:
        return other
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _swap(child, swap, f"{path}.{name}" if path else name)
    return module


def _refuse(path: str, module: nn.Module) -> None:
    """What keeps statistics of the batch and is no batch norm that has banks here."""
    reason = None
    if isinstance(module, _BatchNorm):
        reason = _what_is_odd(module)
    elif isinstance(module, _InstanceNorm):
        if module.track_running_stats:
            reason = "keeps running statistics of another kind"
    elif hasattr(module, "running_var") and not type(module).__name__.startswith("Frozen"):
        reason = "keeps batch statistics of another kind"
    if reason:
        raise ValueError(
            f"network cannot be converted: {path or 'it'} ({type(module).__name__}) {reason}"
        )


def _what_is_odd(norm: _BatchNorm) -> str | None:
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        return "normalises other tensors than images"
    if not (norm.affine and norm.track_running_stats):
        return "has no weight and bias, or no running statistics"
    if norm.momentum is None:
        return "has momentum None, a cumulative average"
    own = type(norm).forward
    with_activation = type(norm).__module__.startswith("timm.") and hasattr(norm, "act")
    if own not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward) and not with_activation:
        return "computes more than batch norm"
    return None


def bn_mixture(
    resolutions: Sequence[int], resolution: int, between: str = "interpolate"
) -> tuple[tuple[int, float], ...]:
    """Which banks, in which shares, serve a resolution (paper, section on new sizes).

    Gamma, beta, mean and variance are interpolated linearly in pixels. The paper gives no rule
    outside the trained range; there the nearest bank is used.

    Args:
        resolutions: trained, descending.
        resolution: in pixels.
        between: "interpolate" or "nearest" (the larger one of two equally near).

    Returns:
        (bank, share) pairs, larger resolution first; the shares add up to 1.
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
