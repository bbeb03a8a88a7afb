"""Checkpoints: everything needed to continue or to use a network.

A checkpoint is a file of `torch.save`, sealed with a checksum (`rsfast.files.seal`), of tensors
and plain values only: reading one runs nothing. It names the network that it is of, and a function
of somebody's own is imported only where the caller names it, too. A run folder holds the newest as
last.pt, the ones before it as last-1.pt, last-2.pt, and so on.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from rsfast.files.seal import (
    is_sealed,
    link_or_copy,
    read_whole,
    seal_zip,
    sync_folder,
    try_again,
    write_whole,
)
from rsfast.files.unpickle import load_dict_from, unwrapped_name
from rsfast.files.weights import read_safetensors, weights_digest
from rsfast.losses import scores_of_resolutions
from rsfast.models import RSNet, create_model, official
from rsfast.models.lq_codes import LAYOUT, unpacked_state
from rsfast.models.registry import is_own
from rsfast.training import older

__all__ = [
    "clean",
    "load_model",
    "load_state",
    "model_payload",
    "newest",
    "parse_state",
    "read_state",
    "save",
    "save_weights",
    "save_with_predecessors",
    "write_weights",
]

_FORMAT = 3
_LOG = logging.getLogger("rsfast")
# Attributes of a network that say what goes in and what comes out.
_INPUT_FIELDS = (
    *("input_mean", "input_std", "val_crop", "exif", "levels", "picked_from", "class_names"),
)
_OF_TASK = {"segmentation": ("ignore_label",)}  # and those of one task
# What older checkpoints lack means this.
_YOUNGER: dict[str, Any] = {"exif": "ignore", "levels": "resize", "picked_from": None}


def save(payload: dict[str, Any], *paths: Path) -> None:
    """Writes a checkpoint under each of the paths; each is the old file or the whole new one.

    Raises:
        OSError: if it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **payload}, buffer)
    archive = buffer.getbuffer()
    seal = seal_zip(archive)
    for path in paths:
        write_whole(path, [archive, seal])


def save_with_predecessors(payload: dict[str, Any], folder: Path, keep: int, *also: Path) -> None:
    """Writes last.pt; the one there becomes last-1.pt, that one last-2.pt, ... `keep` in all.

    last.pt is there at every moment. The same goes under the paths in `also` first.

    Raises:
        OSError: if it cannot be written; last.pt is then what it was.
    """
    last, coming = folder / "last.pt", folder / f".last.pt.coming.{os.getpid()}"
    try:
        save(payload, *also, coming)
        if last.exists() and keep > 1:
            older = _predecessors(folder)
            for number in sorted((n for n in older if n < keep - 1), reverse=True):
                os.replace(older[number], folder / f"last-{number + 1}.pt")
            link_or_copy(last, folder / "last-1.pt")
        os.replace(coming, last)
    except BaseException:
        coming.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    for number, path in _predecessors(folder).items():
        if number >= keep:
            path.unlink()


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is as it was written; None if there is none at all.

    Damaged ones that are newer get ".damaged" behind their names.

    Raises:
        ValueError: if all of them are damaged.
        OSError: if one cannot be read, which does not say that it is damaged.
    """
    older = _predecessors(folder)
    last = folder / "last.pt"
    paths = [*([last] if last.exists() else []), *(older[number] for number in sorted(older))]
    faults = {}
    for path in paths:
        if fault := _fault(path, path):
            faults[path] = fault
            continue
        for bad in faults:
            os.replace(bad, bad.with_name(f"{bad.name}.damaged"))
        if faults:
            reasons = "; ".join(faults.values())
            _LOG.warning("CONTINUING FROM AN OLDER CHECKPOINT, %s: %s", path, reasons)
        return path
    if faults:
        raise ValueError(
            f"no checkpoint of {folder} is whole (--resume FILE takes an older copy, or "
            f"model_best.pt): {'; '.join(faults.values())}"
        )
    return None


def clean(folder: Path) -> None:
    """Removes what a process that was killed while it wrote has left."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\.+(last|model_best|log|summary).*\d", path.name):
            path.unlink(missing_ok=True)


