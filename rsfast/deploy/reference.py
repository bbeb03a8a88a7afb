"""What PyTorch computed when a network was exported, so that it can be compared anywhere.

The images are patterns that are computed anew from their number and size; only their logits are
in the file.
"""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsfast.files.seal import write_whole

__all__ = ["BATCH", "REFERENCE_FILE", "Reference", "patterns", "reference_sizes"]

REFERENCE_FILE = "reference.npz"
BATCH = 3  # images of each size
_WAVES = 8  # per colour


@dataclass(frozen=True, slots=True)
class Reference:
    """Logits by PyTorch in float32.

    Attributes:
        logits: size -> [BATCH, K] of :func:`patterns` of that size.
        by_bank: trained resolution -> [R, K], of the first image, by each bank in turn: what a
            wrong bank would say.
    """

    logits: dict[int, np.ndarray]
    by_bank: dict[int, np.ndarray]

    def write(self, folder: Path) -> None:
        """Writes reference.npz."""
        arrays = {f"logits_{size}": values for size, values in self.logits.items()}
        arrays |= {f"by_bank_{size}": values for size, values in self.by_bank.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_whole(folder / REFERENCE_FILE, [buffer.getvalue()])

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """That of a folder.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        path = folder / REFERENCE_FILE
        logits: dict[int, np.ndarray] = {}
        by_bank: dict[int, np.ndarray] = {}
        try:
            with np.load(path) as file:
                for name in file.files:
                    kind, _, size = name.rpartition("_")
                    {"logits": logits, "by_bank": by_bank}[kind][int(size)] = file[name]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from error
        return cls(logits, by_bank)


def reference_sizes(resolutions: Sequence[int], sizes: tuple[int, int]) -> list[int]:
    """Every trained size, one between each two, one above and one below, in descending order.

    Args:
        resolutions: trained, descending, in pixels.
        sizes: the smallest and largest that the network takes.
    """
    between = {(a + b) // 2 for a, b in itertools.pairwise(resolutions)}
    outside = {min(resolutions[0] * 5 // 4, sizes[1]), max(resolutions[-1] * 3 // 4, sizes[0])}
    return sorted({*resolutions, *between, *outside}, reverse=True)


def patterns(size: int, dtype: str = "float32") -> np.ndarray:
    """Images of smooth waves: each pixel is like its neighbours, as in photographs.

    Args:
        size: r, in pixels.
        dtype: "float32" of about mean 0 and deviation 1, or "uint8".

    Returns:
        [BATCH, 3, r, r]; the same everywhere but for the rounding of sines.
    """
    # Numbers without a generator, whose stream a library may change: multiples of the golden mean.
    index = np.arange(BATCH * 3 * _WAVES * 4, dtype=np.float64) + 1.0
    numbers = np.mod(index * 0.6180339887498949, 1.0).reshape(BATCH, 3, _WAVES, 4)
    across, down, phase, strength = np.moveaxis(numbers, -1, 0)
    place = (np.arange(size) + 0.5) / size
    angle = (
        np.multiply.outer(16 * across - 8, place)[..., None, :]
        + np.multiply.outer(16 * down - 8, place)[..., :, None]
        + phase[..., None, None]
    )
    waves = (0.5 + strength)[..., None, None] * np.sin(2 * np.pi * angle)
    images = waves.sum(axis=2) / np.sqrt(_WAVES / 2)
    if dtype == "uint8":
        return np.clip(np.rint(128 + 50 * images), 0, 255).astype(np.uint8)
    return images.astype(np.float32)
