"""Labels and class names from text files: `classes.txt`, and lists of labels of a flat folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsfast.data.folder import EXTENSIONS, index_files
from rsfast.data.index import ImageIndex
from rsfast.data.walking import is_folder, is_hidden

__all__ = ["flat_images", "index_listed", "read_classes"]

_CLASSES = "classes.txt"


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
        return file.read_text(encoding="utf-8").splitlines()
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

    A line is `file label`, or `label` alone; then the lines belong to the files in the order of
    their names. A label is the name of a class or its number from 0.

    Args:
        root: folder of the images.
        labels: file of the list.
        strict, tolerate_truncated: as in :func:`rsfast.data.index_folder`.

    Raises:
        ValueError: naming the file, the line and what is wrong with it.
    """
    file = Path(labels)
    if not root.is_dir():
        raise ValueError(f"data folder {root} does not exist")
    on_disk = flat_images(root)
    if not on_disk:
        raise ValueError(
            f"data folder {root} must hold the images of {file} without class folders, found none"
        )
    rows = [line.split(None, 1) for line in _lines(file) if line.strip()]
    _check_rows(rows, on_disk, root, file)
    if _is_named(rows, on_disk):
        named = {row[0]: row[1].strip() for row in rows}
        texts = [named[name] for name in on_disk]
    else:
        texts = [" ".join(row).strip() for row in rows]
    names = read_classes(root) or _train_classes(root) or _names_in(texts)
    return index_files(
        root,
        on_disk,
        _numbers(texts, names, file),
        names,
        strict=strict,
        tolerate_truncated=tolerate_truncated,
    )


def _is_named(rows: Sequence[list[str]], on_disk: Sequence[str]) -> bool:
    return all(len(row) == 2 for row in rows) and rows[0][0] in set(on_disk)


def _check_rows(rows: Sequence[list[str]], on_disk: Sequence[str], root: Path, file: Path) -> None:
    """The list must be of these files, each once."""
    if rows and _is_named(rows, on_disk):
        listed = [row[0] for row in rows]
        odd = sorted(set(listed) ^ set(on_disk))
        if len(set(listed)) != len(listed):
            odd = [name for name in on_disk if listed.count(name) > 1]
        if odd:
            raise ValueError(
                f"{file} must name each image of {root} once, {len(odd)} are not, the first is "
                f"{odd[0]}"
            )
    elif len(rows) != len(on_disk):
        raise ValueError(
            f"{file} must have a line for each of the {len(on_disk)} images in {root}, "
            f"`file label` or `label`, got {len(rows)}"
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


def _numbers(texts: Sequence[str], names: tuple[str, ...], file: Path) -> np.ndarray:
    """[n] int64 labels."""
    number_of = {name: number for number, name in enumerate(names)}
    if all(text in number_of for text in texts) and not all(text.isdecimal() for text in texts):
        return np.array([number_of[text] for text in texts], dtype=np.int64)
    for line, text in enumerate(texts, 1):
        if not text.isdecimal():
            raise ValueError(
                f"label {text!r} of image {line} in {file} must be one of the {len(names)} "
                f"classes, by name or all by number from 0"
            )
    numbers = np.array([int(text) for text in texts], dtype=np.int64)
    as_names = [number_of.get(text, number) for text, number in zip(texts, numbers, strict=True)]
    if as_names != numbers.tolist():
        raise ValueError(
            f"the numbers in {file} must not be names of classes, too, which here have other "
            f"numbers: write lines of `file label` with names that are no numbers"
        )
    if numbers.min() > 0 or numbers.max() >= len(names):
        raise ValueError(
            f"the numbers in {file} must be those of the {len(names)} classes from 0, got "
            f"{numbers.min()} to {numbers.max()}. Those of ILSVRC2012_validation_ground_truth.txt "
            f"count from 1, in the order of the development kit's meta.mat: write the classes' "
            f"names (WordNet ids) in their place"
        )
    return numbers
