"""Masks as they are published to masks as training reads them: class numbers in 8-bit grey PNG.

Palette images keep their numbers, colours get those of a table, and numbers may be shifted or
mapped. Nothing is resized, and no label is made up: what has no number is an error.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rsfast.data.index import printable
from rsfast.data.masks import IGNORE_LABEL
from rsfast.data.walking import files_below
from rsfast.files.progress import progress

__all__ = ["Converted", "convert_masks", "parse_pairs", "read_colors"]

_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif")  # without loss
_PNG = b"\x89PNG"


class Converted(NamedTuple):
    """Number of masks written, and the labels in them, ascending."""

    masks: int
    labels: list[int]


class _Rule(NamedTuple):
    """The table of the colours, [n, 3] uint8, or None; and the new label of each old one."""

    colors: np.ndarray | None
    table: np.ndarray


def convert_masks(
    source: str | Path,
    target: str | Path,
    *,
    shift: int = 0,
    mapping: Mapping[int, int] | None = None,
    colors: str | Path | None = None,
    listed: str | Path | None = None,
    stem: tuple[str, str] | None = None,
) -> Converted:
    """Writes the masks of a folder anew, in the same sub-folders of another.

    Args:
        source: folder of masks.
        target: folder that they are written to; those of the same names are replaced.
        shift: is added to each label but 255; labels that fall below 0 become 255.
        mapping: new labels, from 0 to 255, by labels as they are stored; they are not shifted.
        colors: file with a line `red green blue`, and perhaps a name, for each class from 0.
        listed: file with the stem of a mask in each line; others are passed over.
        stem: end of the stems to convert, and what takes its place; others are passed over.

    Raises:
        ValueError: naming the file, the rule and what was found.
        OSError: if a file cannot be written.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    if not source.is_dir():
        raise ValueError(f"SRC must be a folder of masks, got {source}")
    real, there = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if real == there or real in there.parents or there in real.parents:
        raise ValueError(f"DST must be a folder apart from SRC, got {target}")
    rule = _Rule(None if colors is None else read_colors(colors), _table(shift, mapping or {}))
    names = _names(source, listed, stem)
    seen = np.zeros(256, dtype=bool)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = pool.map(lambda name: _convert(source / name, target / names[name], rule), names)
        about = f"masks of {source.name}"
        for labels in progress(done, total=len(names), desc=about, unit="mask"):
            seen[labels] = True
    return Converted(len(names), np.flatnonzero(seen).tolist())


