"""A folder of images, one sub-folder per class, indexed once.

The index holds what every loader needs before it decodes anything: path, label and size of each
image. It reads file headers only, and is cached, so that a later start costs a directory listing.
What `python -m rsfast.data check` found bad, and what was excluded by hand, is left out of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rsfast.data.cache import (
    cache_root,
    file_stat,
    load_arrays,
    load_bad,
    load_excluded,
    save_arrays,
)
from rsfast.data.formats import EXTENSIONS, is_supported, unread
from rsfast.data.index import ImageIndex, check_command, printable
from rsfast.data.repairing import repair
from rsfast.data.walking import Note, is_hidden, walk
from rsfast.files.progress import progress

__all__ = [
    "Listing",
    "index_files",
    "index_folder",
    "list_split",
    "listing_of",
    "report_left_out",
    "save_sizes",
    "sizes_of",
    "warn_of_notes",
]

_LOG = logging.getLogger(__name__)
_WORKERS = 8  # threads that read headers
_FORMAT = 1  # of the cache file; raise it when its contents change


@dataclass(frozen=True, slots=True)
class Listing:
    """The files in the class folders of one split.

    Attributes:
        root: the split's folder, absolute.
        class_names: sub-folder names, sorted.
        paths: of the files that are images by name, relative to root, sorted within each folder.
        others: of all other files.
        digest: changes with root, with the paths and with the folders' modification times.
        notes: on what was passed over, and on folders that two classes share.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: list[str]
    others: list[str]
    digest: str
    notes: Sequence[Note] = ()


def index_folder(
    root: str | Path,
    *,
    workers: int = _WORKERS,
    cache: bool = True,
    strict: bool = False,
    tolerate_truncated: bool = False,
) -> ImageIndex:
    """Lists the images below `root` and reads the size of each.

    Left out, with a warning that names the first ones, are files whose header no decoder can read,
    those which the last `python -m rsfast.data check` found bad and which have not changed since
    (by size and modification time), and those which were excluded by hand. Every process that sees
    the same files and the same cache folder gets the same index.

    An image that was overwritten in place by one of another size keeps its old size here, until a
    check; loaders notice it when they read it.

    Args:
        root: a folder with one sub-folder per class.
        workers: threads that read headers.
        cache: keep the sizes under the cache folder; they are used again while the listing and the
            folders' modification times stay the same.
        strict: take bad files, other than those excluded by hand, for an error. Truncated ones are
            known only after a check.
        tolerate_truncated: take in the images that the last check found to be cut off, as far as
            they can be decoded; they are then no bad ones.

    Raises:
        ValueError: if the folder does not exist, has no class folders, or a class has no image; if
            strict, also if there is a bad file; if truncated images are to be tolerated, also if
            there was no check.
    """
    listing = list_split(root)
    found = _found(listing, workers, cache, strict, tolerate_truncated)
    index = _usable(listing, found.sizes, found.good)
    return dataclasses.replace(index, copies=found.copies)


def index_files(
    root: Path,
    files: Sequence[str],
    labels: np.ndarray,
    class_names: tuple[str, ...],
    *,
    workers: int = _WORKERS,
    cache: bool = True,
    strict: bool = False,
    tolerate_truncated: bool = False,
) -> ImageIndex:
    """Reads the sizes of images whose labels are known; otherwise as :func:`index_folder`.

    Args:
        root: the split's folder, absolute.
        files: n paths relative to root.
        labels: [n] int64.
        class_names: in the order of the labels.
        workers, cache, strict, tolerate_truncated: as in :func:`index_folder`.

    Raises:
        ValueError: if no image is left; if strict, also if there is a bad file.
    """
    listing = listing_of(root, files, class_names)
    sizes, good, copies = _found(listing, workers, cache, strict, tolerate_truncated)
    if not good.any():
        raise ValueError(f"data folder {root} must hold one image that is not bad, found none")
    kept = tuple(path for path, ok in zip(files, good, strict=True) if ok)
    return ImageIndex(root, kept, labels[good], sizes[good], class_names, copies=copies)


def sizes_of(root: Path, files: Sequence[str]) -> np.ndarray:
    """[n, 2] int32 height and width in pixels of images of a folder without class folders.

    They are those of the index; 0 where no decoder can tell.
    """
    listing = listing_of(root, files, ())
    sizes = _load_sizes(listing)
    return _read_sizes(root, files, _WORKERS) if sizes is None else sizes


