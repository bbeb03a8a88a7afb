"""Floors for segmentation: one class for all pixels, and a class for each colour or place.

    python -m bench.rivals.pixels --data DIR

What a network must beat to have learnt more than the commonest class, the colours of classes, or
where in a picture they are. Each is the commonest class of the training pixels of that colour (16
steps per channel) or place (a grid of 16 x 16), and of all training pixels where there was none.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from rsfast.data import open_pairs
from rsfast.data.index import decode
from rsfast.data.masks import IGNORE_LABEL, decode_mask
from rsfast.data.pairs import Pairs
from rsfast.tasks.segmentation import figures_of

__all__ = ["FLOORS", "figures", "main"]

_STEPS = 16  # per channel and per side
# Of pixels [H, W, 3]: to which of so many groups each belongs, [H, W].
Grouping = Callable[[np.ndarray], np.ndarray]


def _together(pixels: np.ndarray) -> np.ndarray:
    return np.zeros(pixels.shape[:2], dtype=np.int64)


def _by_colour(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels.astype(np.int64) * _STEPS // 256, 2, 0)
    return (red * _STEPS + green) * _STEPS + blue


def _by_place(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    rows, columns = np.arange(height) * _STEPS // height, np.arange(width) * _STEPS // width
    return rows[:, None] * _STEPS + columns


FLOORS: dict[str, tuple[Grouping, int]] = {
    "constant": (_together, 1),
    "colour": (_by_colour, _STEPS**3),
    "place": (_by_place, _STEPS**2),
}


def figures(train: Pairs, val: Pairs, floor: str, ignored: int) -> tuple[float, float, float]:
    """Pixel accuracy, mean accuracy and mean IoU in percent.

    Args:
        train, val: both splits.
        floor: of FLOORS.
        ignored: label of pixels that do not count.
    """
    grouping, num_groups = FLOORS[floor]
    num_classes = len(train.images.class_names)
    counts = np.zeros((num_groups, num_classes), dtype=np.int64)
    for groups, labels in _counted(train, grouping, ignored):
        np.add.at(counts, (groups, labels), 1)
    classes = np.where(counts.any(axis=1), counts.argmax(axis=1), counts.sum(axis=0).argmax())
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    for groups, labels in _counted(val, grouping, ignored):
        np.add.at(matrix, (labels, classes[groups]), 1)
    return figures_of(torch.from_numpy(matrix))


def _counted(
    pairs: Pairs, grouping: Grouping, ignored: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Group and label of the pixels of one image after the other that are not ignored."""
    for position in range(len(pairs.images)):
        labels = decode_mask(pairs.images, pairs.masks, position)
        groups = grouping(np.asarray(decode(pairs.images, position)))
        counted = labels != ignored
        yield groups[counted], labels[counted]


def main(argv: Sequence[str] | None = None) -> int:
    """The command: CSV on the screen."""
    parser = argparse.ArgumentParser(prog="bench.rivals.pixels", description=__doc__)
    parser.add_argument("--data", required=True, help="folder of images and masks of both splits")
    parser.add_argument("--ignore-label", type=int, default=IGNORE_LABEL)
    args = parser.parse_args(argv)
    train, val = (
        open_pairs(args.data, split, ignore_label=args.ignore_label) for split in ("train", "val")
    )
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["floor", "pixel", "mean", "iou"])
    for floor in FLOORS:
        rows.writerow([floor, *figures(train, val, floor, args.ignore_label)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
