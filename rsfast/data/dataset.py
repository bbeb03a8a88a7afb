"""One split of a data set, whatever it is stored as: class folders, tar shards or Parquet files.

A data set is a folder with `train/` and `val/` (or `validation/`), which hold one sub-folder per
class, or `*.tar`, or `*.parquet`; or a folder, or its `data/`, in which archives lie whose names
say what they are of, as Hugging Face's copies have it; or a pattern of archives of one split.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsfast.data.archive import Contents, OffsetArchive, join_names, number_names
from rsfast.data.cache import cache_root, load_bad, load_excluded, save_excluded
from rsfast.data.folder import index_folder, report_left_out, split_folders
from rsfast.data.index import SPLITS, Archive, ImageIndex
from rsfast.data.manifest import check_manifest
from rsfast.data.patterns import (
    ARCHIVE_EXTENSIONS,
    check_complete,
    compressed_tars,
    expand,
    is_pattern,
)
from rsfast.data.shards import index_shards
from rsfast.data.turning import turned
from rsfast.data.val_list import flat_images, index_listed, read_classes
from rsfast.files.orientation import EXIF_MODES

__all__ = [
    "Members",
    "Split",
    "exclude_members",
    "find_split",
    "find_splits",
    "is_member",
    "list_members",
    "open_archive",
    "open_split",
]

_LOG = logging.getLogger(__name__)
_FOLDERS = {"train": ("train",), "val": ("val", "validation")}
# A word of a file's name, as in imagenet1k-train-0000.tar and validation-00000-of-00014.parquet.
_WORDS = {
    "train": re.compile(r"(?<![a-z])train(?![a-z])"),
    "val": re.compile(r"(?<![a-z])val(idation)?(?![a-z])"),
}


@dataclass(frozen=True, slots=True)
class Split:
    """Where the images of one split are.

    Attributes:
        root: the folder that paths of images are relative to.
        files: of its archives, absolute and sorted; none where root has class folders.
        place: what the commands know the split by: root, a folder that need not exist, a pattern.
        is_flat: images lie in root itself, and their labels in a list.
    """

    root: Path
    files: tuple[str, ...]
    place: Path
    is_flat: bool = False

    @property
    def name(self) -> str:
        """Of the split, for people."""
        return self.place.name


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
        return index_listed(_existing(Path(data).absolute(), split), labels, **damage)
    found = find_split(data, split)
    if not found.files:
        return index_folder(found.root, **damage)
    if tolerate_truncated:
        raise ValueError(
            f"tolerate_truncated goes with a folder of images, got archives in {found.place}; "
            f"python -m rsfast.data convert makes a folder of them"
        )
    members = list_members(found)
    return _usable(members, open_archive(members), strict)


def find_split(data: str | Path, split: str) -> Split:
    """Where a split of a data set is; a pattern is the split itself.

    Raises:
        ValueError: if it is unclear what the folder holds, or archives of it are missing.
    """
    if is_pattern(data):
        files = expand(os.fspath(data))
        root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
        return Split(root, tuple(files), Path(os.path.abspath(data)))
    folder = Path(data).absolute()
    path = _existing(folder, split)
    if not path.is_dir() and (found := _flat(folder, split)):
        return found
    return _split_at(path)


def find_splits(data: str | Path) -> list[Split]:
    """The splits that a folder or pattern stands for: train and val, or the folder itself.

    Raises:
        ValueError: as :func:`find_split` does; if the folder does not exist.
    """
    if is_pattern(data):
        return [find_split(data, "train")]
    folder = Path(os.path.abspath(data))
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist")
    splits = []
    for split in SPLITS:
        path = _existing(folder, split)
        if path.is_dir():
            found = _split_at(path)
            if found.files or any(entry.is_dir() for entry in path.iterdir()):
                splits.append(found)
            elif flat_images(path):
                splits.append(Split(path, (), path, is_flat=True))
        elif flat := _flat(folder, split):
            splits.append(flat)
    return splits or [_split_at(path) for path in split_folders(folder)]


def _existing(folder: Path, split: str) -> Path:
    paths = [folder / name for name in _FOLDERS[split]]
    return next((path for path in paths if path.is_dir()), paths[0])


def _split_at(path: Path) -> Split:
    """A folder that is a split, by what it holds."""
    if not path.is_dir():
        return Split(path, (), path)
    files = _archives(path)
    folders = [e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith(".")]
    if files and folders:
        raise ValueError(
            f"data folder {path} must hold class folders or archives, got both: {folders[0]} and "
            f"{os.path.basename(files[0])}; move one of them away, or name archives by a pattern"
        )
    if not files and not folders and (compressed := compressed_tars(path)):
        raise ValueError(
            f"data folder {path} must hold plain tar files, in which any image is one seek, got "
            f"the compressed {compressed[0]}; unpack them, as by gunzip"
        )
    check_complete(files)
    return Split(path, tuple(files), path)


def _flat(folder: Path, split: str) -> Split | None:
    """The archives of a split that lie in one folder with those of others."""
    for base in (folder, folder / "data"):
        names = _archives(base) if base.is_dir() else []
        files = [file for file in names if _WORDS[split].search(os.path.basename(file).lower())]
        if files:
            check_complete(files)
            return Split(base, tuple(files), folder / split)
    return None


def _archives(folder: Path) -> list[str]:
    """All archives in a folder, which must be of one kind."""
    files = sorted(
        os.path.join(folder, entry.name)
        for entry in os.scandir(folder)
        if entry.name.endswith(ARCHIVE_EXTENSIONS) and not entry.name.startswith(".")
    )
    if len({os.path.splitext(file)[1] for file in files}) > 1:
        raise ValueError(
            f"data folder {folder} must hold tar files or Parquet files, got both; name one kind "
            f"by a pattern"
        )
    return files


def list_members(split: Split) -> Members:
    """What a split's archives hold, from the cache folder if they are as they were.

    Raises:
        ValueError: naming the archive and what is wrong with it.
        ImportError: with the install command, if Parquet files are opened without pyarrow.
    """
    check_manifest(split.root, split.files)
    if split.files[0].endswith(".tar"):
        contents = index_shards(split.files, progress=split.name)
    else:
        from rsfast.data.parquet import index_parquet  # pyarrow is optional

        contents = index_parquet(split.files, progress=split.name)
    if not len(contents.labels):
        raise ValueError(f"the archives of {split.place} must hold at least one image, found none")
    names = read_classes(split.root) or contents.class_names or number_names(contents.labels)
    members = Members(split, contents, join_names(split.files, contents, split.root), names)
    _check_labels(members)
    return members


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


def open_archive(members: Members) -> Archive:
    """What reads the images."""
    # By number: names would be half of the memory that an archive takes.
    contents = dataclasses.replace(members.contents, names=())
    if members.split.files[0].endswith(".tar"):
        return OffsetArchive(contents)
    from rsfast.data.parquet import open_parquet

    return open_parquet(contents)


def _usable(members: Members, archive: Archive, strict: bool) -> ImageIndex:
    """All images but the bad ones and those left out by hand."""
    contents, split = members.contents, members.split
    found_bad, by_hand = load_bad(split.place), set(load_excluded(split.place))
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
    )


def exclude_members(
    splits: Sequence[Split], files: Sequence[str], *, undo: bool = False
) -> dict[Split, int]:
    """Leaves images of splits without class folders out of a data set, or no longer.

    Args:
        splits: with archives, or flat.
        files: an image's path, or an archive's with the name of the image within it behind, from
            the working folder or from that of the split.
        undo: take them in again.

    Returns:
        How many images are left out of each split that was changed.

    Raises:
        ValueError: naming the file that is no image of the data set, or is not excluded; if the
            cache folder cannot be written.
    """
    excluded = {split: set(load_excluded(split.place)) for split in splits}
    known = {split: excluded[split] if undo else {*_paths(split)} for split in splits}
    changed = set()
    for file in files:
        places = [
            (split, path)
            for split in splits
            for path in _spellings(split, file)
            if path in known[split]
        ]
        if not places:
            rule = "an image that is excluded" if undo else "an image of the data set"
            raise ValueError(f"file must be {rule}, got {file}")
        split, path = places[0]
        (excluded[split].remove if undo else excluded[split].add)(path)
        changed.add(split)
    try:
        for split in changed:
            save_excluded(split.place, excluded[split])
    except OSError as error:
        raise ValueError(f"cache folder {cache_root()} must be writable: {error}") from error
    return {split: len(excluded[split]) for split in splits if split in changed}


def is_member(splits: Sequence[Split], file: str) -> bool:
    """Whether a file is an image of one of these splits, excluded or not."""
    return any(path in _paths(split) for split in splits for path in _spellings(split, file))


def _paths(split: Split) -> Sequence[str]:
    return list_members(split).paths if split.files else flat_images(split.root)


def _spellings(split: Split, file: str) -> Iterator[str]:
    """What the index may call a file."""
    yield os.path.relpath(os.path.abspath(file), split.root)
    yield os.path.relpath(os.path.abspath(split.root / file), split.root)
    yield os.path.relpath(os.path.abspath(split.root.parent / file), split.root)
