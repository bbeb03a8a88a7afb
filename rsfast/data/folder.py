"""A folder of images, one sub-folder per class, indexed once.

The index holds what every loader needs before it decodes anything: path, label and size of each
image. It reads file headers only, and is cached, so that a later start costs a directory listing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from rsfast.data.cache import cache_root

__all__ = ["EXTENSIONS", "FolderIndex", "index_folder"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Pillow's names of what every loader can decode, whatever the file is called (MPO is JPEG).
_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP"}
_LOG = logging.getLogger(__name__)
_FORMAT = 1  # of the cache file; raise it when its contents change


@dataclass(frozen=True, slots=True)
class FolderIndex:
    """The images of one split.

    Attributes:
        root: the split's folder.
        paths: n paths relative to root, sorted within each folder.
        labels: [n] int64, position of the image's class in class_names.
        sizes: [n, 2] int32, height and width in pixels as stored (no EXIF rotation).
        class_names: sub-folder names, sorted.
    """

    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Absolute path of one image."""
        return os.path.join(self.root, self.paths[index])


def index_folder(root: str | Path, *, workers: int = 8, cache: bool = True) -> FolderIndex:
    """Lists the images below `root` and reads the size of each.

    Files whose header no decoder can read are left out, with a warning that names the first ones.
    An image that is overwritten in place by one of another size needs its folder touched.

    Args:
        root: a folder with one sub-folder per class.
        workers: threads that read headers.
        cache: keep the result under the cache folder; it is used again while the listing and the
            folders' modification times stay the same.

    Raises:
        ValueError: if the folder does not exist, has no class folders, or a class has no image.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise ValueError(f"data folder {root} does not exist")
    class_names = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    if not class_names:
        raise ValueError(f"data folder {root} must have one sub-folder per class, found none")
    paths, digest = _list_images(root, class_names)
    file = cache_root() / "index" / f"{digest}.npz"
    sizes = _load_sizes(file, len(paths)) if cache else None
    if sizes is None:
        sizes = _read_sizes(root, paths, workers)
        if cache:
            _save_sizes(file, sizes)
    return _without_unreadable(root, paths, sizes, class_names)


def _list_images(root: Path, class_names: Sequence[str]) -> tuple[list[str], str]:
    """Relative paths in order, and a digest of the listing."""
    paths: list[str] = []
    digest = hashlib.sha256(f"{_FORMAT}:{root}".encode())
    for name in class_names:
        for folder, subfolders, files in os.walk(root / name, followlinks=True):
            subfolders.sort()
            digest.update(f"{folder}:{os.stat(folder).st_mtime_ns}".encode())
            relative = os.path.relpath(folder, root)
            paths += (
                os.path.join(relative, file)
                for file in sorted(files)
                if file.lower().endswith(EXTENSIONS)
            )
    digest.update("\0".join(paths).encode())
    return paths, digest.hexdigest()[:32]


def _read_sizes(root: Path, paths: Sequence[str], workers: int) -> np.ndarray:
    def size_of(path: str) -> tuple[int, int]:
        try:
            with Image.open(root / path) as image:
                return (image.height, image.width) if image.format in _FORMATS else (0, 0)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return 0, 0  # unreadable

    with ThreadPoolExecutor(workers) as pool:
        sizes = tqdm(
            pool.map(size_of, paths),
            total=len(paths),
            desc=f"indexing {root.name}",
            unit="img",
            disable=len(paths) < 20_000,
        )
        return np.array(list(sizes), dtype=np.int32).reshape(-1, 2)


def _load_sizes(file: Path, count: int) -> np.ndarray | None:
    try:
        # np.load leaves a file it cannot read open when it is given the path.
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            sizes = stored["sizes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return sizes if sizes.shape == (count, 2) else None


def _save_sizes(file: Path, sizes: np.ndarray) -> None:
    """Best effort: a read-only home only costs the next start some time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as stream:
            np.savez_compressed(stream, sizes=sizes)
        os.replace(stream.name, file)
    except OSError as error:
        _LOG.warning("index of the data set not cached: %s", error)


def _without_unreadable(
    root: Path, paths: list[str], sizes: np.ndarray, class_names: tuple[str, ...]
) -> FolderIndex:
    good = sizes.min(axis=1, initial=1 << 30) > 0
    if not good.all():
        bad = [paths[index] for index in np.flatnonzero(~good)]
        _LOG.warning(
            "%d of %d files in %s are not readable images and are left out: %s%s",
            len(bad),
            len(paths),
            root,
            ", ".join(bad[:5]),
            ", ..." if len(bad) > 5 else "",
        )
    kept = tuple(path for path, ok in zip(paths, good, strict=True) if ok)
    number_of = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number_of[path.split(os.sep, 1)[0]] for path in kept], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(class_names))
    if not counts.all():
        empty = class_names[int(np.flatnonzero(counts == 0)[0])]
        raise ValueError(
            f"class folder {root / empty} must hold at least one image "
            f"({' '.join(EXTENSIONS)}), found none"
        )
    return FolderIndex(root, kept, labels, sizes[good], class_names)