def load_state(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this format, undamaged, on the CPU.

    Raises:
        ValueError: if it is missing, damaged, of another version of rsfast, or not a checkpoint.
        OSError: if it cannot be read.
    """
    return parse_state(Path(path), read_state(path))


def read_state(path: str | Path) -> bytes:
    """The file of :func:`load_state`, for others to parse."""
    if Path(path).suffix == ".safetensors":
        raise ValueError(f"checkpoint {path} holds weights only: continue from last.pt")
    return read_whole(Path(path))


def parse_state(path: Path, data: bytes) -> dict[str, Any]:
    """As :func:`load_state`, out of the bytes of the file at `path`."""
    content = load_dict_from(data, path)
    if "format" not in content and is_sealed(data) is None:
        raise ValueError(
            f"checkpoint {path} is not of rsfast: it has no 'format' and no checksum, and only a "
            f"run of rsfast can be continued; --pretrained trains from such weights"
        )
    _check_state(path, content, data)
    if content["format"] == older.FORMAT:
        raise ValueError(
            f"checkpoint {path} is of an older rsfast (format {older.FORMAT}) and can be "
            f"evaluated, not continued: start another --output, or continue it with the rsfast "
            f"that wrote it"
        )
    return content


def model_payload(model: RSNet) -> dict[str, Any]:
    """What it takes to rebuild a network: its settings, weights, and the input they expect.

    Raises:
        ValueError: if the network has no name, as one that :func:`rsfast.convert` made of a module.
    """
    return {
        "settings": _settings(model),
        "model": model.state_dict(),
        **_input_of(model),
    }


def save_weights(model: RSNet, alpha: Tensor, path: Path) -> None:
    """Writes a network as safetensors; its metadata says, in JSON, how to rebuild and feed it.

    Args:
        model: the network.
        alpha: [R] raw ensemble scores, the tensor "ensemble.alpha".
        path: of the file, which ends in .safetensors.

    Raises:
        ValueError: if the network has no name, as one that :func:`rsfast.convert` made of a module.
    """
    write_weights(model, model.state_dict(), alpha, path)


def write_weights(
    model: RSNet, state: Mapping[str, Tensor], alpha: Tensor, path: Path, **more: Any
) -> None:
    """As :func:`save_weights`, with another state dict and `more` in the metadata."""
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    about = {**_settings(model), **_input_of(model), **more}
    tensors = {**state, "ensemble.alpha": alpha.detach()}
    # A convolution's channels-last strides are not kept: the file holds values in row-major order.
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(about)
    metadata = {"format": "pt", "rsfast": text, "sha256": weights_digest(text, tensors)}
    write_whole(path, [to_safetensors(tensors, metadata)])


def _input_of(model: RSNet) -> dict[str, Any]:
    return {name: getattr(model, name) for name in _input_fields(model.task)}


def _input_fields(task: str) -> tuple[str, ...]:
    return _INPUT_FIELDS + _OF_TASK.get(task, ())


def _settings(model: RSNet) -> dict[str, Any]:
    if model.arch is None:
        raise ValueError(
            "network was made by convert and has no name to be rebuilt by: save its state_dict(), "
            "or make it with create_model('MODULE:FUNCTION')"
        )
    return model.settings()


def load_model(
    path: str | Path,
    resolutions: Sequence[int] | None = None,
    arch: str | None = None,
    weights: str | None = None,
) -> tuple[RSNet, Tensor]:
    """A network ready to be evaluated, from a checkpoint or safetensors of rsfast or the authors'.

    Checkpoints of format 2 are read, too.

    Args:
        path: of the checkpoint.
        resolutions: of an authors' checkpoint with other than five sizes.
        arch: what the checkpoint must be of. It has to be given for MODULE:FUNCTION, whose code a
            checkpoint does not run by itself.
        weights: of a run with --ema-decay: "averaged", or "plain" for what they are averages of;
            None takes the averaged ones where the file has some.

    Returns:
        The network in eval mode, and the raw ensemble scores [R].

    Raises:
        ValueError: if the checkpoint is missing, damaged, fits no architecture, or is of another
            one than `arch`, or does not hold the `weights`.
        ImportError: if the package of the network is absent.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        if weights is not None:
            raise ValueError(f"weights can be chosen of a .pt file, not of {path}, which holds one")
        return _load_weights(path, arch)
    data = read_whole(path)
    content = load_dict_from(data, path)
    if official.is_official(content):
        if weights == "averaged":
            raise ValueError(f"checkpoint {path} of the authors' code has no averaged weights")
        model = official.from_state_dict(content, resolutions)
        _check_arch(path, model.arch, arch)
        alpha = official.alpha_of(content)
        return model, torch.ones(len(model.resolutions)) if alpha is None else alpha
    content = {**_YOUNGER, **content}
    settings = content.get("settings")
    fields = _input_fields(settings.get("task", "") if isinstance(settings, dict) else "")
    missing = {"settings", "model", "loss", *fields} - set(content)
    if missing:
        raise ValueError(
            f"checkpoint {path} is neither of rsfast nor of the authors' code: "
            f"it has no {sorted(missing)[0]!r}"
        )
    _check_state(path, content, data)
    about = {**_dict_of(content["settings"]), **{name: content[name] for name in fields}}
    model = _rebuild(path, about, _chosen(path, content, weights), arch)
    return model, scores_of_resolutions(content["loss"]["alpha"], len(model.resolutions))


def _chosen(path: Path, content: dict[str, Any], weights: str | None) -> dict[str, Tensor]:
    """The state dict of the averaged or of the plain network."""
    if weights not in (None, "averaged", "plain"):
        raise ValueError(f"weights must be averaged or plain, got {weights!r}")
    averaged = content.get("ema")
    if weights == "averaged" and not averaged:
        raise ValueError(f"checkpoint {path} has no averaged weights: its run had no --ema-decay")
    return content["model"] if weights == "plain" else averaged or content["model"]


def _load_weights(path: Path, arch: str | None) -> tuple[RSNet, Tensor]:
    read_whole(path)  # what cannot be read is not damaged
    tensors, about = read_safetensors(path)
    if about is None or "ensemble.alpha" not in tensors:
        raise ValueError(
            f"checkpoint {path} is not of rsfast, and does not say which network its weights are "
            f"of: train from it with --pretrained"
        )
    about = {**_YOUNGER, **_dict_of(about)}
    alpha = tensors.pop("ensemble.alpha")
    packed = about.pop("packed", None)
    if packed not in (None, LAYOUT):
        raise ValueError(
            f"checkpoint {path} must be packed by layout {LAYOUT}, got {packed!r}: another version "
            f"of rsfast wrote it"
        )
    return _rebuild(path, about, tensors, arch, packed is not None), alpha


def _dict_of(settings: Any) -> dict[str, Any]:
    """Empty if a checkpoint has something else in their place."""
    return settings if isinstance(settings, dict) else {}


def _check_arch(path: Path, found: Any, wanted: str | None) -> None:
    """Refuses a network of another name than wanted, and code that nobody has asked for."""
    if wanted is not None and found != wanted:
        raise ValueError(f"checkpoint {path} is of {found}, got --arch {wanted}")
    if wanted is None and is_own(str(found)):
        raise ValueError(
            f"checkpoint {path} is of {found}: add --arch {found} if you trust that code"
        )


def _rebuild(
    path: Path,
    about: dict[str, Any],
    state: dict[str, Tensor],
    arch: str | None,
    packed: bool = False,
) -> RSNet:
    """A network in eval mode of its settings, input fields and weights."""
    fields = _input_fields(about.get("task", ""))
    if missing := {"arch", "resolutions", "num_classes", *fields} - set(about):
        raise ValueError(f"checkpoint {path} has settings without {sorted(missing)[0]!r}")
    _check_arch(path, about["arch"], arch)
    state = {unwrapped_name(name): tensor for name, tensor in state.items()}
    if older.is_old(state):
        state = older.renamed(state, about["arch"])
    try:
        model = create_model(**{k: v for k, v in about.items() if k not in fields})
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} has settings of no network: {error}") from error
    try:
        model.load_state_dict(unpacked_state(model, state) if packed else state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path} does not fit the {model.arch} it says it is: {error}"
        ) from error
    for name in fields:
        value = about[name]
        setattr(model, name, tuple(value) if isinstance(value, list) else value)
    return model.eval()


def _predecessors(folder: Path) -> dict[int, Path]:
    """n -> last-n.pt."""
    found = {}
    for path in folder.glob("last-*.pt"):
        number = path.stem.removeprefix("last-")
        if number.isdecimal():
            found[int(number)] = path
    return found


def _check_state(path: Path, content: dict[str, Any], data: bytes) -> None:
    """Refuses what is not as it was written, or of a format that is not known."""
    if fault := _fault(path, data):
        raise ValueError(fault)
    if content.get("format") not in (older.FORMAT, _FORMAT):
        raise ValueError(
            f"checkpoint {path} must be of format {_FORMAT}, got {content.get('format')}: "
            f"another version of rsfast wrote it"
        )


def _fault(path: Path, source: Path | bytes) -> str | None:
    """What is wrong with a file that should be sealed, itself or what was read of it."""
    sealed = try_again(path, lambda: is_sealed(source))
    if sealed:
        return None
    reason = "its checksum does not match"
    if sealed is None:
        reason = "it has no checksum at its end, as files that rsfast has written have"
    return f"checkpoint {path} is damaged: {reason}"
