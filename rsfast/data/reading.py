"""Reading images: patience with a file system that fails for a moment, and words for the rest.

What is said here is about files that cannot be had, or are no longer those that were indexed. None
of it is a reason to leave an image out of the data set.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["ReadingError", "changed", "patiently", "unreadable"]

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
_PAUSES_S = (0.2, 1.0, 5.0)  # before a second, third and fourth try
# What network file systems, and disks behind a busy controller, say and then take back.
_PASSING = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)
_GONE = (errno.ENOENT, errno.ENOTDIR)


class ReadingError(RuntimeError):
    """An image cannot be had, or is another one than the index knows."""


def patiently(read: Callable[[], _T], path: str) -> _T:
    """Reads, and tries again after a pause where the error may pass.

    Args:
        read: opens the file anew, which is what a stale handle needs.
        path: for the log.

    Raises:
        OSError: the last one.
    """
    for pause in _PAUSES_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            _LOG.warning("%s: %s; trying again in %g s", path, error.strerror, pause)
        time.sleep(pause)
    return read()


def unreadable(
    root: str | os.PathLike[str], path: str, error: OSError, copy: str | None = None
) -> ReadingError:
    """Says of an image that cannot be read what may be done about it.

    Args:
        root: the split's folder.
        path: of the image, absolute.
        error: of the last try.
        copy: what was read in its place.
    """
    if error.errno in _GONE and copy is not None:
        return ReadingError(
            f"the repaired copy {copy} of {path} is gone: start again, which makes another one"
        )
    if error.errno in _GONE and not os.path.isdir(root):
        return ReadingError(
            f"data folder {root} is gone, and {path} with it: it was moved or is no longer "
            "mounted; bring it back and start again"
        )
    if error.errno in _GONE:
        return ReadingError(
            f"{path} is gone: it was removed or renamed after the data set was indexed; put it "
            "back, or start a new run, which does without it"
        )
    if error.errno in _PASSING:
        return ReadingError(
            f"cannot read {path}: {error.strerror}, {len(_PAUSES_S) + 1} times within "
            f"{sum(_PAUSES_S):.0f} s; the disk or the network fails, and the image may be sound: "
            "start again once it can be read"
        )
    return ReadingError(f"cannot read {path}: {error.strerror or error}")


def changed(path: str, then: tuple[int, int], now: tuple[int, int], command: str) -> ReadingError:
    """Says that an image is another one than the index knows.

    Args:
        path: of the image, absolute.
        then: height and width in pixels in the index.
        now: height and width in pixels.
        command: what to type for the check.
    """
    return ReadingError(
        f"{path} has changed since the data set was indexed, from {then[1]} x {then[0]} to "
        f"{now[1]} x {now[0]} pixels; run the check, which indexes it anew: {command}"
    )
