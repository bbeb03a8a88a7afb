"""Leaving single images out of a data set by hand, whatever they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rsfast.data.cache import load_excluded, save_excluded
from rsfast.data.dataset import list_members
from rsfast.data.formats import EXTENSIONS
from rsfast.data.pairs import images_below
from rsfast.data.splits import Split, find_splits
from rsfast.data.val_list import flat_images

__all__ = ["exclude"]


def exclude(data: str | Path, files: Sequence[str], *, undo: bool = False) -> dict[Split, int]:
    """Leaves images out of a data set, or no longer; all of these files, or none.

    Args:
        data: folder of the data set or of one split, or a pattern of archives.
        files: an image's path, or an archive's with the name of the image within it behind, from
            the working folder, or from that of the data set or split.
        undo: take them in again.

    Returns:
        How many images are left out of each split that was changed.

    Raises:
        ValueError: naming the file that is no image of the data set, or is not excluded; if the
            cache folder cannot be written.
    """
    splits = find_splits(data)
    excluded = {split: set(load_excluded(split.key)) for split in splits}
    listed = {split: _listed(split) for split in splits if not undo}
    changed = set()
    for file in files:
        places = ((split, path) for split in splits for path in _spellings(split, Path(data), file))
        for split, path in places:
            known = excluded[split] if undo else listed[split]
            if path in known if known is not None else _is_in_class_folder(split, path):
                (excluded[split].remove if undo else excluded[split].add)(path)
                changed.add(split)
                break
        else:
            raise ValueError(f"file must be {_rule(splits, data, undo)}, got {file}")
    try:
        for split in changed:
            save_excluded(split.key, excluded[split])
    except OSError as error:
        raise ValueError(str(error)) from error
    return {split: len(excluded[split]) for split in splits if split in changed}


def _listed(split: Split) -> set[str] | None:
    """The images of a split; None of class folders, where the file system knows."""
    if split.files:
        return {*list_members(split).paths}
    if split.masks is not None:
        return {*images_below(split.root)}
    return {*flat_images(split.root)} if split.is_flat else None


def _is_in_class_folder(split: Split, path: str) -> bool:
    inside = os.sep in path and not path.startswith(os.pardir + os.sep)
    is_image = path.lower().endswith(EXTENSIONS)
    return inside and is_image and os.path.lexists(split.root / path)


def _rule(splits: Sequence[Split], data: str | Path, undo: bool) -> str:
    if undo:
        return "a file that is excluded"
    if any(split.files or split.is_flat or split.masks for split in splits):
        return "an image of the data set"
    return f"an image in a class folder of {data}"


def _spellings(split: Split, folder: Path, file: str) -> Iterator[str]:
    """What the index may call a file."""
    # Two splits may have class folders of the same name, and files of the same name in them.
    more = (split.root, split.root.parent) if split.files or split.is_flat or split.masks else ()
    for base in ("", folder, *more):
        absolute = os.path.abspath(os.path.join(base, file))
        yield os.path.relpath(absolute, split.root)
        yield os.path.relpath(os.path.realpath(absolute), os.path.realpath(split.root))
