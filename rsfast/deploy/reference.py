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

from rsfast.deploy.manifest import Manifest
from rsfast.deploy.preprocess import normalised
from rsfast.files.seal import write_whole

__all__ = ["BATCH", "REFERENCE_FILE", "Reference", "patterns", "reference_sizes"]

REFERENCE_FILE = "reference.npz"
BATCH = 3  # images of each size
_FORMAT = 1  # raise it when patterns or reference_sizes change
_WAVES = 16  # per colour
_CONTRAST = 50  # standard deviation of a pixel's value


@dataclass(frozen=True, slots=True)
class Reference:
    """Logits of :func:`patterns`, by PyTorch in float32 if nothing else is said.

    Attributes:
        logits: size -> [BATCH, K] of the patterns of that size.
        by_bank: trained resolution -> [R, K], of the first image, by each bank in turn: what a
            wrong bank would say. None where all resolutions share one.
        int8: the same of int8 networks that were quantised for one resolution each; none where
            nothing was.
        steps: whether activations are quantised: one at a threshold falls either way by rounding,
            and moves the logits of its image.
    """

    logits: dict[int, np.ndarray]
    by_bank: dict[int, np.ndarray]
    int8: dict[int, np.ndarray]
    steps: bool = False

    def write(self, folder: Path) -> None:
        """Writes reference.npz."""
        arrays = {f"logits_{size}": values for size, values in self.logits.items()}
        arrays |= {f"by_bank_{size}": values for size, values in self.by_bank.items()}
        arrays |= {f"int8_{size}": values for size, values in self.int8.items()}
        arrays["steps"] = np.array(self.steps)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, format=np.array(_FORMAT), **arrays)  # type: ignore[arg-type]
        write_whole(folder / REFERENCE_FILE, [buffer.getvalue()])

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """That of a folder.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        path = folder / REFERENCE_FILE
        found: dict[str, dict[int, np.ndarray]] = {"logits": {}, "by_bank": {}, "int8": {}}
        try:
            with np.load(path) as file:
                written = int(file["format"])
                steps = bool(file["steps"]) if "steps" in file.files else False
                for name in set(file.files) - {"format", "steps"}:
                    kind, _, size = name.rpartition("_")
                    found[kind][int(size)] = file[name]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from error
        if written != _FORMAT:
            raise ValueError(f"{path} must be of format {_FORMAT}, got {written}: export anew")
        return cls(**found, steps=steps)


def reference_sizes(resolutions: Sequence[int], sizes: tuple[int, int]) -> list[int]:
    """Every trained size, one between each two, two above and two below, in descending order.

    Args:
        resolutions: trained, descending, in pixels.
        sizes: the smallest and largest that the network takes.
    """
    between = {(a + b) // 2 for a, b in itertools.pairwise(resolutions)}
    outside = {min(resolutions[0] * 5 // 4, sizes[1]), max(resolutions[-1] * 3 // 4, sizes[0])}
    return sorted({*resolutions, *between, *outside, *sizes}, reverse=True)


def patterns(size: int, manifest: Manifest) -> np.ndarray:
    """Images as a network takes them, of waves that are weaker the finer, as in photographs.

    Args:
        size: r, in pixels.
        manifest: of the network.

    Returns:
        [BATCH, 3, r, r] of the manifest's dtype; the same everywhere but for rounding.
    """
    # Numbers without a generator, whose stream a library may change: the golden mean times squares.
    index = np.arange(BATCH * 3 * _WAVES * 3, dtype=np.float64) + 1.0
    numbers = np.mod(index**2 * 0.6180339887498949, 1.0).reshape(BATCH, 3, _WAVES, 3)
    across, down, phase = np.moveaxis(numbers, -1, 0)
    across, down = 16 * across - 8, 16 * down - 8  # waves per image
    place = (np.arange(size) + 0.5) / size
    angle = (
        np.multiply.outer(across, place)[..., None, :]
        + np.multiply.outer(down, place)[..., :, None]
        + phase[..., None, None]
    )
    strength = 1 / (0.5 + np.hypot(across, down))
    images = (strength[..., None, None] * np.sin(2 * np.pi * angle)).sum(axis=2)
    images *= _CONTRAST / images.std(axis=(2, 3), keepdims=True)
    pixels = np.clip(np.rint(128 + images), 0, 255).astype(np.uint8)
    return normalised(pixels, manifest)
