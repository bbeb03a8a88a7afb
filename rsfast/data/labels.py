"""The order of class folders, and with it the number of each label."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence

__all__ = ["warn_of_numbers"]

_LOG = logging.getLogger(__name__)
_NUMBER = re.compile(r"\d+")


def warn_of_numbers(root: object, class_names: Sequence[str]) -> None:
    """Warns if folders are numbered and their labels are other numbers.

    Labels follow the order of text, in which "10" comes before "2". It matters to those who know
    the classes by number, as a network does that was trained elsewhere.

    Nothing is said of archives and of lists, whose labels are what is written there.

    Args:
        root: folder of the data set or of a split, or what is no folder.
        class_names: in the order of their labels; none where the network knows its classes.
    """
    numbered = sorted(class_names, key=lambda name: [int(n) for n in _NUMBER.findall(name)])
    patterns = {_NUMBER.sub("#", name) for name in class_names}
    if len(patterns) != 1 or numbered == list(class_names):
        return
    if not _has_folder(root, class_names[0]):
        return
    label = next(n for n, (a, b) in enumerate(zip(class_names, numbered, strict=True)) if a != b)
    longest = max(len(number) for name in class_names for number in _NUMBER.findall(name))
    _LOG.warning(
        "class folders in %s are numbered, but labels follow the order of their names as text: "
        "label %d is folder %s, not %s; where numbers matter, as for a network trained elsewhere, "
        "rename the folders to numbers of equal length, such as %s",
        root,
        label,
        class_names[label],
        numbered[label],
        _NUMBER.sub(lambda number: number[0].zfill(longest), numbered[label]),
    )


def _has_folder(root: object, name: str) -> bool:
    """Whether a class has one in a data set or split."""
    if not isinstance(root, str | os.PathLike):
        return False
    places = (os.path.join(root, split, name) for split in ("", "train", "val", "validation"))
    return any(map(os.path.isdir, places))
