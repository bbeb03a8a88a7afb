"""The images of one split, whatever it is stored as: class folders, tar shards or Parquet files."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsfast.data.archive import Contents, OffsetArchive, join_names, number_names
from rsfast.data.cache import load_bad, load_excluded
from rsfast.data.damage import DamagedArchivesError
from rsfast.data.folder import index_folder, report_left_out
from rsfast.data.index import Archive, ImageIndex
from rsfast.data.manifest import check_manifest
from rsfast.data.patterns import is_pattern
from rsfast.data.shards import index_shards
from rsfast.data.splits import Split, existing, find_split
from rsfast.data.turning import turned
from rsfast.data.val_list import index_listed, read_classes
from rsfast.files.orientation import EXIF_MODES

__all__ = ["Members", "list_members", "open_archive", "open_split"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Members:
    """The images of a split's archives, bad ones included.

    Attributes:
        split: where they are.
        contents: what the archives hold.
        paths: n paths relative to the split's root, the archive's file with the name within behind.
        class_names: in the order of the labels.
    """

    split: Split
    contents: Contents
    paths: tuple[str, ...]
    class_names: tuple[str, ...]

    def stat(self, row: int) -> tuple[int, int]:
        """`file_stat` of an image's archive when it was indexed."""
        size, time = self.contents.stats[self.contents.file_of[row]].tolist()
        return size, time


def open_split(
    data: str | Path,
    split: str,
    *,
    strict: bool = False,
    tolerate_truncated: bool = False,
    labels: str | Path | None = None,
    exif: str = "ignore",
) -> ImageIndex:
    """The images of a data set's split, as a run that has these settings sees them.

    The order is that of the sorted paths of the archives, and within each that of the file.

    Args:
        data: folder of the data set, or a pattern of tar or Parquet files such as
            `/data/train-{0000..1023}.tar` or `/data/val/*.parquet`, which is the split itself.
        split: "train" or "val".
        strict, tolerate_truncated: as in :func:`rsfast.data.index_folder`; images in archives that
            are cut off are not tolerated.
        labels: a list of the labels of a folder of images without class folders.
        exif: "ignore" the orientation that EXIF has, or "honour" it, and turn images so.

    Raises:
        ValueError: naming the folder or file and what is wrong with it.
        ImportError: with the install command, if Parquet files are opened without pyarrow.
    """
    if exif not in EXIF_MODES:
        raise ValueError(f"exif must be one of {EXIF_MODES}, got {exif!r}")
    index = _stored(data, split, strict, tolerate_truncated, labels)
    return turned(index) if exif == "honour" else index


def _stored(
    data: str | Path,
    split: str,
    strict: bool,
    tolerate_truncated: bool,
    labels: str | Path | None,
) -> ImageIndex:
    """The images as they are stored, whatever EXIF says."""
    damage = {"strict": strict, "tolerate_truncated": tolerate_truncated}
    if labels is not None:
        if is_pattern(data):
            raise ValueError(f"a list of labels goes with a folder of images, got {data}")
        return index_listed(existing(Path(data).absolute(), split), labels, **damage)
    found = find_split(data, split)
    if not found.files:
        return index_folder(found.root, **damage)
    if tolerate_truncated:
        raise ValueError(
            f"tolerate_truncated goes with a folder of images, got archives in {found.place}; "
            f"python -m rsfast.data convert --to folder makes a folder of them"
        )
    members = list_members(found)
    return _usable(members, open_archive(members), strict)


def list_members(split: Split, *, thorough: bool = False) -> Members:
    """What a split's archives hold, from the cache folder if they are as they were.

    Args:
        split: with archives.
        thorough: look at all archives before one that is damaged is an error.

    Raises:
        ValueError: naming the archive and what is wrong with it; a DamagedArchivesError, which
            names all of them, if thorough.
        ImportError: with the install command, if Parquet files are opened without pyarrow.
    """
    try:
        check_manifest(split.root, split.files)
    except DamagedArchivesError as error:
        if not thorough:
            raise
        try:
            _contents(split, thorough)
        except DamagedArchivesError as other:
            raise DamagedArchivesError({**error.reasons, **other.reasons}) from error
        raise
    contents = _contents(split, thorough)
    if not len(contents.labels):
        raise ValueError(f"the archives of {split.place} must hold at least one image, found none")
    names = read_classes(split.root) or contents.class_names or number_names(contents.labels)
    members = Members(split, contents, join_names(split.files, contents, split.root), names)
    _check_labels(members)
    return members


def _contents(split: Split, thorough: bool) -> Contents:
    if split.files[0].endswith(".tar"):
        return index_shards(split.files, name=split.name, thorough=thorough)
    from rsfast.data.parquet import index_parquet  # pyarrow is optional

    return index_parquet(split.files, name=split.name, thorough=thorough)


def _check_labels(members: Members) -> None:
    labels, names = members.contents.labels, members.class_names
    if (wrong := np.flatnonzero(labels >= len(names))).size:
        raise ValueError(
            f"the label of {members.paths[wrong[0]]} in {members.split.place} must be in "
            f"[0, {len(names)}), because there are so many class names, got {labels[wrong[0]]}"
        )
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if not empty.size:
        return
    if names == number_names(labels):
        raise ValueError(
            f"the labels in {members.split.place} must be numbers from 0 without a gap, found no "
            f"image of {empty[0]}; if that is right, name all classes in "
            f"{members.split.root / 'classes.txt'}, one per line"
        )
    _say_empty(members.split.place, len(empty), names[empty[0]])


@functools.cache
def _say_empty(place: Path, count: int, first: str) -> None:
    _LOG.warning("%s has no image of %d classes, the first is %s", place, count, first)


def open_archive(members: Members, *, advise: bool = True) -> Archive:
    """What reads the images.

    Args:
        members: of a split.
        advise: warn where images are slow to read in random order.
    """
    # By number: names would be half of the memory that an archive takes.
    contents = dataclasses.replace(members.contents, names=())
    if members.split.files[0].endswith(".tar"):
        return OffsetArchive(contents)
    from rsfast.data.parquet import open_parquet

    return open_parquet(contents, advise=advise)


def _usable(members: Members, archive: Archive, strict: bool) -> ImageIndex:
    """All images but the bad ones and those left out by hand."""
    contents, split = members.contents, members.split
    found_bad, by_hand = load_bad(split.key), set(load_excluded(split.key))
    bad = contents.sizes.min(axis=1) <= 0
    excluded = np.zeros(len(bad), dtype=bool)
    for row, path in enumerate(members.paths) if found_bad or by_hand else ():
        bad[row] |= path in found_bad and found_bad[path] == members.stat(row)
        excluded[row] = path in by_hand
    report_left_out(split.place, members.paths, bad & ~excluded, excluded, strict)
    rows = np.flatnonzero(~(bad | excluded))
    if not rows.size:
        raise ValueError(f"the archives of {split.place} must hold one image that is not bad")
    return ImageIndex(
        root=split.root,
        paths=members.paths if rows.size == len(bad) else tuple(members.paths[row] for row in rows),
        labels=contents.labels[rows],
        sizes=contents.sizes[rows],
        class_names=members.class_names,
        archive=archive,
        rows=rows,
        place=split.place,
        files=split.files,
    )
