"""What a test of each task comes to: image by image, in figures, and between methods.

A set of experiments knows of its task what its :class:`Measure` says. Places or counts of single
images are what is kept, as all else follows from them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rsfast.experiments.compare import (
    Difference,
    bootstrapped_difference,
    figures_of_counts,
    paired_difference,
)
from rsfast.files.tables import read_columns, read_rows

__all__ = ["MEASURES", "Images", "Measure"]

_SUFFIXES = ("/predicted", "/right")  # of a network's columns
Counts = dict[tuple[str, str], tuple[int, ...]]  # image, class -> pixels, predicted, right


class Images(Protocol):
    """What the networks of a set make of each validation image."""

    def add(self, name: str, test: Path, resolution: int) -> dict[str, float]:
        """Takes in a network at one resolution.

        Args:
            name: to call it by.
            test: folder of its evaluation.
            resolution: in pixels.

        Returns:
            Its figures in percent, by column of results.csv.

        Raises:
            ValueError: if it was tested on other images than the ones before it.
        """

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Of the per_image.csv of a report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """How networks of a task are compared.

    Attributes:
        figures: that a report has tables of, by column of results.csv; the first one is what
            methods are compared by.
        after_epochs: what a run's log calls the first of them, before _RESOLUTION.
        images: makes an Images that is empty.
        read: what the per_image.csv of a report holds of each network, as `difference` wants it:
            [n, ...].
        difference: of two methods, given [S, n, ...] of each resolution.
        over_images: how the interval over the images comes about.
        has_shares: whether `read` says which images were right, for Table 1.
        papers_resolutions: in pixels, descending.
        papers_data: what the paper's figures were measured on.
    """

    figures: Mapping[str, str]
    after_epochs: str
    images: Callable[[], Images]
    read: Callable[[Path], dict[str, NDArray[Any]]]
    difference: Callable[[list[NDArray[Any]], list[NDArray[Any]]], Difference]
    over_images: str
    has_shares: bool
    papers_resolutions: Sequence[int]
    papers_data: str

    @property
    def main(self) -> str:
        """The figure that methods are compared by."""
        return next(iter(self.figures))


class _Places:
    """Of classification: the place of each image's class among all, from 1."""

    def __init__(self) -> None:
        self._columns: dict[str, list[str]] = {}
        self._read = functools.cache(read_columns)

    def add(self, name: str, test: Path, resolution: int) -> dict[str, float]:
        found = self._read(test / "per_image.csv")
        for column in ("image", "label"):
            if self._columns.setdefault(column, found[column]) != found[column]:
                raise _other_images(test)
        places = self._columns[name] = found[str(resolution)]
        return {f"top{best}": _share(places, best) for best in (1, 5)}

    def rows(self) -> Iterator[Mapping[str, Any]]:
        lines = zip(*self._columns.values(), strict=True)
        return (dict(zip(self._columns, line, strict=True)) for line in lines)


def _share(places: Sequence[str], best: int) -> float:
    return 100.0 * sum(int(place) <= best for place in places) / len(places)


def _read_hits(file: Path) -> dict[str, NDArray[np.bool_]]:
    """[n]: which images were right."""
    return {
        name: np.array([place == "1" for place in column])
        for name, column in read_columns(file).items()
        if name not in ("image", "label")
    }


class _PixelCounts:
    """Of segmentation: pixels of each image and class, those taken for it, and both."""

    def __init__(self) -> None:
        self._labelled: dict[tuple[str, str], int] = {}
        self._counts: dict[str, Counts] = {}
        self._read = functools.cache(_counts_of)

    def add(self, name: str, test: Path, resolution: int) -> dict[str, float]:
        counts = self._read(test / "per_image.csv")[str(resolution)]
        labelled = {key: values[0] for key, values in counts.items() if values[0]}
        if (self._labelled or labelled) != labelled:
            raise _other_images(test)
        self._labelled = labelled
        self._counts[name] = counts
        sums: dict[str, NDArray[np.int64]] = {}
        for (_, label), values in counts.items():
            sums[label] = sums.get(label, 0) + np.array(values)
        figures = figures_of_counts(np.stack(list(sums.values())))
        return dict(zip(("pixel", "mean", "iou"), map(float, figures), strict=True))

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """One for each image and class that has pixels or is taken for some by any network."""
        for key in sorted({key for counts in self._counts.values() for key in counts}):
            image, label = key
            row = {"image": image, "class": label, "pixels": self._labelled.get(key, 0)}
            for name, counts in self._counts.items():
                values = counts.get(key, (0, 0, 0))[1:]
                row |= {name + end: n for end, n in zip(_SUFFIXES, values, strict=True)}
            yield row


def _counts_of(file: Path) -> dict[str, Counts]:
    """By resolution, out of the per_image.csv of an evaluation."""
    found: dict[str, Counts] = {}
    for row in read_rows(file):
        values = int(row["pixels"]), int(row["predicted"]), int(row["right"])
        found.setdefault(row["resolution"], {})[row["image"], row["class"]] = values
    return found


def _read_counts(file: Path) -> dict[str, NDArray[np.int64]]:
    """[n, K, 3]: pixels of a class, taken for it, and both."""
    columns = read_columns(file)
    images, image_of = np.unique(columns["image"], return_inverse=True)
    labels, label_of = np.unique(columns["class"], return_inverse=True)
    names = [name.removesuffix(_SUFFIXES[0]) for name in columns if name.endswith(_SUFFIXES[0])]
    found = {}
    for name in names:
        parts = [columns[column] for column in ("pixels", *(name + end for end in _SUFFIXES))]
        counts = np.zeros((len(images), len(labels), 3), dtype=np.int64)
        counts[image_of, label_of] = np.array(parts, dtype=np.int64).T
        found[name] = counts
    return found


def _other_images(test: Path) -> ValueError:
    return ValueError(
        f"{test} is of other images than the tests before it: remove its tested.json, and the "
        f"same command tests it again"
    )


MEASURES = {
    "classification": Measure(
        figures={"top1": "Top-1"},
        after_epochs="top1",
        images=_Places,
        read=_read_hits,
        difference=paired_difference,
        over_images="normal approximation",
        has_shares=True,
        papers_resolutions=(224, 192, 160, 128, 96),
        papers_data="ImageNet",
    ),
    "segmentation": Measure(
        figures={"iou": "Mean IoU", "pixel": "Pixel accuracy", "mean": "Mean accuracy"},
        after_epochs="miou",
        images=_PixelCounts,
        read=_read_counts,
        difference=bootstrapped_difference,
        over_images="bootstrap",
        has_shares=False,
        papers_resolutions=(352, 224, 96),
        papers_data="NYUDv2",
    ),
}
