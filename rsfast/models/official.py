"""Import and export of checkpoints in the layout of the authors' code.

Their keys: a `module.` prefix (DataParallel), a second `.module` inside every shared layer, and
batch-norm copies `bn_0 ... bn_{R-1}` in the order of their --sizes list, largest first. Their
networks take RGB in [0, 1] without mean and deviation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsfast.files.unpickle import load_dict, unwrapped_name
from rsfast.models.registry import NETWORKS
from rsfast.models.rsnet import RSNet, create_model
from rsfast.pyramid import SwitchableBatchNorm2d

__all__ = ["alpha_of", "from_state_dict", "is_official", "key_map", "load", "save"]

_DEFAULT_RESOLUTIONS = (224, 192, 160, 128, 96)
_ALIKE = 0.9  # share of layers, above which one that is missing is taken for damage
_BN_FIELDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def load(path: str | Path, resolutions: Sequence[int] | None = None) -> RSNet:
    """Reads a checkpoint of the authors' code.

    Args:
        path: their checkpoint.pth.tar or model_best.pth.tar, or a bare state dict.
        resolutions: what their --sizes was. The file does not say; five sets without this argument
            are taken for (224, 192, 160, 128, 96).

    Returns:
        The network in eval mode, with input_mean 0 and input_std 1 (they do not normalise).

    Raises:
        ValueError: if the file is damaged, of another kind, or its keys fit no architecture.
    """
    return from_state_dict(load_dict(path), resolutions)


def is_official(content: Any) -> bool:
    """Whether a loaded file has the layout of the authors' code."""
    state = _state_dict(content)
    return any(".bn_0." in key or ".bn1.bn_0." in key for key in state)


def from_state_dict(content: dict[str, Any], resolutions: Sequence[int] | None = None) -> RSNet:
    """As :func:`load`, from what `torch.load` returned."""
    state = _state_dict(content)
    num_sets = 1 + max(
        (int(found[1]) for key in state if (found := re.search(r"\.bn_(\d+)\.", key))), default=-1
    )
    if not num_sets:
        raise ValueError("checkpoint is not of the authors' code: it has no bn_0 keys")
    if resolutions is None:
        if num_sets != len(_DEFAULT_RESOLUTIONS):
            raise ValueError(
                f"resolutions must be given: the checkpoint has {num_sets} batch-norm banks and "
                f"does not say of which sizes"
            )
        resolutions = _DEFAULT_RESOLUTIONS
    if len(resolutions) != num_sets:
        raise ValueError(
            f"resolutions must be {num_sets}, one per batch-norm bank of the checkpoint, "
            f"got {tuple(resolutions)}"
        )
    arch = _guess_arch(state)
    num_classes = state[f"{_classifier_name(arch)}.module.weight"].shape[0]
    model = create_model(arch, resolutions, num_classes)
    entries = key_map(model)
    tensors = model.state_dict()  # shares memory with the network
    for theirs, ours, bank in entries:
        target = tensors[ours] if bank is None else tensors[ours][bank]
        if theirs not in state:
            raise ValueError(f"checkpoint lacks {theirs}, which a {arch} of this layout has")
        if state[theirs].shape != target.shape:
            raise ValueError(
                f"{theirs} must be {tuple(target.shape)} for {arch}, "
                f"got {tuple(state[theirs].shape)}"
            )
        target.copy_(state[theirs])
    unknown = sorted(set(state) - {"alpha"} - {theirs for theirs, _, _ in entries})
    if unknown:
        raise ValueError(f"checkpoint has {len(unknown)} keys that {arch} lacks: {unknown[:3]}")
    return model.eval()


def alpha_of(content: dict[str, Any]) -> Tensor | None:
    """[R] raw ensemble scores of a checkpoint of the authors' code, if it has them."""
    return _state_dict(content).get("alpha")


def save(model: RSNet, path: str | Path, alpha: Tensor | None = None) -> None:
    """Writes a network as the authors' code would.

    Args:
        model: with private batch norm. The file cannot say how inputs are normalised; the
            authors' code will feed it [0, 1].
        path: of the file.
        alpha: [R] raw ensemble scores; equal ones by default.

    Raises:
        ValueError: if the batch norm is shared: their layout has no place for it.
    """
    if model.bn != "private":
        raise ValueError(f"model must have private batch norm to be saved, got bn={model.bn!r}")
    if alpha is None:
        alpha = torch.ones(len(model.resolutions))
    tensors = model.state_dict()
    state = {"alpha": alpha.detach().cpu()}
    for theirs, ours, bank in key_map(model):
        tensor = tensors[ours] if bank is None else tensors[ours][bank]
        state[theirs] = tensor.detach().cpu().clone()
    torch.save(
        {
            "epoch": 0,
            "arch": f"parallel_{model.arch}",
            "state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
            "best_acc0": 0.0,
            "best_acc": 0.0,
        },
        path,
    )


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without what DataParallel and torch.compile put before them."""
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {unwrapped_name(key): value for key, value in state.items()}


def _classifier_name(arch: str) -> str:
    """In their layout."""
    return list(_shared_layers(arch))[-1].removesuffix(".module.weight")


def _shared_layers(arch: str) -> dict[str, tuple[int, ...]]:
    """Their keys of convolutions and classifier, in order, and shapes without output channels."""
    network = NETWORKS[arch]
    with torch.device("meta"):
        layers = network.build(1).named_modules()
    return {
        f"{network.authors_name(name)}.module.weight": tuple(layer.weight.shape[1:])
        for name, layer in layers
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def _guess_arch(state: dict[str, Tensor]) -> str:
    """The network that shares most layers with a checkpoint; what is missing is named later."""
    found = {k: tuple(v.shape[1:]) for k, v in state.items() if k.endswith(".module.weight")}

    def alike(arch: str) -> float:
        expected = _shared_layers(arch)
        return len(found.items() & expected.items()) / len(found.keys() | expected.keys())

    best = max(NETWORKS, key=alike)
    if alike(best) < _ALIKE or f"{_classifier_name(best)}.module.weight" not in found:
        raise ValueError(
            f"checkpoint fits no architecture of rsfast ({', '.join(NETWORKS)}): {best} is the "
            f"nearest, and shares {alike(best):.0%} of its layers"
        )
    return best


def key_map(model: RSNet) -> list[tuple[str, str, int | None]]:
    """Their key (no DataParallel prefix), our state dict key, and the batch-norm bank or None.

    Covers everything but alpha, which belongs to the loss here.

    Raises:
        ValueError: if the authors have no such network.
    """
    if model.arch not in NETWORKS:
        raise ValueError(
            f"the authors' layout has {', '.join(NETWORKS)} only, got arch {model.arch!r}"
        )
    theirs = NETWORKS[model.arch].authors_name
    entries: list[tuple[str, str, int | None]] = []
    for ours, layer in model.network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            entries += (
                (f"{theirs(ours)}.module.{field}", f"network.{ours}.{field}", None)
                for field, _ in layer.named_parameters()
            )
        elif isinstance(layer, SwitchableBatchNorm2d):
            entries += (
                (f"{theirs(ours)}.bn_{bank}.{field}", f"network.{ours}.{field}", bank)
                for bank in range(layer.num_banks)
                for field in _BN_FIELDS
            )
    return entries
