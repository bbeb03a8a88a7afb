"""The run folder: one run has it at a time, and what a run has left there is not overwritten."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rsfast.files.tables import read_log
from rsfast.runtime.distributed import Rank, agree

__all__ = ["claimed", "epochs_logged", "left_by_a_run"]

_LOG = logging.getLogger("rsfast")
_LOCK = "run.lock"
_PATIENCE_S = 3.0  # for a run that is ending
_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def claimed(folder: Path, rank: Rank) -> Iterator[None]:
    """Has the folder to itself in the block; no other run on any machine can have it then.

    Rank 0 holds a lock on a file in it, which the system takes back when the process ends, however
    it does. Where the file system has no locks, a warning says so.

    Raises:
        ValueError: on all ranks, if another run has it or it cannot be written.
    """
    lock = _Lock(folder)
    try:
        agree(rank, lock.take)
        yield
    finally:
        lock.release()


class _Lock:
    """A lock on a file of a folder, of this process and not of those that it forks."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LOCK
        self._file: BinaryIO | None = None
        self._made_folder = False

    def take(self) -> None:
        folder = self._path.parent
        try:
            self._made_folder = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            end = time.monotonic() + _PATIENCE_S
            while not self._try() and time.monotonic() < end:
                time.sleep(0.1)
            if self._file is None:
                raise ValueError(
                    f"output folder {folder} is in use by another run ({self._holder()}): wait for "
                    f"it, stop it, or name another --output"
                )
            self._file.write(f"process {os.getpid()} on {platform.node()}".encode())
            self._file.flush()
        except OSError as error:
            raise ValueError(f"output folder {folder} cannot be written: {error}") from error

    def release(self) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # without the file, or with it, the lock ends here
            self._path.unlink()
        self._file.close()
        if self._made_folder:
            with contextlib.suppress(OSError):  # it stays unless it is empty
                self._path.parent.rmdir()

    def _try(self) -> bool:
        file = open(self._path, "a+b")  # noqa: SIM115 (kept open)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                file.close()
                return False
            _LOG.warning(
                "the file system of %s has no locks (%s): nothing keeps a second run out of it",
                self._path.parent,
                error.strerror,
            )
        if not self._is_of_the_folder(file):  # the run that ended has removed the file
            file.close()
            return False
        file.truncate(0)
        self._file = file
        return True

    def _is_of_the_folder(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            return self._path.read_text(errors="replace") or "it does not say which"
        return "it does not say which"


def epochs_logged(folder: Path) -> int:
    """How many epochs of a run its files tell of."""
    lines = [line for _, line in read_log(folder / "log.jsonl") if line["event"] == "epoch"]
    summary = folder / "summary.csv"
    rows = summary.read_text(errors="replace").splitlines() if summary.exists() else []
    return max(len(lines), len(rows) - 1)


def left_by_a_run(folder: Path) -> list[str]:
    """Names of what a run has left in a folder, its checkpoints first."""
    patterns = ("last*.pt", "model_best.*", "last*.damaged", "log.jsonl", "summary.csv")
    return [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
