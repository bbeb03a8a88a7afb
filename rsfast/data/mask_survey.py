"""Looks into every mask of a split once: can it be used, its size, and the pixels of each label.

Masks are small and few, and a label that is no class would end a training on a GPU without a word
about the file. So no run starts before each of its masks was decoded, by a check or by itself. What
was found is kept in the cache folder until a mask's size or time of modification changes.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rsfast.data.cache import cache_root, file_stat, load_arrays, pack, save_arrays, unpack
from rsfast.data.judging import check_png_end
from rsfast.data.reading import patiently
from rsfast.files.progress import progress

__all__ = ["CONVERTER", "Survey", "survey_masks"]

_LOG = logging.getLogger(__name__)
_FORMAT = 2  # of the cache file, and of what is looked for
_LABELS = 256
_PNG = b"\x89PNG\r\n\x1a\n"
_COLOURS = {2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}  # PNG's colour types
CONVERTER = "python -m rsfast.data masks"


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found out about the masks of a split.

    Attributes:
        paths: n paths relative to the folder of the masks.
        sizes: [n, 2] int32 height and width in pixels; 0 where the file cannot be used.
        counts: [n, 256] uint32 pixels of each label.
        contents: [n] int64 numbers that tell one mask's pixels from another's; 0 where the file
            cannot be used.
        problems: n reasons why a file cannot be used, whatever the classes are; empty for none.
    """

    paths: tuple[str, ...]
    sizes: np.ndarray
    counts: np.ndarray
    contents: np.ndarray
    problems: tuple[str, ...]


class _Found(NamedTuple):
    stat: tuple[int, int]
    size: tuple[int, int]
    counts: Sequence[int] | np.ndarray
    problem: str
    content: int = 0


def survey_masks(root: Path, paths: Sequence[str], workers: int = 8) -> Survey:
    """Decodes the masks that are new or have changed since they were looked at last.

    Args:
        root: folder of the masks, absolute.
        paths: of the masks, relative to it.
        workers: threads.
    """
    file = cache_root() / "masks" / f"{_key(root)}.npz"
    known = _load(file)
    found: list[_Found] = []
    try:
        with ThreadPoolExecutor(workers) as pool:
            looks = pool.map(lambda path: _look(root / path, known.get(path)), paths)
            found.extend(
                progress(
                    looks,
                    total=len(paths),
                    desc=f"masks of {root.name}",
                    unit="mask",
                    disable=len(paths) - len(known) < 500,
                )
            )
    finally:
        if any(one is not known.get(path) for path, one in zip(paths, found, strict=False)):
            _save(file, paths[: len(found)], found)
    return Survey(
        paths=tuple(paths),
        sizes=np.array([one.size for one in found], dtype=np.int32).reshape(-1, 2),
        counts=_counts(found),
        contents=_contents(found),
        problems=tuple(one.problem for one in found),
    )


def _look(file: Path, known: _Found | None) -> _Found:
    now = file_stat(file)  # before it is read: a change while it is must not be missed
    if known is not None and known.stat == now and now[0] >= 0:
        return known
    try:
        content = patiently(file.read_bytes, str(file))
    except OSError as error:
        return _Found((-1, -1), (0, 0), (), f"cannot be read: {error.strerror or error}")
    if problem := _form(content):
        return _Found(now, (0, 0), (), problem)
    try:
        with Image.open(io.BytesIO(content)) as image:
            counts = image.histogram()
            size = (image.height, image.width)
            pixels = np.asarray(image)
        check_png_end(io.BytesIO(content))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged content
        return _Found(now, (0, 0), (), f"cannot be decoded: {str(error) or type(error).__name__}")
    return _Found(now, size, counts, "", _content(pixels))


def _content(pixels: np.ndarray) -> int:
    # Of the pixels and not of the file, whose bytes another encoder would have changed.
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.tobytes())
    return int.from_bytes(digest.digest()[:8], "big", signed=True)


def _form(content: bytes) -> str:
    """Why a file is no 8-bit grey PNG, by its header, and the remedy."""
    if not content:
        return "empty file"
    if not content.startswith(_PNG) or len(content) < 26:
        return "no PNG file, which alone keeps class numbers as they are"
    bits, colour = content[24], content[25]
    if colour in _COLOURS:
        what = f"{_COLOURS[colour]} PNG"
    elif bits != 8:
        what = f"grey PNG of {bits} {'bit' if bits == 1 else 'bits'}"
    else:
        return ""
    colors = " --colors FILE" if colour in (2, 6) else ""
    return f"{what}, must be class numbers in 8-bit grey: {CONVERTER} SRC DST{colors}"


def _key(root: Path) -> str:
    return hashlib.sha256(os.fsencode(f"{_FORMAT}:{os.path.realpath(root)}")).hexdigest()[:32]


def _load(file: Path) -> dict[str, _Found]:
    arrays = load_arrays(file, "paths", "stats", "sizes", "counts", "problems", "contents")
    if arrays is None:
        return {}
    try:
        paths, problems = unpack(arrays[0]), unpack(arrays[4])
        columns = (arrays[1].tolist(), arrays[2].tolist(), arrays[3], problems, arrays[5].tolist())
        rows = zip(paths, *columns, strict=True)
        return {
            path: _Found((stat[0], stat[1]), (size[0], size[1]), counts, problem, content)
            for path, stat, size, counts, problem, content in rows
        }
    except (ValueError, IndexError, TypeError):
        return {}  # damaged in a way that only its contents show


def _save(file: Path, paths: Sequence[str], found: Sequence[_Found]) -> None:
    try:
        save_arrays(
            file,
            paths=pack(paths),
            stats=np.array([one.stat for one in found], dtype=np.int64),
            sizes=np.array([one.size for one in found], dtype=np.int32),
            counts=_counts(found),
            problems=pack(one.problem for one in found),
            contents=_contents(found),
        )
    except OSError as error:  # a read-only home only costs the next start time
        _LOG.warning("survey of the masks not cached: %s", error)


def _contents(found: Sequence[_Found]) -> np.ndarray:
    return np.array([one.content for one in found], dtype=np.int64)


def _counts(found: Sequence[_Found]) -> np.ndarray:
    counts = np.zeros((len(found), _LABELS), dtype=np.uint32)
    for row, one in enumerate(found):
        if len(one.counts):
            counts[row] = one.counts
    return counts
