"""Labels and class names from text files: `classes.txt`, and lists of labels of a flat folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rsfast.data.folder import EXTENSIONS, index_files
from rsfast.data.index import ImageIndex
from rsfast.data.walking import is_folder, is_hidden

__all__ = ["flat_images", "index_listed", "labels_listed", "read_classes"]

_CLASSES = "classes.txt"
_NAMED = re.compile(
    rf"(.*?(?:{'|'.join(map(re.escape, EXTENSIONS))}))(?:\s*,\s*|\s+)(.+)", re.IGNORECASE
)


class _Line(NamedTuple):
    """One line of a list; the image is empty where the line is a label alone."""

    number: int
    image: str
    label: str


def read_classes(root: Path) -> tuple[str, ...]:
    """The lines of the classes.txt in a split's folder, or in that of the data set.

    Returns:
        Names of the classes in the order of their labels; nothing without such a file.

    Raises:
        ValueError: if a line is empty, or two are the same.
    """
    for folder in (root, root.parent):
        file = folder / _CLASSES
        if file.is_file():
            return _checked(file)
    return ()


def _checked(file: Path) -> tuple[str, ...]:
    names = tuple(line.strip() for line in _lines(file))
    if not all(names) or len({*names}) != len(names):
        raise ValueError(
            f"{file} must name each class once, one per line, got {len(names)} lines with "
            f"{len({*names} - {''})} names"
        )
    return names


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} must be a text file that can be read: {error}") from error


def flat_images(root: Path) -> list[str]:
    """Names of the images in a folder itself, sorted."""
    names = (entry.name for entry in os.scandir(root))
    return sorted(n for n in names if n.lower().endswith(EXTENSIONS) and not is_hidden(n))


def index_listed(
    root: Path, labels: str | Path, *, strict: bool = False, tolerate_truncated: bool = False
) -> ImageIndex:
    """The images of a folder without class folders, with labels from a list.

    A line is `file label` or `file,label`, or `label` alone; then the lines belong to the files in
    the order of their names. A label is the name of a class or its number from 0.

    Args:
        root: folder of the images.
        labels: file of the list.
        strict, tolerate_truncated: as in :func:`rsfast.data.index_folder`.

    Raises:
        ValueError: naming the file, the line and what is wrong with it.
    """
    on_disk, numbers, names = labels_listed(root, labels)
    return index_files(
        root,
        on_disk,
        numbers,
        names,
        strict=strict,
        tolerate_truncated=tolerate_truncated,
    )


def labels_listed(root: Path, labels: str | Path) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """The names of the images of a flat folder, sorted, [n] int64 labels, and the class names.

    Raises:
        ValueError: as :func:`index_listed`.
    """
    file = Path(labels)
    if not root.is_dir():
        raise ValueError(f"data folder {root} does not exist")
    on_disk = flat_images(root)
    if not on_disk:
        raise ValueError(
            f"data folder {root} must hold the images of {file} without class folders, found none"
        )
    lines = [_line(number, text) for number, text in enumerate(_lines(file), 1) if text.strip()]
    if any(line.image for line in lines):
        _check_images(lines, on_disk, root, file)
        place = {name: position for position, name in enumerate(on_disk)}
        lines.sort(key=lambda line: place[line.image])
    elif len(lines) != len(on_disk):
        raise ValueError(
            f"{file} must have a line for each of the {len(on_disk)} images in {root}, "
            f"`file label` or `label`, got {len(lines)}"
        )
    texts = [line.label for line in lines]
    names = read_classes(root) or _train_classes(root) or _names_in(texts)
    return on_disk, _numbers(lines, names, root, file), names


def _line(number: int, text: str) -> _Line:
    named = _NAMED.fullmatch(text.strip())
    return _Line(number, named[1], named[2]) if named else _Line(number, "", text.strip())


def _check_images(lines: Sequence[_Line], on_disk: Sequence[str], root: Path, file: Path) -> None:
    """The list must be of these files, each once."""
    first: dict[str, int] = {}
    known = set(on_disk)
    for line in lines:
        where = f"line {line.number} of {file}"
        if not line.image:
            raise ValueError(f"{where} must be `file label` as other lines, got {line.label!r}")
        if line.image not in known:
            raise ValueError(f"{where}: no image called {line.image} in {root}")
        if first.setdefault(line.image, line.number) != line.number:
            raise ValueError(
                f"{where}: image {line.image} comes twice, first in line {first[line.image]}"
            )
    if missing := [name for name in on_disk if name not in first]:
        raise ValueError(
            f"{file} must name each image of {root} once, {len(missing)} are missing, the first "
            f"is {missing[0]}"
        )


def _train_classes(root: Path) -> tuple[str, ...]:
    """Of the folder of training images beside it."""
    train = root.parent / "train"
    if not train.is_dir():
        return ()
    folders = (entry.name for entry in os.scandir(train) if is_folder(entry))
    return tuple(sorted(name for name in folders if not is_hidden(name)))


def _names_in(texts: Sequence[str]) -> tuple[str, ...]:
    """The classes that a list itself names; numbers in the order of numbers."""
    if all(text.isdecimal() for text in texts):
        return tuple(map(str, range(max(map(int, texts)) + 1)))
    return tuple(sorted({*texts}))


def _numbers(lines: Sequence[_Line], names: tuple[str, ...], root: Path, file: Path) -> np.ndarray:
    """[n] int64 labels."""
    texts = [line.label for line in lines]
    number_of = {name: number for number, name in enumerate(names)}
    if all(text in number_of for text in texts) and not all(text.isdecimal() for text in texts):
        return np.array([number_of[text] for text in texts], dtype=np.int64)
    _check_labels(lines, number_of, root, file)
    numbers = np.array([int(text) for text in texts], dtype=np.int64)
    as_names = [number_of.get(text, number) for text, number in zip(texts, numbers, strict=True)]
    if as_names != numbers.tolist():
        raise ValueError(
            f"the numbers in {file} must not be names of classes, too, which here have other "
            f"numbers: write lines of `file label` with names that are no numbers"
        )
    if numbers.min() > 0 or numbers.max() >= len(names):
        where = "" if numbers.min() else f" in line {lines[int(numbers.argmax())].number}"
        raise ValueError(
            f"the numbers in {file} must be those of the {len(names)} classes from 0, got "
            f"{numbers.min()} to {numbers.max()}{where}. Those of "
            f"ILSVRC2012_validation_ground_truth.txt count from 1, in the order of the development "
            f"kit's meta.mat: write the classes' names (WordNet ids) in their place"
        )
    return numbers


def _check_labels(
    lines: Sequence[_Line], number_of: Mapping[str, int], root: Path, file: Path
) -> None:
    """Labels that are not all names must all be numbers."""
    others = [line for line in lines if not line.label.isdecimal()]
    if not others:
        return
    unknown = [line for line in others if line.label not in number_of]
    if not unknown:
        odd = min(line for line in lines if line.label not in number_of)
        raise ValueError(
            f"line {odd.number} of {file}: label {odd.label!r} is a number, and line "
            f"{min(others).number} has a name: labels must be names of classes or numbers from 0, "
            f"all of one kind"
        )
    number, image, label = min(unknown)
    hint = ""
    if not image and len(fields := re.split(r"[\s,]+", label)) == 2:
        hint = f", and no image called {fields[0]} in {root}"
    raise ValueError(
        f"line {number} of {file}: label {label!r} is none of the {len(number_of)} classes{hint}"
    )
