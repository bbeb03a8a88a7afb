"""Reading files of weights in the safetensors format, with the checksum that rsfast's own have."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["read_safetensors", "weights_digest"]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file, on the CPU, and what rsfast has written about them.

    Args:
        path: of a .safetensors file of any program.

    Returns:
        Name -> tensor, and the settings of a network of rsfast; None if the file is not of rsfast.

    Raises:
        ValueError: if the file is missing, damaged, or its checksum does not match.
    """
    if not path.is_file():
        raise ValueError(
            f"checkpoint {path} {'is a folder' if path.is_dir() else 'does not exist'}"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "rsfast" not in metadata:
            return tensors, None
        if metadata["sha256"] != weights_digest(metadata["rsfast"], tensors):
            raise ValueError("its checksum does not match")
        return tensors, json.loads(metadata["rsfast"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from error


def weights_digest(about: str, tensors: dict[str, Tensor]) -> str:
    """The checksum of all that a file of rsfast says, in hex."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
