"""What a conversion reads: the images of a split, in the order of its index, bad ones included."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsfast.data.archive import stats_of
from rsfast.data.cache import load_excluded
from rsfast.data.dataset import list_members, open_archive
from rsfast.data.folder import list_split
from rsfast.data.index import Archive
from rsfast.data.splits import Split
from rsfast.data.val_list import labels_listed

__all__ = ["Source", "check_flat", "open_source"]


@dataclass(frozen=True, slots=True)
class Source:
    """The images of a split, bad ones included, in the order of its index.

    Attributes:
        name: of the split.
        paths: n paths relative to root.
        root: the split's folder.
        labels: [n] int64.
        class_names: in the order of the labels.
        archive: what holds the images; None where they are files of their own.
        rows: [n] int64, of each image in the archive.
        stats: [n_files, 2] int64, of the files that they lie in.
        left_out: images that are excluded by hand.
        unreadable: paths of files that cannot be opened, which no index has either.
    """

    name: str
    paths: Sequence[str]
    root: Path
    labels: np.ndarray
    class_names: tuple[str, ...]
    archive: Archive | None
    rows: np.ndarray
    stats: np.ndarray
    left_out: int
    unreadable: Sequence[str]

    def read(self, row: int) -> bytes:
        """An image as it was encoded."""
        if self.archive is not None:
            return self.archive.read(int(self.rows[row]))
        return (self.root / self.paths[row]).read_bytes()


def check_flat(splits: Sequence[Split], val_list: str | Path | None) -> None:
    """Refuses images alone without a list of labels, a list without them, and images with masks.

    Raises:
        ValueError: naming the split or the list.
    """
    for split in splits:
        if split.masks is not None:
            raise ValueError(
                f"SRC must be a data set of classification, because shards have no masks, got "
                f"{split.root} beside {split.masks.name}"
            )
    flat = [split for split in splits if split.is_flat]
    for split in flat:
        if val_list is None or split.name == "train":
            hint = "" if split.name == "train" else "; --val-list FILE reads their labels"
            raise ValueError(
                f"SRC {split.root} must have class folders or archives, got images alone{hint}"
            )
    if val_list is not None and not flat:
        raise ValueError(
            f"--val-list holds the labels of a val/ without class folders, which SRC has not, "
            f"got {val_list}"
        )


def open_source(split: Split, val_list: str | Path | None) -> Source:
    """The images of a split, but those excluded by hand and those that cannot be opened.

    Raises:
        ValueError: naming what is wrong with the split, or with the list of its labels.
    """
    archive: Archive | None = None
    if split.files:
        members = list_members(split)
        paths: Sequence[str] = members.paths
        labels, names = members.contents.labels, members.class_names
        archive = open_archive(members, advise=False)
    elif split.is_flat:
        assert val_list is not None
        paths, labels, names = labels_listed(split.root, val_list)
    else:
        listing = list_split(split.root)
        paths, names = listing.paths, listing.class_names
        number_of = {name: number for number, name in enumerate(names)}
        labels = np.array([number_of[path.split(os.sep, 1)[0]] for path in paths], np.int64)
    by_hand = set(load_excluded(split.key))
    rows = np.array([row for row, path in enumerate(paths) if path not in by_hand], np.int64)
    left_out = len(paths) - len(rows)
    unreadable: list[str] = []
    if archive is None:
        opens = np.array([_can_open(split.root / paths[row]) for row in rows], dtype=bool)
        unreadable = [paths[row] for row in rows[~opens]]
        rows = rows[opens]
    kept = [paths[row] for row in rows]
    files = split.files or [os.path.join(split.root, path) for path in kept]
    if not kept:
        raise ValueError(
            f"SRC {split.place} must hold an image that can be read and is not excluded, found none"
        )
    return Source(
        name=split.name,
        paths=kept,
        root=split.root,
        labels=labels[rows],
        class_names=names,
        archive=archive,
        rows=rows,
        stats=stats_of(files),
        left_out=left_out,
        unreadable=unreadable,
    )


def _can_open(file: Path) -> bool:
    """Neither a link to nothing, nor a pipe, nor another user's."""
    return file.is_file() and os.access(file, os.R_OK)
