"""Images that lie in archives: what is known of each, and how one is read with one seek.

`Contents` lists what the archives of a split hold. It is made once (`shards.py` for tar files,
`parquet.py` for Parquet files) and kept in the cache folder under a name that changes with the
size and the time of modification of any of the files.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsfast.data.cache import cache_root, file_stat, load_arrays, pack, save_arrays, unpack
from rsfast.data.folder import is_supported

__all__ = [
    "Contents",
    "OffsetArchive",
    "check_unchanged",
    "header_size",
    "header_size_at",
    "join_names",
    "load_contents",
    "number_names",
    "save_contents",
    "stats_of",
]

_LOG = logging.getLogger(__name__)
_FORMAT = 1  # of the cache file; raise it when its contents change
_MOST_OPEN = 128  # files per process
_HEADER_BYTES = 16384  # most headers are shorter; of the others the whole image is read


@dataclass(frozen=True, slots=True)
class Contents:
    """The images of a split's archives, in the order of the files and of the images within.

    Attributes:
        files: n_files paths of the archives, absolute.
        stats: [n_files, 2] int64, `file_stat` of each before it was indexed.
        file_of: [n] int32, of each image in files.
        names: n names of the images within their archives.
        offsets: [n] int64, of the first byte of each image in its file; -1 where it does not lie
            there as it is.
        lengths: [n] int64, bytes of each image.
        places: [n, 2] int32, row group of each image and its row within; zeros in tar files.
        labels: [n] int64.
        sizes: [n, 2] int32, height and width in pixels; 0 where no decoder could tell.
        class_names: as the archives have them, in the order of the labels; empty where they do not.
    """

    files: tuple[str, ...]
    stats: np.ndarray
    file_of: np.ndarray
    names: tuple[str, ...]
    offsets: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    class_names: tuple[str, ...]


_ARRAYS = ("stats", "file_of", "offsets", "lengths", "places", "labels", "sizes")


class _Handle:
    """An open file, which closes when nobody reads from it any more."""

    __slots__ = ("descriptor",)

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _OpenFiles:
    """The files that one process has open; the one that was not used for longest is closed."""

    def __init__(self, most: int) -> None:
        self.process = os.getpid()
        self._most = most
        self._handles: OrderedDict[str, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> _Handle:
        with self._lock:
            handle = self._handles.pop(path, None)
        # Opened outside of the lock: on a network file system others need not wait for it.
        handle = handle or _Handle(path)
        with self._lock:
            self._handles[path] = handle
            while len(self._handles) > self._most:
                self._handles.popitem(last=False)
        return handle

    def drop(self, path: str) -> None:
        """Has a file opened anew when it is wanted next; who reads from it may end that."""
        with self._lock:
            self._handles.pop(path, None)


class OffsetArchive:
    """Images that lie in files as they were encoded, each read with one seek.

    It may be read from several threads, and be inherited by forked processes or pickled: every
    process opens the files for itself, at most 128 of them at a time.

    Args:
        contents: what to read; its offsets are at least 0.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._open: _OpenFiles | None = None

    def __getstate__(self) -> Contents:
        return self._contents

    def __setstate__(self, contents: Contents) -> None:
        self._contents, self._open = contents, None

    def read(self, row: int) -> bytes:
        """An image as it was encoded.

        Raises:
            OSError: if its file cannot be read, has changed since it was indexed, or ends early.
        """
        return self._read(row, int(self._contents.lengths[row]))

    def head(self, row: int, most: int) -> bytes:
        """At most so many of its first bytes, with the same errors."""
        return self._read(row, min(most, int(self._contents.lengths[row])))

    def _read(self, row: int, length: int) -> bytes:
        contents = self._contents
        number = int(contents.file_of[row])
        path = contents.files[number]
        files = self._open
        if files is None or files.process != os.getpid():  # a lock may have been forked closed
            files = self._open = _OpenFiles(_MOST_OPEN)
        try:
            handle = files.get(path)
            check_unchanged(path, os.fstat(handle.descriptor), contents.stats[number])
            return _read_exactly(handle.descriptor, path, int(contents.offsets[row]), length)
        except OSError:
            files.drop(path)  # a handle that is stale remains so
            raise


