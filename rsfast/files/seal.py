"""Files that are on disk whole or not at all, and that show when a bit of them has changed.

A sealed file ends in the SHA-256 of all that comes before. In a zip archive, which is what
`torch.save` writes, the seal is the archive's comment: other programs read the file as ever.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

__all__ = [
    "is_sealed",
    "link_or_copy",
    "read_whole",
    "seal_zip",
    "sync_folder",
    "try_again",
    "write_whole",
]

_MAGIC = b"rsfast-sha256:"
_SEAL_LENGTH = len(_MAGIC) + 2 * hashlib.sha256().digest_size
_CHUNK = 2**24  # bytes
_PAUSES_S = (0.5, 1.0, 2.0)  # between tries to read what a file system does not give
T = TypeVar("T")


def seal_zip(archive: bytearray | memoryview) -> bytes:
    """The seal of a zip archive without comment, whose last field is set to the seal's length."""
    archive[-2:] = _SEAL_LENGTH.to_bytes(2, "little")
    return _MAGIC + hashlib.sha256(archive).hexdigest().encode()


def is_sealed(source: Path | bytes) -> bool | None:
    """Whether a file, or what was read of it, is as written; None if it has no seal at its end.

    Raises:
        OSError: if it cannot be read.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _SEAL_LENGTH:
            return None
        file.seek(size - _SEAL_LENGTH)
        seal = file.read()
        if not seal.startswith(_MAGIC):
            return None
        digest, left = hashlib.sha256(), size - _SEAL_LENGTH
        file.seek(0)
        while left:
            part = file.read(min(_CHUNK, left))
            if not part:
                return False
            digest.update(part)
            left -= len(part)
    return seal == _MAGIC + digest.hexdigest().encode()


def read_whole(path: Path) -> bytes:
    """All of a checkpoint's file.

    Raises:
        ValueError: if there is no such file.
        OSError: if it cannot be read, also not a little later.
    """
    if not try_again(path, path.is_file):
        reason = "is a folder: name a file in it" if path.is_dir() else "does not exist"
        raise ValueError(f"checkpoint {path} {reason}")
    return try_again(path, path.read_bytes)


def try_again(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns, which has more than one try: a file that a server or a disk does not
    give for a moment is not a damaged file.

    Raises:
        OSError: of the last try, in a sentence.
    """
    for pause in _PAUSES_S:
        try:
            return read()
        except OSError:
            time.sleep(pause)
    try:
        return read()
    except OSError as error:
        raise OSError(
            f"checkpoint {path} cannot be read ({error.strerror or error}), which does not say "
            f"that it is damaged: it is left as it is; see to its permissions and its file system, "
            f"and run the command again"
        ) from error


def write_whole(path: Path, parts: Sequence[bytes | bytearray | memoryview]) -> None:
    """Writes a file beside `path`, makes sure that it is on disk, then gives it that name.

    Raises:
        OSError: if that fails; `path` is then what it was, and no other file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                for start in range(0, len(part), _CHUNK):
                    file.write(memoryview(part)[start : start + _CHUNK])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes sure that the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, path: Path) -> None:
    """Another name for the same bytes, put in place at once: a hard link where there are some.

    Raises:
        OSError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
