"""The networks that can be asked for by name."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rsfast.models.mobilenetv2 import MobileNetV2
from rsfast.models.resnet import DEPTHS, resnet

__all__ = ["ARCHITECTURES", "NETWORKS", "Network", "build", "check_arch", "is_own"]


@dataclass(frozen=True, slots=True)
class Network:
    """A network that comes with rsfast.

    Attributes:
        build: called with the number of classes.
        authors_name: of our module, in the authors' checkpoints; None if they do not have it.
        recipe: file in rsfast/recipes with the settings it is trained with.
    """

    build: Callable[[int], nn.Module]
    authors_name: Callable[[str], str]
    recipe: str


def _same(name: str) -> str:
    return name


def _mobilenetv2_name(name: str) -> str:
    """Theirs are positions in one flat sequence per block, activations counted."""
    if name == "classifier.1":
        return "classifier"
    number, rest = re.fullmatch(r"features\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
    if number == "0":
        return name
    if number == "18":
        return f"conv.{rest}"
    first, *inner = rest.removeprefix("conv.").split(".")
    # Of three layers each, in front of the projection.
    position = 3 * int(first) + int(inner[0]) if inner else None
    if position is None:
        depthwise_only = number == "1"
        position = int(first) + (2 if depthwise_only else 4)
    return f"features.{number}.conv.{position}"


NETWORKS: dict[str, Network] = {
    **{name: Network(functools.partial(resnet, name), _same, name) for name in DEPTHS},
    "mobilenetv2": Network(MobileNetV2, _mobilenetv2_name, "mobilenetv2"),
}
ARCHITECTURES = tuple(NETWORKS)
_OWN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def check_arch(arch: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: if it is not.
    """
    if arch in NETWORKS or re.fullmatch(rf"(torchvision|timm)/[\w.-]+|{_OWN}", arch):
        return arch
    raise ValueError(
        f"arch must be one of {ARCHITECTURES}, torchvision/NAME, timm/NAME or MODULE:FUNCTION, "
        f"got {arch!r}"
    )


def is_own(arch: str) -> bool:
    """Whether the name is that of somebody's own function, MODULE:FUNCTION."""
    return re.fullmatch(_OWN, arch) is not None


def build(arch: str, num_classes: int) -> nn.Module:
    """A plain network, randomly initialised, for one resolution at a time.

    Args:
        arch: see :func:`rsfast.create_model`.
        num_classes: K.

    Raises:
        ValueError: if the name is unknown, or what it names returns no network.
        ImportError: if its package is absent.
    """
    if check_arch(arch) in NETWORKS:
        return NETWORKS[arch].build(num_classes)
    package, slash, name = arch.partition("/")
    if slash:
        return (
            _from_torchvision(name, num_classes)
            if package == "torchvision"
            else _from_timm(name, num_classes)
        )
    return _from_function(arch, num_classes)


def _from_torchvision(name: str, num_classes: int) -> nn.Module:
    models = _import("torchvision.models", "torchvision")
    # Logits of auxiliary classifiers have no place in this loss.
    extra = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if extra:
        extra["init_weights"] = True
    try:
        return models.get_model(name, weights=None, num_classes=num_classes, **extra)
    except ValueError as error:
        raise ValueError(f"arch torchvision/{name}: {error}") from error


def _from_timm(name: str, num_classes: int) -> nn.Module:
    timm = _import("timm", "timm")
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes)
    except RuntimeError as error:
        raise ValueError(f"arch timm/{name}: {error}") from error


def _from_function(arch: str, num_classes: int) -> nn.Module:
    module, _, name = arch.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"arch {arch}: {error} (Python looks in the working directory and PYTHONPATH)"
        ) from error
    network = found(num_classes=num_classes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"arch {arch} must return a torch.nn.Module, got {type(network)}")
    return network


def _import(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"arch {package}/... needs {package}: pip install {package}") from error
