"""An index of images as EXIF has them shown: sizes after the turn, in which windows are drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from rsfast.data.cache import cache_root, file_stat, load_arrays, record_digest, save_arrays
from rsfast.data.index import ImageIndex, exclude_command
from rsfast.data.reading import patiently, unreadable
from rsfast.files.orientation import is_contradictory, orientation
from rsfast.files.progress import progress

__all__ = ["turned"]

_LOG = logging.getLogger(__name__)
_CONTRADICTORY = 0
_JPEG = b"\xff\xd8"
_HEAD_BYTES = 16384  # of a JPEG image in an archive, whose EXIF comes first; few have more
_WORKERS = 8  # threads that read headers


def turned(index: ImageIndex) -> ImageIndex:
    """The same images, which all loaders turn as EXIF says.

    Headers are read once. The orientations are cached as long as the list of the images, their
    sizes, the modification times of their folders or archives, and what the last check has found
    stay the same.

    Args:
        index: whose sizes are as stored.

    Raises:
        ValueError: naming the file whose EXIF contradicts itself: DALI 2.4 makes wrong pixels of
            such a file, and may end the process.
        RuntimeError: naming the file that cannot be read.
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
        path = index.name(int(orientations.argmin()))
        raise ValueError(
            f"image {path} must have one orientation for exif to be honoured, and "
            f"has EXIF of different ones; to leave it out: {exclude_command(index.known_as, path)}"
        )
    lies = orientations >= 5
    sizes = np.where(lies[:, None], index.sizes[:, ::-1], index.sizes)
    return dataclasses.replace(index, sizes=sizes, exif="honour")


def _key(index: ImageIndex) -> str:
    key = hashlib.sha256(os.fsencode(f"{os.path.realpath(index.root)}\0{index.digest}"))
    key.update(index.sizes.tobytes() + record_digest(index.key).encode())
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
    if index.archive is not None:
        head = index.head(position, _HEAD_BYTES)
        found = _in(io.BytesIO(head)) if head.startswith(_JPEG) else None
        found = _in(io.BytesIO(index.read(position))) if found is None else found
    else:
        path = index.path(position)
        try:
            found = patiently(lambda: _of_file(path), path)
        except OSError as error:
            raise unreadable(index.root, index.name(position), error) from error
    return 1 if found is None else found  # decoding will name the file


def _of_file(path: str) -> int | None:
    with open(path, "rb") as stream:
        return _in(stream)


def _in(stream: BinaryIO) -> int | None:
    """The orientation of one image; None if its header cannot be made out."""
    try:
        with Image.open(stream) as image:
            return _CONTRADICTORY if is_contradictory(image) else orientation(image)
    except Exception as error:  # Pillow's readers raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's
        return None
