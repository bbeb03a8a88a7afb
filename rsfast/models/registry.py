"""The networks that can be asked for by name."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rsfast.files.task_names import TASKS
from rsfast.models.lq import FULL_PRECISION, Bits, check_bits
from rsfast.models.mobilenetv2 import MobileNetV2
from rsfast.models.refinenet import REFINENETS, refinenet
from rsfast.models.resnet import DEPTHS, init_residual, resnet
from rsfast.models.resnet_lq import LQ_RESNETS, resnet_lq

__all__ = [
    "ARCHITECTURES",
    "NETWORKS",
    "QUANTISED",
    "Network",
    "bits_of",
    "build",
    "check_arch",
    "check_task",
    "check_zero_init",
    "is_own",
    "recipe_of",
    "task_of",
]


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
# Quantised networks, and the recipe of each; the authors' checkpoints of them are not read.
QUANTISED = {name: f"{plain}_w2a32" for name, plain in LQ_RESNETS.items()}
ARCHITECTURES = (*NETWORKS, *QUANTISED, *REFINENETS)
_OWN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def check_arch(arch: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: if it is not.
    """
    if arch in ARCHITECTURES or re.fullmatch(rf"(torchvision|timm)/[\w.-]+|{_OWN}", arch):
        return arch
    raise ValueError(
        f"arch must be one of {ARCHITECTURES}, torchvision/NAME, timm/NAME or MODULE:FUNCTION, "
        f"got {arch!r}"
    )


def is_own(arch: str) -> bool:
    """Whether the name is that of somebody's own function, MODULE:FUNCTION."""
    return re.fullmatch(_OWN, arch) is not None


def recipe_of(arch: str) -> str | None:
    """The file in rsfast/recipes with the settings it is trained with; None if there is none."""
    if arch in NETWORKS:
        return NETWORKS[arch].recipe
    return "refinenet101" if arch in REFINENETS else QUANTISED.get(arch)


def task_of(arch: str) -> str | None:
    """What a network that comes with rsfast computes, one of TASKS; None for all others."""
    if arch in REFINENETS:
        return "segmentation"
    return "classification" if arch in ARCHITECTURES else None


def check_task(arch: str, task: str | None = None) -> str:
    """What a network is for: `task`, or by default what its architecture is for.

    Raises:
        ValueError: if there is no such task, or it is not the architecture's.
    """
    own = task_of(arch)
    if task is None:
        return own or "classification"
    if task not in TASKS or own not in (None, task):
        wanted = f"{own}, which {arch} is for" if own else f"one of {TASKS}"
        raise ValueError(f"task must be {wanted}, got {task!r}")
    return task


def bits_of(
    arch: str, weight_bits: int | None = None, activation_bits: int | None = None
) -> Bits | None:
    """The bits of a quantised network, None for one in full precision.

    Args:
        arch: see :func:`rsfast.create_model`.
        weight_bits: 1 to 4, by default 2.
        activation_bits: 1 to 4, or 32, the default, for full precision.

    Raises:
        ValueError: if a number is out of range, or given for a network that is not quantised.
    """
    if arch not in QUANTISED:
        for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if bits is not None:
                raise ValueError(f"{name} is of {' and '.join(QUANTISED)}, got {bits} for {arch}")
        return None
    weight = 2 if weight_bits is None else check_bits("weight_bits", weight_bits)
    activation = FULL_PRECISION if activation_bits is None else activation_bits
    if type(activation) is not int or activation != FULL_PRECISION:
        check_bits("activation_bits, if not 32 (full precision),", activation)
    return Bits(weight, activation)


def check_zero_init(arch: str, bits: Bits | None, zero_init_residual: bool | None) -> None:
    """Refuses to choose the start of residual blocks that end in no batch norm, or are not ours.

    Raises:
        ValueError: naming the network.
    """
    ours = arch in DEPTHS or arch in REFINENETS or arch in QUANTISED
    quantised = bits is not None and bits.activation != FULL_PRECISION
    if zero_init_residual is not None and (not ours or quantised):
        shown = f"{arch} with activations of {bits.activation} bits" if bits and ours else arch
        raise ValueError(
            f"zero_init_residual is of rsfast's ResNets with activations in full precision, got "
            f"{zero_init_residual} for {shown}"
        )


def build(
    arch: str,
    num_classes: int,
    bits: Bits | None = None,
    zero_init_residual: bool | None = None,
) -> nn.Module:
    """A plain network, randomly initialised, for one resolution at a time.

    Args:
        arch: see :func:`rsfast.create_model`.
        num_classes: K.
        bits: of a quantised network.
        zero_init_residual: see :func:`rsfast.create_model`.

    Raises:
        ValueError: if the name is unknown, or what it names returns no network.
        ImportError: if its package is absent.
    """
    check_zero_init(check_arch(arch), bits, zero_init_residual)
    network = _network(arch, num_classes, bits)
    if zero_init_residual is not None:
        init_residual(network, 0.0 if zero_init_residual else 1.0)
    return network


def _network(arch: str, num_classes: int, bits: Bits | None) -> nn.Module:
    if arch in NETWORKS:
        return NETWORKS[arch].build(num_classes)
    if arch in REFINENETS:
        return refinenet(arch, num_classes)
    if bits is not None:
        return resnet_lq(arch, num_classes, bits)
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
