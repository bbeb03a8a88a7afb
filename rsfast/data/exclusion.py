"""Leaving single files of class folders out of a data set, whatever they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rsfast.data.cache import load_excluded, save_excluded
from rsfast.data.formats import EXTENSIONS
from rsfast.data.splits import find_splits

__all__ = ["exclude"]


def exclude(folder: str | Path, files: Sequence[str], *, undo: bool = False) -> dict[Path, int]:
    """Leaves files out of a data set, or no longer.

    Args:
        folder: of the data set or of one split.
        files: paths, from the working folder or from `folder`.
        undo: take them in again.

    Returns:
        How many files are left out of each split that was changed.

    Raises:
        ValueError: naming the file that is no image of the data set, or is not excluded; if the
            cache folder cannot be written.
    """
    splits = [s.root for s in find_splits(folder) if not (s.files or s.is_flat)]
    excluded = {split: set(load_excluded(split)) for split in splits}
    changed = set()
    for file in files:
        places = [place for split in splits for place in _places(split, Path(folder), file)]
        if undo:
            places = [(split, path) for split, path in places if path in excluded[split]]
        else:
            places = [(split, path) for split, path in places if os.path.lexists(split / path)]
        if not places:
            rule = "a file that is excluded" if undo else f"an image in a class folder of {folder}"
            raise ValueError(f"file must be {rule}, got {file}")
        split, path = places[0]
        (excluded[split].discard if undo else excluded[split].add)(path)
        changed.add(split)
    try:
        for split in changed:
            save_excluded(split, excluded[split])
    except OSError as error:
        raise ValueError(str(error)) from error
    return {split: len(excluded[split]) for split in splits if split in changed}


def _places(split: Path, folder: Path, file: str) -> Iterator[tuple[Path, str]]:
    """Where in a split a file may be meant to lie, as the index would call it."""
    for absolute in (os.path.abspath(file), os.path.abspath(folder / file)):
        for base, path in (
            (str(split), absolute),
            (os.path.realpath(split), os.path.realpath(absolute)),
        ):
            relative = os.path.relpath(path, base)
            in_class_folder = os.sep in relative and not relative.startswith(os.pardir + os.sep)
            if in_class_folder and relative.lower().endswith(EXTENSIONS):
                yield split, relative