def check_unchanged(path: str, now: os.stat_result, indexed: np.ndarray) -> None:
    """Raises OSError if a file is not the one that was indexed."""
    if (now.st_size, now.st_mtime_ns) != tuple(indexed.tolist()):
        raise OSError(f"{path} has changed since it was indexed: start again to index it anew")


def _read_exactly(descriptor: int, path: str, offset: int, length: int) -> bytes:
    parts = []
    while length > 0:
        part = os.pread(descriptor, length, offset)
        if not part:
            raise OSError(f"{path} ends {length} bytes before the end of an image")
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def header_size(content: bytes) -> tuple[int, int]:
    """Height and width in pixels; zeros if no loader can decode an image with this header."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return (image.height, image.width) if is_supported(image) else (0, 0)
    except Exception:  # Pillow's readers raise nearly anything on a damaged header
        return 0, 0


def header_size_at(descriptor: int, path: str, offset: int, length: int) -> tuple[int, int]:
    """The same of an image that lies in a file; of most images only the first part is read."""
    size = header_size(_read_exactly(descriptor, path, offset, min(length, _HEADER_BYTES)))
    if size == (0, 0) and length > _HEADER_BYTES:
        size = header_size(_read_exactly(descriptor, path, offset, length))
    return size


def stats_of(files: Sequence[str]) -> np.ndarray:
    """[n, 2] int64, `file_stat` of each file."""
    return np.array([file_stat(file) for file in files], dtype=np.int64).reshape(-1, 2)


def join_names(files: Sequence[str], contents: Contents, root: Path) -> tuple[str, ...]:
    """Of each image: its archive's path relative to root, with the name within it behind."""
    bases = [os.path.relpath(file, root) for file in files]
    return tuple(
        f"{bases[number]}/{name}"
        for number, name in zip(contents.file_of.tolist(), contents.names, strict=True)
    )


def number_names(labels: np.ndarray) -> tuple[str, ...]:
    """Names of classes that have none: their numbers, in the order of the numbers."""
    return tuple(map(str, range(int(labels.max(initial=-1)) + 1)))


def load_contents(files: Sequence[str], stats: np.ndarray) -> Contents | None:
    """What the cache folder holds about these archives as they are; None if it is nothing."""
    names = (*_ARRAYS, "names", "class_names")
    stored = load_arrays(_cache_file(files, stats), *names)
    if stored is None:
        return None
    found: dict[str, Any] = dict(zip(names, stored, strict=True))
    try:
        found["names"] = tuple(unpack(found["names"]))
        found["class_names"] = tuple(unpack(found["class_names"]))
    except ValueError:
        return None
    count = len(found["names"])
    shapes = {"stats": (len(files), 2), "places": (count, 2), "sizes": (count, 2)}
    if any(found[name].shape != shapes.get(name, (count,)) for name in _ARRAYS):
        return None
    return Contents(files=tuple(files), **found)


def save_contents(contents: Contents) -> None:
    """Keeps what was found; a read-only home only costs the next start time."""
    arrays = {name: getattr(contents, name) for name in _ARRAYS}
    try:
        save_arrays(
            _cache_file(contents.files, contents.stats),
            **arrays,
            names=pack(contents.names),
            class_names=pack(contents.class_names),
        )
    except OSError as error:
        _LOG.warning("index of the data set not cached: %s", error)


def _cache_file(files: Sequence[str], stats: np.ndarray) -> Path:
    digest = hashlib.sha256(f"{_FORMAT}".encode())
    digest.update(os.fsencode("\0".join(files)) + stats.tobytes())
    return cache_root() / "index" / f"{digest.hexdigest()[:32]}.npz"
