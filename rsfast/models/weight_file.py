"""Reading a file of weights, whoever wrote it, and what it says about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rsfast.files.seal import is_sealed
from rsfast.files.unpickle import load_dict
from rsfast.files.weights import read_safetensors
from rsfast.models import official
from rsfast.models.weight_names import without_prefixes

__all__ = ["Normalization", "WeightFile", "read_weights"]

Normalization = tuple[tuple[float, ...], tuple[float, ...]]

# Where programs keep the weights in their checkpoints; averaged ones first.
_ENTRIES = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
)
# Of no layer: the ensemble's weights, and torchvision's count of averages.
_ASIDE = ("alpha", "module.alpha", "ensemble.alpha", "n_averaged")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # beside their config.json
_OLD_FORMAT = 2  # of rsfast, whose layers have other names


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """What was read.

    Attributes:
        path: of the file.
        sha256: of its bytes, in hex.
        source: "rsfast", "the authors' code" or "another program".
        tensors: the state dict, as it is named there.
        resolutions: of its batch-norm banks, descending; None if it has none, or does not say.
        normalization: mean and deviation of RGB in [0, 1] that its weights expect, if known.
        class_names: if known.
        arch: what the file says that it is of.
    """

    path: Path
    sha256: str
    source: str
    tensors: dict[str, Tensor]
    resolutions: tuple[int, ...] | None = None
    normalization: Normalization | None = None
    class_names: tuple[str, ...] | None = None
    arch: str | None = None


def read_weights(
    path: Path, resolutions: Sequence[int] | None, num_banks: int, fallback: Sequence[int]
) -> WeightFile:
    """Reads a file onto the CPU.

    Args:
        path: .pth, .pt or .safetensors.
        resolutions: of the file's banks, if it does not say.
        num_banks: as many banks of unknown sizes are taken for
        fallback: these sizes.

    Raises:
        ValueError: if it is missing, damaged, or holds no tensors.
    """
    about: dict[str, Any] | None
    if path.suffix == ".safetensors":
        content, about = read_safetensors(path)
        arch = about["arch"] if about else None
        if about and "packed" in about:
            raise ValueError(
                f"checkpoint {path} is packed: it has the codes of weights, not the weights that "
                f"training moves; name the checkpoint that it was made of"
            )
    else:
        content = load_dict(path)
        if is_sealed(path) is False:
            raise ValueError(f"checkpoint {path} is damaged: its checksum does not match")
        about = _about(path, content)
        arch = about["arch"] if about else content.get("arch")
    tensors = _state_dict(path, content)
    common: dict[str, Any] = {
        "path": path,
        "sha256": _sha256(path),
        "arch": arch if isinstance(arch, str) else None,
    }
    if about is not None:
        return WeightFile(
            **common,
            source="rsfast",
            tensors=tensors,
            resolutions=tuple(about["resolutions"]),
            normalization=(tuple(about["input_mean"]), tuple(about["input_std"])),
            class_names=None if about["class_names"] is None else tuple(about["class_names"]),
        )
    for bare in without_prefixes(tensors):
        if official.is_official(bare):
            sizes = resolutions or _sizes_of_authors(bare, num_banks, fallback)
            try:
                model = official.from_state_dict(bare, sizes)
            except ValueError as error:
                raise ValueError(f"checkpoint {path}, of the authors' code: {error}") from error
            return WeightFile(
                **{**common, "arch": model.arch},
                source="the authors' code",
                tensors=model.network.state_dict(),
                resolutions=model.resolutions,
                normalization=(model.input_mean, model.input_std),
            )
    return WeightFile(
        **common,
        source="another program",
        tensors=tensors,
        resolutions=tuple(resolutions or fallback),
        normalization=_beside(path),
    )


def _about(path: Path, content: dict[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint of rsfast says of its network."""
    settings = content.get("settings")
    if not isinstance(settings, dict) or "input_mean" not in content:
        return None
    if content.get("format") == _OLD_FORMAT:
        raise ValueError(
            f"checkpoint {path} is of an older rsfast (format {_OLD_FORMAT}): it can be "
            f"evaluated, not trained from"
        )
    return {
        **settings,
        **{name: content[name] for name in ("input_mean", "input_std", "class_names")},
    }


def _state_dict(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, out of whatever they are wrapped in."""
    inner: Any = content
    while isinstance(inner, dict):
        entry = next((e for e in _ENTRIES if isinstance(inner.get(e), dict) and inner[e]), None)
        if entry is None:
            break
        inner = inner[entry]
    tensors = {
        name: value
        for name, value in inner.items()
        if isinstance(name, str) and isinstance(value, Tensor) and name not in _ASIDE
    }
    if not tensors:
        raise ValueError(
            f"checkpoint {path} must hold a state dict, bare or as one of {', '.join(_ENTRIES)}, "
            f"got entries {', '.join(map(str, list(inner)[:5])) or 'none'}"
        )
    return tensors


def _sizes_of_authors(
    tensors: dict[str, Tensor], num_banks: int, fallback: Sequence[int]
) -> Sequence[int] | None:
    """Those that are taken for granted; None for the paper's."""
    has = sum(f".bn_{num_banks - 1}." in name for name in tensors)
    more = sum(f".bn_{num_banks}." in name for name in tensors)
    return tuple(fallback) if has and not more and num_banks != 5 else None


def _beside(path: Path) -> Normalization | None:
    """What timm's config.json in the folder of a file says of it."""
    if path.name not in _HUB_FILES:
        return None
    try:
        config = json.loads((path.parent / "config.json").read_text())
        about = config["pretrained_cfg"]
        mean, std = (tuple(float(part) for part in about[name]) for name in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (mean, std) if len(mean) == len(std) == 3 else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
