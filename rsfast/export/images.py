"""Real images for an export: those that int8 is calibrated on, and those it is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from rsfast.data.dataset import open_split
from rsfast.data.index import ImageIndex, decode
from rsfast.data.labels import warn_of_numbers
from rsfast.deploy.manifest import Manifest
from rsfast.deploy.preprocess import preprocess

__all__ = ["batches", "calibration", "index_split", "spread"]

_BATCH = 8  # ranges of a ResNet-50 at 224 px take 2 GiB; more with larger ones


def index_split(
    data: str | Path, split: str, manifest: Manifest, labels: str | Path | None = None
) -> ImageIndex:
    """The images of DATA/split, or of a pattern of archives, turned as the network is used to.

    Args:
        data: folder, or pattern.
        split: "train" or "val".
        manifest: of the network.
        labels: list of the labels of a folder without class folders.

    Raises:
        ValueError: if there are none, or they have other classes than the network.
    """
    index = open_split(data, split, labels=labels, exif=manifest.exif)
    names = index.class_names
    wrong = manifest.class_names not in (None, names)
    if len(names) != manifest.num_classes or wrong:
        raise ValueError(
            f"data folder {data} must have the {manifest.num_classes} classes of the network, "
            f"got {len(names)} ({', '.join(names[:3])}, ...)"
        )
    if manifest.class_names is None:
        warn_of_numbers(data, names)
    return index


def spread(index: ImageIndex, count: int) -> np.ndarray:
    """Positions of at most so many images, evenly over the index and so over the classes."""
    count = min(count, len(index))
    return np.arange(count) * len(index) // count


def batches(
    index: ImageIndex, positions: np.ndarray
) -> Iterator[tuple[np.ndarray, list[Image.Image]]]:
    """Positions and their pictures, some at a time.

    Raises:
        RuntimeError: naming the file that cannot be decoded, and how to leave it out.
    """
    for start in range(0, len(positions), _BATCH):
        part = positions[start : start + _BATCH]
        yield part, [decode(index, int(position)) for position in part]


def calibration(
    data: str | Path, manifest: Manifest, count: int
) -> tuple[int, Callable[[int], Iterator[np.ndarray]]]:
    """Training images, prepared as for validation, spread evenly over the classes.

    Args:
        data: folder with train/, or a pattern of archives of training images.
        manifest: of the network.
        count: of images at most.

    Returns:
        How many there are, and resolution -> batches [N, 3, r, r] of them.

    Raises:
        ValueError: if the data set is not the network's.
    """
    index = index_split(data, "train", manifest)
    positions = spread(index, count)

    def prepared(resolution: int) -> Iterator[np.ndarray]:
        for _, pictures in batches(index, positions):
            yield preprocess(pictures, resolution, manifest)

    return len(positions), prepared
