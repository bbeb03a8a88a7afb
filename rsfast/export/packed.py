"""The packed file of a quantised network in an exported folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from torch import Tensor

from rsfast.deploy.manifest import PACKED_FILE, Manifest
from rsfast.export.reference import compute
from rsfast.models import RSNet
from rsfast.training.checkpoint import load_model
from rsfast.training.packed import save_packed

__all__ = ["logits_of", "write"]


def write(model: RSNet, alpha: Tensor, folder: Path) -> str:
    """Writes the file, and returns its SHA-256 in hex.

    Raises:
        ValueError: if the network is in full precision.
    """
    save_packed(model, alpha, folder / PACKED_FILE)
    with open(folder / PACKED_FILE, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def logits_of(folder: Path, manifest: Manifest) -> dict[int, np.ndarray]:
    """Size -> [BATCH, K], as in `Reference.logits`, by the network of the file.

    Raises:
        ValueError: if it is damaged.
    """
    model, _ = load_model(folder / PACKED_FILE)
    return compute(model, manifest).logits
