"""Files that are on disk whole or not at all, and that show when a bit of them has changed.

A sealed file ends in the SHA-256 of all that comes before. In a zip archive, which is what
`torch.save` writes, the seal is the archive's comment: other programs read the file as ever.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

__all__ = ["is_sealed", "link_or_copy", "seal_zip", "sync_folder", "write_whole"]

_MAGIC = b"rsfast-sha256:"
_SEAL_LENGTH = len(_MAGIC) + 2 * hashlib.sha256().digest_size
_CHUNK = 2**24  # bytes


def seal_zip(archive: bytearray | memoryview) -> bytes:
    """The seal of a zip archive without comment, whose last field is set to the seal's length."""
    archive[-2:] = _SEAL_LENGTH.to_bytes(2, "little")
    return _MAGIC + hashlib.sha256(archive).hexdigest().encode()


def is_sealed(path: Path) -> bool | None:
    """Whether the file is as it was written; None if it has no seal at its end.

    Raises:
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
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
