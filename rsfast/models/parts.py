"""Parts of a network by name, and keeping some of them as they are.

A part is a name that is defined in terms of the modules, so that it means the same in every
network, or the path of a module of this one: `layer1` is all of `layer1.*`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rsfast.models.rsnet import RSNet
from rsfast.pyramid import SwitchableBatchNorm2d

__all__ = [
    "PARTS",
    "classifier_of",
    "decoder_of",
    "freeze",
    "frozen_by",
    "parts_of",
    "trunk_of",
]

_TRUNKS = ("trunk", "backbone")
_ALL_BUT = "all-but-"
_FEW = 3  # modules, as the features and the classifier of a MobileNet
PARTS = {
    "classifier": "the last linear layer or convolution with an output for each class",
    "backbone": "all but the classifier; in segmentation the trunk, if the network has one",
    "stem": "all parameters in front of the second convolution",
    "batch-norms": "gamma and beta of all batch norms",
}


def classifier_of(network: nn.Module, num_classes: int) -> str | None:
    """The path of the classifier: the last linear layer or convolution with K outputs; or None."""
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == num_classes
    ]
    return found[-1] if found else None


def trunk_of(network: nn.Module) -> str | None:
    """The path of the classification network that a segmentation network is built on; or None."""
    names = [name for name, _ in network.named_children()]
    return next((name for name in _TRUNKS if name in names), None)


def decoder_of(model: RSNet) -> set[int]:
    """The `id` of each parameter of a segmentation network that is not of its trunk.

    Raises:
        ValueError: if the network has no module of that name.
    """
    trunk = trunk_of(model.network)
    if trunk is None:
        raise ValueError(
            f"decoder_lr is of what is not in the module {' or '.join(_TRUNKS)} of a network, and "
            f"{model.arch or type(model.network).__name__} has none: leave it away"
        )
    inside = {id(param) for param in model.network.get_submodule(trunk).parameters()}
    return {id(param) for param in model.network.parameters()} - inside


def parts_of(model: RSNet) -> list[str]:
    """The parts that a network has, without those within others."""
    return list(dict.fromkeys([*PARTS, *_top_level(model.network), f"{_ALL_BUT}PART"]))


def frozen_by(model: RSNet, parts: Sequence[str]) -> set[str]:
    """Names of the parameters, as in `model.network`, that the parts hold.

    Raises:
        ValueError: if a part is unknown, or they leave nothing but the ensemble's weights to train.
    """
    frozen: set[str] = set()
    for part in parts:
        frozen |= _named(model, part)
    if parts and frozen == _all(model):
        raise ValueError(f"freeze must leave something to train, got {' '.join(parts)}")
    return frozen


def freeze(model: RSNet, parts: Sequence[str]) -> list[str]:
    """Keeps parts of a network as they are; to be called before its optimiser is made.

    Frozen parameters get no gradient, and `rsfast.optim.build_optimizer` leaves them out: no decay,
    no momentum. Frozen batch norms keep gamma and beta; they go on to normalise training images
    with the statistics of the batch and to track them, bank by bank, because statistics belong to
    the resolution, and those that a single resolution left do not fit the others.
    Quantised weights keep their levels; quantised activations go on to fit theirs to what they see.

    Args:
        model: the network; what its parts do not name is left as it is.
        parts: names of `PARTS`, paths of modules, or all-but-PART.

    Returns:
        Names of the frozen parameters.

    Raises:
        ValueError: if a part is unknown, or they leave nothing to train.
    """
    frozen = frozen_by(model, parts)
    for name, param in model.network.named_parameters():
        if name in frozen:
            param.requires_grad_(False)
    return sorted(frozen)


def _all(model: RSNet) -> set[str]:
    return {name for name, _ in model.network.named_parameters()}


def _named(model: RSNet, part: str) -> set[str]:
    if part.startswith(_ALL_BUT):
        return _all(model) - _named(model, part.removeprefix(_ALL_BUT))
    network: Any = model.network
    trunk = trunk_of(network) if model.task == "segmentation" else None
    if part == "backbone" and trunk is not None:
        return _below(model, trunk)
    if part == "backbone":
        return _all(model) - _named(model, "classifier")
    if part == "classifier":
        path = classifier_of(network, model.num_classes)
        if path is None:
            raise ValueError(
                f"freeze knows no classifier in {type(network).__name__}: no linear layer or "
                f"convolution has {model.num_classes} outputs; name modules, such as "
                f"{' '.join(_top_level(network)[:3])}"
            )
        return _below(model, path)
    if part == "stem":
        return _stem(model)
    if part == "batch-norms":
        norms = [n for n, m in network.named_modules() if isinstance(m, SwitchableBatchNorm2d)]
        return set().union(*(_below(model, name) for name in norms))
    found = _below(model, part)
    if not found:
        raise ValueError(
            f"freeze must name parts of {model.arch or type(network).__name__}: "
            f"{', '.join(parts_of(model))}, or modules within them; got {part!r}"
        )
    return found


def _below(model: RSNet, path: str) -> set[str]:
    return {name for name in _all(model) if name == path or name.startswith(f"{path}.")}


def _stem(model: RSNet) -> set[str]:
    """In the order of the modules, which is that of the names."""
    convolutions = [n for n, m in model.network.named_modules() if isinstance(m, nn.Conv2d)]
    names = [name for name, _ in model.network.named_parameters()]
    second = f"{convolutions[1]}." if len(convolutions) > 1 else None
    if second is None:
        return _below(model, convolutions[0]) if convolutions else set()
    return set(names[: next(i for i, name in enumerate(names) if name.startswith(second))])


def _top_level(network: nn.Module) -> list[str]:
    """Children with parameters; where they are few, the children of sequences among them, too."""
    names = _with_parameters(network)
    if len(names) > _FEW:
        return names
    found = []
    for name in names:
        child = network.get_submodule(name)
        within = _with_parameters(child) if isinstance(child, nn.Sequential) else []
        found += [name, *(f"{name}.{inner}" for inner in within)]
    return found


def _with_parameters(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if list(child.parameters())]
