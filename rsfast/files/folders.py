"""Folders that a command writes at its end: whether it can is better known at its beginning."""

from __future__ import annotations

import tempfile
from pathlib import Path

__all__ = ["make_writable"]


def make_writable(folder: Path) -> None:
    """Makes a folder where there is none, and tries whether a file can be written in it.

    Raises:
        ValueError: if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable."):
            pass
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be written: {error}") from error
