"""A folder of images, one sub-folder per class, indexed once.

The index holds what every loader needs before it decodes anything: path, label and size of each
image. It reads file headers only, and is cached, so that a later start costs a directory listing.
What `python -m rsfast.data check` found bad, and what was excluded by hand, is left out of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from rsfast.data.cache import (
    cache_root,
    file_stat,
    load_arrays,
    load_bad,
    load_excluded,
    save_arrays,
    save_excluded,
)
from rsfast.data.index import SPLITS, ImageIndex, check_command, printable

__all__ = [
    "EXTENSIONS",
    "FORMAT_OF",
    "Listing",
    "exclude",
    "index_files",
    "index_folder",
    "is_supported",
    "list_split",
    "listing_of",
    "report_left_out",
    "save_sizes",
    "split_folders",
]

# Pillow's names of what every loader can decode, by the extension it usually has.
FORMAT_OF = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
EXTENSIONS = tuple(FORMAT_OF)
_FORMATS = {*FORMAT_OF.values(), "MPO"}  # whatever the file is called; MPO is JPEG
_LOG = logging.getLogger(__name__)
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
    """

    root: Path
    class_names: tuple[str, ...]
    paths: list[str]
    others: list[str]
    digest: str


def index_folder(
    root: str | Path, *, workers: int = 8, cache: bool = True, strict: bool = False
) -> ImageIndex:
    """Lists the images below `root` and reads the size of each.

    Left out, with a warning that names the first ones, are files whose header no decoder can read,
    those which the last `python -m rsfast.data check` found bad and which have not changed since
    (by size and modification time), and those which were excluded by hand. Every process that sees
    the same files and the same cache folder gets the same index.

    An image that is overwritten in place by one of another size needs its folder touched, unless
    it was a bad one.

    Args:
        root: a folder with one sub-folder per class.
        workers: threads that read headers.
        cache: keep the sizes under the cache folder; they are used again while the listing and the
            folders' modification times stay the same.
        strict: take bad files, other than those excluded by hand, for an error. Truncated ones are
            known only after a check.

    Raises:
        ValueError: if the folder does not exist, has no class folders, or a class has no image; if
            strict, also if there is a bad file.
    """
    listing = list_split(root)
    sizes, good = _sizes(listing, workers, cache, strict)
    return _usable(listing, sizes, good)


def index_files(
    root: Path,
    files: Sequence[str],
    labels: np.ndarray,
    class_names: tuple[str, ...],
    *,
    workers: int = 8,
    cache: bool = True,
    strict: bool = False,
) -> ImageIndex:
    """Reads the sizes of images whose labels are known; otherwise as :func:`index_folder`.

    Args:
        root: the split's folder, absolute.
        files: n paths relative to root.
        labels: [n] int64.
        class_names: in the order of the labels.
        workers, cache, strict: as in :func:`index_folder`.

    Raises:
        ValueError: if no image is left; if strict, also if there is a bad file.
    """
    listing = listing_of(root, files, class_names)
    sizes, good = _sizes(listing, workers, cache, strict)
    if not good.any():
        raise ValueError(f"data folder {root} must hold one image that is not bad, found none")
    kept = tuple(path for path, ok in zip(files, good, strict=True) if ok)
    return ImageIndex(root, kept, labels[good], sizes[good], class_names)


def listing_of(root: Path, files: Sequence[str], class_names: tuple[str, ...]) -> Listing:
    """Files of a folder without class folders."""
    digest = hashlib.sha256(os.fsencode(f"{_FORMAT}:{root}:{os.stat(root).st_mtime_ns}"))
    digest.update(os.fsencode("\0".join(files)))
    return Listing(root, class_names, list(files), [], digest.hexdigest()[:32])


def _sizes(
    listing: Listing, workers: int, cache: bool, strict: bool
) -> tuple[np.ndarray, np.ndarray]:
    """[n, 2] sizes, and [n] bool which images are used."""
    root, paths = listing.root, listing.paths
    sizes = _load_sizes(listing) if cache else None
    if sizes is None:
        sizes = _read_sizes(root, paths, workers)
        if cache:
            save_sizes(listing, sizes)
    bad, excluded = _left_out(root, paths, sizes)
    report_left_out(root, paths, bad, excluded, strict)
    return sizes, ~(bad | excluded)


def list_split(root: str | Path) -> Listing:
    """The files of all class folders, with those in sub-folders of them and behind links.

    Raises:
        ValueError: if the folder does not exist, has no class folders, or one cannot be read.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise ValueError(f"data folder {root} does not exist")
    class_names = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    if not class_names:
        raise ValueError(f"data folder {root} must have one sub-folder per class, found none")
    paths: list[str] = []
    others: list[str] = []
    digest = hashlib.sha256(os.fsencode(f"{_FORMAT}:{root}"))
    for name in class_names:
        for folder, subfolders, files in os.walk(root / name, onerror=_refuse, followlinks=True):
            subfolders.sort()
            digest.update(os.fsencode(f"{folder}:{os.stat(folder).st_mtime_ns}"))
            relative = os.path.relpath(folder, root)
            for file in sorted(files):
                is_image = file.lower().endswith(EXTENSIONS)
                (paths if is_image else others).append(os.path.join(relative, file))
    digest.update(os.fsencode("\0".join(paths)))
    return Listing(root, class_names, paths, others, digest.hexdigest()[:32])


def _refuse(error: OSError) -> None:
    """A folder that cannot be read would otherwise be one without images."""
    raise ValueError(f"folder {error.filename} must be readable: {error.strerror}") from error


def is_supported(image: Image.Image) -> bool:
    """Whether every loader can decode images of this format."""
    return image.format in _FORMATS


def split_folders(folder: str | Path) -> list[Path]:
    """The splits below a folder: its train/ and val/, or the folder itself.

    A folder called train or val is a split if it holds class folders, so that a class may be
    called so, too.

    Raises:
        ValueError: if the folder does not exist.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist")
    splits = [folder / name for name in SPLITS if (folder / name).is_dir()]
    found = [split for split in splits if any(entry.is_dir() for entry in split.iterdir())]
    return found or [folder]


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
    splits = split_folders(folder)
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
        raise ValueError(f"cache folder {cache_root()} must be writable: {error}") from error
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
        sizes = tqdm(
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
