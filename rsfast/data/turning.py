"""An index of images as EXIF has them shown: sizes after the turn, in which windows are drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from rsfast.data.cache import cache_root, file_stat, load_arrays, save_arrays
from rsfast.data.index import ImageIndex, exclude_command
from rsfast.files.orientation import is_contradictory, orientation
from rsfast.files.progress import progress

__all__ = ["turned"]

_LOG = logging.getLogger(__name__)
_CONTRADICTORY = 0
_WORKERS = 8  # threads that read headers


def turned(index: ImageIndex) -> ImageIndex:
    """The same images, which all loaders turn as EXIF says.

    Headers are read once. The orientations are cached as long as the list of the images, their
    sizes, and the modification times of their folders or archives stay the same.

    Args:
        index: whose sizes are as stored.

    Raises:
        ValueError: naming the file whose EXIF contradicts itself: DALI 2.4 makes wrong pixels of
            such a file, and may end the process.
    """
    file = cache_root() / "orientation" / f"{_key(index)}.npz"
    stored = load_arrays(file, "orientations")
    if stored is not None and stored[0].shape == (len(index),):
        orientations = stored[0]
    else:
        orientations = _read(index)
        try:
            save_arrays(file, orientations=orientations)
        except OSError as error:  # a read-only home only costs the next start time
            _LOG.warning("orientations of the images not cached: %s", error)
    if not orientations.all():
        path = index.paths[int(orientations.argmin())]
        raise ValueError(
            f"image {index.root / path} must have one orientation for exif to be honoured, and "
            f"has EXIF of different ones; to leave it out: {exclude_command(index.root, path)}"
        )
    lies = orientations >= 5
    sizes = np.where(lies[:, None], index.sizes[:, ::-1], index.sizes)
    return dataclasses.replace(index, sizes=sizes, exif="honour")


def _key(index: ImageIndex) -> str:
    key = hashlib.sha256(os.fsencode(f"{os.path.realpath(index.root)}\0{index.digest}"))
    key.update(index.sizes.tobytes())
    for folder in sorted({os.path.dirname(path) for path in index.paths}):
        place = index.root / folder
        while not place.exists():  # a name within an archive
            place = place.parent
        key.update(str(file_stat(place)).encode())
    return key.hexdigest()[:32]


def _read(index: ImageIndex) -> np.ndarray:
    with ThreadPoolExecutor(_WORKERS) as pool:
        found = progress(
            pool.map(lambda position: _of(index, position), range(len(index))),
            total=len(index),
            desc=f"orientations of {Path(index.root).name}",
            unit="img",
            disable=len(index) < 20_000,
        )
        return np.fromiter(found, dtype=np.uint8, count=len(index))


def _of(index: ImageIndex, position: int) -> int:
    try:
        stored = index.archive is not None
        source = io.BytesIO(index.read(position)) if stored else index.path(position)
        with Image.open(source) as image:
            return _CONTRADICTORY if is_contradictory(image) else orientation(image)
    except Exception:  # Pillow's readers raise nearly anything; decoding will name the file
        return 1
