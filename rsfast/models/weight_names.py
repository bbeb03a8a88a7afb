"""What other programs call the layers of the same networks.

Names of rsfast's own networks are torchvision's, and timm's where timm has the same ones (ResNets).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rsfast.kernels.common.basis import MAX_BITS
from rsfast.models.lq import FULL_PRECISION, Bits
from rsfast.models.mobilenetv2 import STAGES
from rsfast.models.registry import NETWORKS
from rsfast.models.resnet_lq import LQ_RESNETS, resnet_lq

__all__ = ["looks_like", "other_names", "without_prefixes"]

_PREFIXES = ("module.", "_orig_mod.", "model.", "network.")
_ALIKE = 0.9  # share of layers
# DenseNets in torchvision's files have names that its own code changes as it reads them.
_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")


def without_prefixes(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A state dict, then without the first prefix of a wrapper, without the second, and so on.

    A network may have a module of such a name itself: which of them it is shows what fits.
    """
    # torch.compile wraps modules anywhere, and nobody else has such a name.
    tensors = {name.replace("._orig_mod.", "."): tensor for name, tensor in tensors.items()}
    while True:
        yield tensors
        count, prefix = max((sum(n.startswith(p) for n in tensors), p) for p in _PREFIXES)
        bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if 2 * count <= len(tensors) or len(bare) < len(tensors):
            return
        tensors = bare


def other_names(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state dict under the names that other programs have for the same layers."""
    yield tensors
    if any(_DENSENET.match(name) for name in tensors):
        yield {_DENSENET.sub(r"\1\2", name): tensor for name, tensor in tensors.items()}
    ours = _timm_mobilenetv2()
    for names in (ours, {v: k for k, v in ours.items()}):
        renamed = {}
        for name, tensor in tensors.items():
            layer, _, field = name.rpartition(".")
            renamed[f"{names.get(layer, layer)}.{field}" if layer else name] = tensor
        yield renamed


def looks_like(tensors: dict[str, Tensor]) -> str | None:
    """The network of rsfast that has the layers of a state dict, classes aside; None if none has.

    Args:
        tensors: without prefixes.
    """
    found = [
        {(name, tuple(t.shape[1:])) for name, t in state.items() if t.dim() in (2, 4)}
        for state in other_names(tensors)
    ]
    for arch, build in _builders(tensors).items():
        with torch.device("meta"):
            layers = build(1).named_modules()
        expected = {
            (f"{name}.weight", tuple(layer.weight.shape[1:]))
            for name, layer in layers
            if isinstance(layer, nn.Conv2d | nn.Linear)
        }
        # Banks of rsfast's own files have two axes, as a classifier has.
        if any(
            len(f & expected) >= _ALIKE * len(expected) and _same_depth(f, expected) for f in found
        ):
            return arch
    return None


def _builders(tensors: dict[str, Tensor]) -> dict[str, Callable[[int], nn.Module]]:
    """The networks to compare with: quantised ones have the layers of others, and bases."""
    bases = {t.shape for name, t in tensors.items() if name.endswith(".basis")}
    if not bases:
        return {name: network.build for name, network in NETWORKS.items()}
    activation = FULL_PRECISION if all(len(shape) == 2 for shape in bases) else MAX_BITS
    bits = Bits(MAX_BITS, activation)  # how many does not change the layers
    return {name: functools.partial(resnet_lq, name, bits=bits) for name in LQ_RESNETS}


def _same_depth(found: set[tuple[str, tuple[int, ...]]], expected: set) -> bool:
    convolutions = [
        {layer for layer in layers if len(layer[1]) == 3} for layers in (found, expected)
    ]
    return len(convolutions[0]) <= len(convolutions[1]) / _ALIKE


def _timm_mobilenetv2() -> dict[str, str]:
    """timm's name of each layer -> torchvision's and ours."""
    names = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    number = 0
    for stage, (expansion, _, depth, _) in enumerate(STAGES):
        for index in range(depth):
            number += 1
            theirs, ours = f"blocks.{stage}.{index}", f"features.{number}.conv"
            layers = ["conv_dw", "bn1", "conv_pw", "bn2"]
            places = ["0.0", "0.1", "1", "2"]
            if expansion > 1:
                layers = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
                places = ["0.0", "0.1", "1.0", "1.1", "2", "3"]
            names |= {
                f"{theirs}.{layer}": f"{ours}.{place}"
                for layer, place in zip(layers, places, strict=True)
            }
    return {**names, "conv_head": f"features.{number + 1}.0", "bn2": f"features.{number + 1}.1"}