def listing_of(root: Path, files: Sequence[str], class_names: tuple[str, ...]) -> Listing:
    """Files of a folder without class folders."""
    digest = hashlib.sha256(os.fsencode(f"{_FORMAT}:{root}:{os.stat(root).st_mtime_ns}"))
    digest.update(os.fsencode("\0".join(files)))
    return Listing(root, class_names, list(files), [], digest.hexdigest()[:32])


class _Found(NamedTuple):
    """About a listing: [n, 2] sizes, [n] bool which images are used, and copies of some of them."""

    sizes: np.ndarray
    good: np.ndarray
    copies: dict[str, str] | None


def _found(
    listing: Listing, workers: int, cache: bool, strict: bool, tolerate_truncated: bool
) -> _Found:
    root, paths = listing.root, listing.paths
    sizes = _load_sizes(listing) if cache else None
    if sizes is None:
        sizes = _read_sizes(root, paths, workers)
        if cache:
            save_sizes(listing, sizes)
    bad, excluded = _left_out(root, paths, sizes)
    copies = {}
    if tolerate_truncated:
        copies = repair(root, [paths[row] for row in np.flatnonzero(bad)])
        bad &= np.array([path not in copies for path in paths], dtype=bool)
    report_left_out(root, paths, bad, excluded, strict)
    warn_of_notes(listing)
    return _Found(sizes, ~(bad | excluded), copies or None)


def list_split(root: str | Path) -> Listing:
    """The files of all class folders, with those in sub-folders of them and behind links.

    What is hidden, and what a class has visited already, is passed over (see `walk`).

    Raises:
        ValueError: if the folder does not exist, has no class folders, or one cannot be read.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise ValueError(f"data folder {root} does not exist")
    try:
        found = walk(root, EXTENSIONS)
    except OSError as error:  # otherwise it would be a folder without images
        message = f"folder {error.filename} must be readable: {error.strerror}"
        raise ValueError(message) from error
    if not found.class_names:
        raise ValueError(
            f"data folder {root} must have one sub-folder per class, found none{_flat(root)}"
        )
    for name in found.class_names:
        if not _is_text(name):
            raise ValueError(
                f"class folder {printable(str(root / name))} must have a name in UTF-8, because "
                "checkpoints and tables hold it; rename the folder"
            )
    paths: list[str] = []
    others: list[str] = []
    digest = hashlib.sha256(os.fsencode(f"{_FORMAT}:{root}"))
    for folder in found.folders:
        digest.update(os.fsencode(f"{root / folder.path}:{folder.mtime_ns}"))
        for file in folder.files:
            is_image = file.lower().endswith(EXTENSIONS)
            (paths if is_image else others).append(os.path.join(folder.path, file))
    digest.update(os.fsencode("\0".join(paths)))
    key = digest.hexdigest()[:32]
    return Listing(root, found.class_names, paths, others, key, found.notes)


def _flat(root: Path) -> str:
    """What to do about images that lie in the folder itself."""
    if (masks := root.with_name(f"{root.name}annot")).is_dir():
        return (
            f"; masks, which {masks} holds, are of segmentation: --arch refinenet101, or --task "
            "segmentation for a network of your own"
        )
    names = os.listdir(root) if root.name in ("val", "validation") else []
    count = sum(name.lower().endswith(EXTENSIONS) and not is_hidden(name) for name in names)
    return f"; it holds {count} images: --val-list FILE reads their labels" if count else ""


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def save_sizes(listing: Listing, sizes: np.ndarray) -> None:
    """Keeps the sizes of a listing's images; a read-only home only costs the next start time.

    Args:
        listing: of the split.
        sizes: [n, 2] int32 height and width in pixels, 0 where no decoder could tell.
    """
    try:
        save_arrays(_index_file(listing), sizes=sizes)
    except OSError as error:
        _LOG.warning("index of the data set not cached: %s", error)


def _index_file(listing: Listing) -> Path:
    return cache_root() / "index" / f"{listing.digest}.npz"


def _load_sizes(listing: Listing) -> np.ndarray | None:
    stored = load_arrays(_index_file(listing), "sizes")
    if stored is None:
        return None
    (sizes,) = stored
    return sizes if sizes.shape == (len(listing.paths), 2) and sizes.dtype == np.int32 else None


def _read_sizes(root: Path, paths: Sequence[str], workers: int) -> np.ndarray:
    with ThreadPoolExecutor(workers) as pool:
        sizes = progress(
            pool.map(lambda path: _header_size(root / path), paths),
            total=len(paths),
            desc=f"indexing {root.name}",
            unit="img",
            disable=len(paths) < 20_000,
        )
        return np.array(list(sizes), dtype=np.int32).reshape(-1, 2)


def _header_size(file: Path) -> tuple[int, int]:
    """Height and width in pixels; zeros if no loader can decode a file with this header."""
    if not file.is_file():
        return 0, 0  # to open a pipe would be to wait for ever
    try:
        with Image.open(file) as image:
            return (image.height, image.width) if is_supported(image) else (0, 0)
    except Exception:  # Pillow's readers raise nearly anything on a damaged header
        return 0, 0


def _left_out(root: Path, paths: Sequence[str], sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] bool each: the bad images, and those excluded by hand.

    Puts the sizes of images right that have changed since they were found bad.
    """
    found_bad, by_hand = load_bad(root), set(load_excluded(root))
    bad = sizes.min(axis=1, initial=1 << 30) <= 0
    excluded = np.array([path in by_hand for path in paths], dtype=bool)
    for row, path in enumerate(paths) if found_bad else ():
        if path in found_bad:
            bad[row] = file_stat(root / path) == found_bad[path]
            if not bad[row]:
                sizes[row] = _header_size(root / path)
                bad[row] = not sizes[row].all()
    return bad & ~excluded, excluded


