"""The order of class folders, and with it the number of each label."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

__all__ = ["warn_of_numbers"]

_LOG = logging.getLogger(__name__)
_NUMBER = re.compile(r"\d+")


def warn_of_numbers(root: object, class_names: Sequence[str]) -> None:
    """Warns if folders are numbered and their labels are other numbers.

    Labels follow the order of text, in which "10" comes before "2". It matters to those who know
    the classes by number, as a network does that was trained elsewhere.

    Args:
        root: of the data set, for the message.
        class_names: in the order of their labels; none where the network knows its classes.
    """
    numbered = sorted(class_names, key=lambda name: [int(n) for n in _NUMBER.findall(name)])
    patterns = {_NUMBER.sub("#", name) for name in class_names}
    if len(patterns) != 1 or numbered == list(class_names):
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