def read_colors(file: str | Path) -> np.ndarray:
    """[n, 3] uint8 colours of the classes in a file.

    Raises:
        ValueError: naming the file and the line.
    """
    colors: list[tuple[int, ...]] = []
    for number, line in enumerate(_lines(file), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        color = tuple(int(word) if word.isdecimal() else -1 for word in words[:3])
        if len(color) < 3 or not all(0 <= value <= 255 for value in color) or color in colors:
            raise ValueError(
                f"{file} must have a colour of its own in each line, as `red green blue` from 0 to "
                f"255, got {line!r} in line {number}"
            )
        colors.append(color)
    if not 0 < len(colors) <= IGNORE_LABEL:
        raise ValueError(f"{file} must have from 1 to 255 colours, got {len(colors)}")
    return np.array(colors, dtype=np.uint8)


def parse_pairs(texts: Sequence[str]) -> dict[int, int]:
    """Labels by labels, of texts such as 0=255.

    Raises:
        ValueError: naming the text.
    """
    pairs = {}
    for text in texts:
        old, _, new = text.partition("=")
        if not (old.isdecimal() and new.isdecimal() and max(int(old), int(new)) <= 255):
            raise ValueError(f"--map must be two labels from 0 to 255, as in 0=255, got {text}")
        pairs[int(old)] = int(new)
    return pairs


def _table(shift: int, mapping: Mapping[int, int]) -> np.ndarray:
    """[256] int64 new labels; beyond 255 where there is none."""
    table = np.arange(256, dtype=np.int64) + shift
    table[table < 0] = IGNORE_LABEL
    table[shift + np.arange(256) >= IGNORE_LABEL] = 256
    table[IGNORE_LABEL] = IGNORE_LABEL
    for old, new in mapping.items():
        table[old] = new
    return table


def _names(source: Path, listed: str | Path | None, stem: tuple[str, str] | None) -> dict[str, str]:
    """Path of each mask to convert -> path of the mask that is written, each in its folder."""
    old, new = stem or ("", "")
    wanted = (
        None if listed is None else [line.split()[0] for line in _lines(listed) if line.split()]
    )
    names, taken = {}, dict[str, str]()
    for path in files_below(source):
        name, extension = os.path.splitext(path)
        if extension.lower() not in _EXTENSIONS or not name.endswith(old):
            continue
        if wanted is not None and os.path.basename(name) not in wanted and name not in wanted:
            continue
        names[path] = f"{name.removesuffix(old)}{new}.png"
        if (other := taken.setdefault(names[path], path)) != path:
            raise ValueError(
                f"masks of SRC must have names of their own, got {source / other} and {path}"
            )
    if not names:
        raise ValueError(f"SRC must hold masks ({' '.join(_EXTENSIONS)}), found none in {source}")
    if wanted is not None:
        stems = {os.path.splitext(path)[0] for path in names}
        stems |= {os.path.basename(path) for path in stems}
        if missing := [name for name in wanted if name not in stems]:
            raise ValueError(
                f"masks of {listed} must be in {source}, found none of {len(missing)} of them, the "
                f"first is {missing[0]}"
            )
    return names


def _convert(source: Path, target: Path, rule: _Rule) -> np.ndarray:
    """Writes one mask; the labels in it."""
    try:
        content = source.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            stored = _stored(image, _bits(content), rule.colors)
    except ValueError as error:
        raise ValueError(f"mask {printable(str(source))} {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged content
        raise ValueError(f"mask {printable(str(source))} cannot be decoded: {error}") from error
    labels = rule.table[stored]
    if labels.max(initial=0) > 255:
        raise ValueError(
            f"mask {printable(str(source))} has label {stored[labels > 255][0]}, which --shift "
            "moves beyond 254; name its new label by --map"
        )
    _write(target, labels.astype(np.uint8))
    return np.unique(labels)


def _write(target: Path, labels: np.ndarray) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}.png")
    try:
        Image.fromarray(labels).save(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _stored(image: Image.Image, bits: int, colors: np.ndarray | None) -> np.ndarray:
    """[H, W] labels from 0 to 255 as the file has them."""
    if colors is not None:
        return _of_colors(np.asarray(image.convert("RGB")), colors)
    if image.mode == "LA" and image.getextrema()[1] == (255, 255):
        image = image.getchannel("L")  # nothing is transparent
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise ValueError(
            f"has pixels of mode {image.mode}, must have class numbers; --colors FILE says which "
            "colour is which class"
        )
    labels = np.asarray(image).astype(np.int64)
    if image.mode == "L" and bits in (2, 4):
        labels //= 255 // (2**bits - 1)  # Pillow spreads them over a byte
    if labels.max(initial=0) > 255 or labels.min(initial=0) < 0:
        odd = labels[(labels < 0) | (labels > 255)][0]
        raise ValueError(f"must have labels from 0 to 255, has {odd}")
    return labels


def _bits(content: bytes) -> int:
    """Of each pixel of a grey PNG file; 8 of others."""
    return content[24] if content.startswith(_PNG) and content[25:26] == b"\0" else 8


def _of_colors(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """[H, W] the line of each pixel's colour."""
    weights = np.array([1 << 16, 1 << 8, 1], dtype=np.int64)
    codes, known = pixels @ weights, colors @ weights
    order = np.argsort(known)
    place = order[np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)]
    if (strange := known[place] != codes).any():
        red, green, blue = pixels[strange][0].tolist()
        raise ValueError(f"has the colour {red} {green} {blue}, which --colors must have, too")
    return place


def _lines(file: str | Path) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} must be a text file that can be read: {error}") from error
