"""Checkpoints: everything needed to continue or to use a network, replaced atomically on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsfast.models import RSNet, create_model, official
from rsfast.unpickle import load_dict

__all__ = ["copy", "load_model", "model_payload", "save"]

_FORMAT = 1
# Attributes of a network that say what goes in and what comes out.
_INPUT_FIELDS = ("input_mean", "input_std", "val_crop", "class_names")


def save(payload: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint; the file under `path` is the old one or the whole new one."""
    _replace(path, lambda file: torch.save({"format": _FORMAT, **payload}, file))


def copy(source: Path, path: Path) -> None:
    """Copies a checkpoint under another name, in the same safe way."""
    _replace(path, lambda file: shutil.copyfile(source, file))


def model_payload(model: RSNet) -> dict[str, Any]:
    """What it takes to rebuild a network: its settings, weights, and the input they expect."""
    return {
        "settings": model.settings(),
        "model": model.state_dict(),
        **{name: getattr(model, name) for name in _INPUT_FIELDS},
    }


def load_model(path: str | Path, resolutions: Sequence[int] | None = None) -> tuple[RSNet, Tensor]:
    """A network ready to be evaluated, from a checkpoint of rsfast or of the authors' code.

    Averaged (EMA) weights are taken where the run kept them.

    Args:
        path: of the checkpoint.
        resolutions: of an authors' checkpoint with other than five sizes.

    Returns:
        The network in eval mode, and the raw ensemble scores [R].

    Raises:
        ValueError: if the checkpoint is missing, damaged or fits no architecture.
    """
    content = load_dict(path)
    if official.is_official(content):
        model = official.from_state_dict(content, resolutions)
        alpha = official.alpha_of(content)
        return model, torch.ones(len(model.resolutions)) if alpha is None else alpha
    missing = {"settings", "model", "loss", *_INPUT_FIELDS} - set(content)
    if missing:
        raise ValueError(
            f"checkpoint {path} is neither of rsfast nor of the authors' code: "
            f"it has no {sorted(missing)[0]!r}"
        )
    model = create_model(**content["settings"])
    try:
        model.load_state_dict(content.get("ema") or content["model"])
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint {path} does not fit the {model.arch} it says it is: {error}"
        ) from error
    for name in _INPUT_FIELDS:
        setattr(model, name, content[name])
    return model.eval(), content["loss"]["alpha"]


def _replace(path: Path, write: Callable[[str], Any]) -> None:
    """Writes a temporary file beside `path`, makes sure it is on disk, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(str(temporary))
        _sync(str(temporary))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(str(path.parent))


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
