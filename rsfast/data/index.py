"""The images of one split, and how the bytes of each are read.

An index holds what every loader needs before it decodes anything. Its images are files of their
own below a folder, or lie in an archive.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from rsfast.data import reading
from rsfast.data.cache import Key
from rsfast.files.orientation import shown_size, upright
from rsfast.files.pictures import as_rgb

__all__ = [
    "SPLITS",
    "Archive",
    "ImageIndex",
    "check_command",
    "check_size",
    "decode",
    "exclude_command",
    "printable",
    "size_now",
]

SPLITS = ("train", "val")


class Archive(Protocol):
    """Files that hold many images each; workers inherit it, or get it pickled."""

    def read(self, row: int) -> bytes:
        """An image as it was encoded.

        Raises:
            OSError: if it cannot be read.
        """

    def head(self, row: int, most: int) -> bytes:
        """At most so many of its first bytes, with the same errors."""


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """The images of one split.

    Attributes:
        root: the split's folder.
        paths: n paths relative to root, sorted within each folder; in an archive, that of the
            archive's file with the name within it behind.
        labels: [n] int64, position of the image's class in class_names.
        sizes: [n, 2] int32, height and width in pixels, as stored or as EXIF has them shown.
        class_names: sub-folder names, sorted.
        archive: what holds the images; None where they are files of their own.
        rows: [n] int64, of each image in the archive; None without one.
        exif: what becomes of EXIF's orientation: "ignore" it, or "honour" it by a turn, after
            which the sizes are.
        copies: path -> absolute path of what is read in place of the file, of those cut-off images
            that are tolerated; None where there are none.
        place: what the commands know the split by, such as a pattern of archives; None for root.
        files: the archives, absolute and sorted.
        contents: [n] int64, what tells the content of one file from another's; None where it is not
            looked at, as that of images is not.
    """

    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    class_names: tuple[str, ...]
    archive: Archive | None = None
    rows: np.ndarray | None = None
    exif: str = "ignore"
    copies: Mapping[str, str] | None = None
    place: Path | None = None
    files: tuple[str, ...] = ()
    contents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, position: int) -> str:
        """Absolute path of the file that one image is read from."""
        path = self.paths[position]
        return os.path.join(self.root, (self.copies or {}).get(path, path))

    def name(self, position: int) -> str:
        """Absolute path by which people and the commands know one image, repaired or not."""
        return os.path.join(self.root, self.paths[position])

    @property
    def known_as(self) -> Path:
        """What `python -m rsfast.data` knows the split by."""
        return self.root if self.place is None else self.place

    @property
    def key(self) -> Key:
        """What the records of the split are kept under."""
        return self.files or self.known_as

    def read(self, position: int) -> bytes:
        """One image as it was encoded; errors that may pass are waited for, some seconds long.

        Raises:
            RuntimeError: naming the file, if it is gone or cannot be read.
        """
        return self._read(position, -1)

    def head(self, position: int, most: int) -> bytes:
        """At most so many of the first bytes of one image, with the same errors."""
        return self._read(position, most)

    def _read(self, position: int, most: int) -> bytes:
        name, copy = self.name(position), (self.copies or {}).get(self.paths[position])
        try:
            return reading.patiently(lambda: self._read_once(position, most), name)
        except OSError as error:
            raise reading.unreadable(self.root, name, error, copy) from error

    def _read_once(self, position: int, most: int) -> bytes:
        if self.archive is not None:
            assert self.rows is not None
            row = int(self.rows[position])
            return self.archive.read(row) if most < 0 else self.archive.head(row, most)
        with open(self.path(position), "rb") as file:
            return file.read(most)

    def take(self, positions: np.ndarray) -> ImageIndex:
        """Some of the images, with all classes."""
        return dataclasses.replace(
            self,
            paths=tuple(self.paths[i] for i in positions),
            labels=self.labels[positions],
            sizes=self.sizes[positions],
            rows=None if self.rows is None else self.rows[positions],
            contents=None if self.contents is None else self.contents[positions],
        )

    @property
    def digest(self) -> str:
        """A name for the images, in order, for their labels, what becomes of their orientation,
        and for what they hold where that is known."""
        digest = hashlib.sha256(os.fsencode("\0".join(self.paths)))  # names of any bytes
        is_flat = any(self.paths[:1]) and not os.path.dirname(self.paths[0])
        if self.archive is not None or is_flat:  # no class folder tells the labels
            digest.update(self.labels.tobytes())
        if self.contents is not None:
            digest.update(self.contents.tobytes())
        suffix = "" if self.exif == "ignore" else f":{self.exif}"
        return f"{len(self)}:{digest.hexdigest()[:16]}{suffix}"


def printable(path: str) -> str:
    """A path without line breaks and bytes that are no text."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)


def check_command(root: Path) -> str:
    """What to type for the list of the bad files of a split."""
    return f"python -m rsfast.data check {shlex.quote(_named(root))}"


def exclude_command(root: Path, path: str) -> str:
    """What to type to have one file of a split left out."""
    file = os.path.join(root, path)
    return f"python -m rsfast.data exclude {shlex.quote(_named(root))} {shlex.quote(file)}"


def decode(index: ImageIndex, position: int) -> Image.Image:
    """One whole image, in RGB, turned as EXIF says if the index honours it.

    Raises:
        RuntimeError: naming the file, if it cannot be read, is of another size than the index says,
            or cannot be decoded; and what to do about it.
    """
    encoded = index.read(position)
    try:
        with Image.open(io.BytesIO(encoded)) as file:
            size = _size(index, file)
            # An image of another size may be huge, and is not wanted.
            picture = _rgb(index, file) if _is_known(index, position, size) else None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged content
        raise RuntimeError(
            f"cannot decode {index.name(position)}: {str(error) or type(error).__name__}; to "
            f"leave it out: {exclude_command(index.known_as, index.name(position))}"
        ) from error
    check_size(index, position, size)
    assert picture is not None
    return picture


def check_size(index: ImageIndex, position: int, size: tuple[int, int]) -> None:
    """Compares the height and width of an image in pixels with those in the index.

    Raises:
        RuntimeError: naming the file, and the check, if it has changed.
    """
    if not _is_known(index, position, size):
        height, width = index.sizes[position].tolist()
        command = check_command(index.known_as)
        raise reading.changed(index.name(position), (height, width), size, command)


def size_now(index: ImageIndex, position: int) -> tuple[int, int] | None:
    """Height and width of an image in pixels; None if its header cannot be read.

    Raises:
        RuntimeError: naming the file, if it is gone or cannot be read.
    """
    encoded = index.read(position)
    try:
        with Image.open(io.BytesIO(encoded)) as file:
            return _size(index, file)
    except Exception:  # Pillow's readers raise nearly anything on a damaged header
        return None


def _size(index: ImageIndex, image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels, after the turn if the index honours it."""
    return shown_size(image) if index.exif == "honour" else (image.height, image.width)


def _rgb(index: ImageIndex, image: Image.Image) -> Image.Image:
    return as_rgb(upright(image) if index.exif == "honour" else image)


def _is_known(index: ImageIndex, position: int, size: tuple[int, int]) -> bool:
    return tuple(index.sizes[position].tolist()) == tuple(size)


def _named(root: Path) -> str:
    """The folder by which the commands know a split: that of the data set where there is one."""
    return str(root.parent if root.name in SPLITS else root)