def report_left_out(
    root: Path, paths: Sequence[str], bad: np.ndarray, excluded: np.ndarray, strict: bool
) -> None:
    """Warns of the images that are left out.

    Args:
        root: by which the commands know the split.
        paths: of all its images.
        bad, excluded: [n] bool, which are bad, and which are left out by hand.
        strict: take bad ones for an error.

    Raises:
        ValueError: if strict and one is bad.
    """
    if strict and bad.any():
        first = printable(paths[int(np.flatnonzero(bad)[0])])
        raise ValueError(
            f"data folder {root} must hold no bad image when strict, found {bad.sum()}, the first "
            f"is {first}; to list them: {check_command(root)}"
        )
    rows = np.flatnonzero(bad | excluded)
    if len(rows):
        _LOG.warning(
            "%d of %d files in %s are left out (%d bad, %d excluded by hand; to list them: %s): "
            "%s%s",
            len(rows),
            len(paths),
            root,
            bad.sum(),
            excluded.sum(),
            check_command(root),
            ", ".join(printable(paths[row]) for row in rows[:5]),
            ", ..." if len(rows) > 5 else "",
        )


def warn_of_notes(listing: Listing) -> None:
    """Warns of what is no part of a data set though it looks so."""
    if counts := unread(listing.others):
        _LOG.warning(
            "images in %s that not every loader reads are no part of the data set: %s; to use "
            "them, convert them to PNG or JPEG",
            listing.root,
            counts,
        )
    for kind, what in (
        ("unused", "passed over, being hidden or visited already"),
        ("odd", "taken for two classes"),
    ):
        paths = [printable(note.path) for note in listing.notes if note.kind == kind]
        if paths:
            _LOG.warning(
                "%d files or folders in %s are %s (to list them: %s): %s%s",
                len(paths),
                listing.root,
                what,
                check_command(listing.root),
                ", ".join(paths[:5]),
                ", ..." if len(paths) > 5 else "",
            )


def _usable(listing: Listing, sizes: np.ndarray, good: np.ndarray) -> ImageIndex:
    root, class_names = listing.root, listing.class_names
    kept = tuple(path for path, ok in zip(listing.paths, good, strict=True) if ok)
    number_of = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number_of[path.split(os.sep, 1)[0]] for path in kept], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(class_names))
    if not counts.all():
        empty = class_names[int(np.flatnonzero(counts == 0)[0])]
        raise ValueError(
            f"class folder {root / empty} must hold at least one image "
            f"({' '.join(EXTENSIONS)}), found none"
        )
    return ImageIndex(root, kept, labels, sizes[good], class_names)
