"""Where the splits of a data set are: one rule for runs and for the commands that look after it.

A data set is a folder with `train/` and `val/` (or `validation/`), which hold one sub-folder per
class, or `*.tar`, or `*.parquet`; or a folder, or its `data/`, in which archives lie whose names
say what they are of, as Hugging Face's copies have it; or a pattern of archives of one split. With
`trainannot/` or `valannot/` beside them they hold images of segmentation, and those their masks.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rsfast.data.cache import Key
from rsfast.data.index import SPLITS
from rsfast.data.patterns import (
    ARCHIVE_EXTENSIONS,
    check_complete,
    compressed_tars,
    expand,
    is_pattern,
)
from rsfast.data.val_list import flat_images
from rsfast.data.walking import is_folder, is_hidden

__all__ = ["Split", "existing", "find_split", "find_splits", "masks_folder", "split_at"]

_FOLDERS = {"train": ("train",), "val": ("val", "validation")}
_NAMES = {name for names in _FOLDERS.values() for name in names}
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
        masks: folder of the masks of the images in root and below; None of classification.
    """

    root: Path
    files: tuple[str, ...]
    place: Path
    is_flat: bool = False
    masks: Path | None = None

    @property
    def name(self) -> str:
        """Of the split, for people."""
        return self.place.name

    @property
    def key(self) -> Key:
        """What its records are kept under, however its archives are named."""
        return self.files or self.place


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
    path = existing(folder, split)
    if not path.is_dir() and (found := _beside_others(folder, split)):
        return found
    return split_at(path)


def find_splits(data: str | Path) -> list[Split]:
    """The splits that a folder or pattern stands for: train and val, or the folder itself.

    A class may be called train or val, too: a folder of images alone is a split only beside one of
    class folders or archives, or where there are no other folders. A folder that is itself called
    train, val or validation is a split, unless it holds both splits, or nothing but one.

    Raises:
        ValueError: as :func:`find_split` does; if the folder does not exist.
    """
    if is_pattern(data):
        return [find_split(data, "train")]
    folder = Path(os.path.abspath(data))
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist")
    if annotated := _annotated(folder):
        return annotated
    paths = [path for split in SPLITS if (path := existing(folder, split)).is_dir()]
    sure = [path for path in paths if _holds_classes(path)]
    has_others = not {*_folders(folder)} <= {path.name for path in paths}
    if folder.name in _NAMES:
        is_set = len(sure) == len(SPLITS) or (sure and not has_others)
        return [split_at(path) for path in sure] if is_set else [split_at(folder)]
    flat = [] if has_others and not sure else [path for path in paths if flat_images(path)]
    splits = []
    for split in SPLITS:
        path = existing(folder, split)
        if path in sure or path in flat:
            splits.append(split_at(path))
        elif path not in paths and (found := _beside_others(folder, split)):
            splits.append(found)
    return splits or [split_at(folder)]


def masks_folder(root: Path) -> Path:
    """Where the masks of a split's folder are; it need not be there."""
    return root.with_name(f"{root.name}annot")


def _annotated(folder: Path) -> list[Split]:
    """The splits of a data set of segmentation, or the one that the folder is; none of others."""
    if folder.name in _NAMES and masks_folder(folder).is_dir():
        return [Split(folder, (), folder, masks=masks_folder(folder))]
    paths = [path for split in SPLITS if (path := existing(folder, split)).is_dir()]
    if not any(masks_folder(path).is_dir() for path in paths):
        return []
    return [Split(path, (), path, masks=masks_folder(path)) for path in paths]


def existing(folder: Path, split: str) -> Path:
    """The folder of a split in that of a data set; it need not be there."""
    paths = [folder / name for name in _FOLDERS[split]]
    return next((path for path in paths if path.is_dir()), paths[0])


def split_at(path: Path) -> Split:
    """A folder that is a split, by what it holds.

    Raises:
        ValueError: if that is unclear, or archives are missing.
    """
    if not path.is_dir():
        return Split(path, (), path)
    files, folders = _archives(path), _folders(path)
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
    is_flat = path.name in _NAMES and not files and not folders and bool(flat_images(path))
    return Split(path, tuple(files), path, is_flat)


def _holds_classes(path: Path) -> bool:
    """Class folders, or archives and no images beside them."""
    if _folders(path):
        return True
    return bool(_archives(path) or compressed_tars(path)) and not flat_images(path)


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, but those that are no part of a data set."""
    return [e.name for e in os.scandir(folder) if not is_hidden(e.name) and is_folder(e)]


def _beside_others(folder: Path, split: str) -> Split | None:
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
        if entry.name.endswith(ARCHIVE_EXTENSIONS) and not is_hidden(entry.name)
    )
    if len({os.path.splitext(file)[1] for file in files}) > 1:
        raise ValueError(
            f"data folder {folder} must hold tar files or Parquet files, got both; name one kind "
            f"by a pattern"
        )
    return files
