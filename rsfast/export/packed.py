"""The packed file of a quantised network in an exported folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from torch import Tensor

from rsfast.deploy.manifest import PACKED_FILE, Manifest
from rsfast.deploy.reference import Reference
from rsfast.export.reference import compute
from rsfast.models import RSNet
from rsfast.training.checkpoint import load_model
from rsfast.training.packed import save_packed

__all__ = ["check_same", "logits_of", "write"]


def write(model: RSNet, alpha: Tensor, folder: Path) -> str:
    """Writes the file, and returns its SHA-256 in hex.

    Raises:
        ValueError: if the network is in full precision.
    """
    save_packed(model, alpha, folder / PACKED_FILE)
    with open(folder / PACKED_FILE, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_same(folder: Path, expected: Reference, manifest: Manifest, arch: str | None) -> None:
    """Refuses a file whose network is not, bit for bit, the one that it was written of.

    Args:
        folder: of the file.
        expected: what the network that it was written of says, on this machine.
        manifest: of the export.
        arch: as in :func:`rsfast.checkpoint.load_model`.

    Raises:
        RuntimeError: naming the sizes at which logits differ.
    """
    found = logits_of(folder, manifest, arch)
    odd = [r for r, logits in expected.logits.items() if not np.array_equal(found[r], logits)]
    if odd:
        raise RuntimeError(
            f"{PACKED_FILE} must give the logits of {manifest.checkpoint} bit for bit, and does "
            f"not at {', '.join(map(str, odd))} px: export again, and if that says the same, "
            f"leave --packed away"
        )


def logits_of(folder: Path, manifest: Manifest, arch: str | None = None) -> dict[int, np.ndarray]:
    """Size -> [BATCH, K], as in `Reference.logits`, by the network of the file.

    Raises:
        ValueError: if it is damaged, or of MODULE:FUNCTION and `arch` does not name that.
    """
    model, _ = load_model(folder / PACKED_FILE, arch=arch)
    return compute(model, manifest).logits
