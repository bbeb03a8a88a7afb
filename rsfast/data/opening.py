"""The data set of a loader: class folders and archives, pairs of images and masks, or neither."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from rsfast.data.cache import Key, cache_root, has_record
from rsfast.data.dataset import open_split
from rsfast.data.index import ImageIndex, check_command
from rsfast.data.pairs import Pairs, labelling_of_numbers, open_pairs

__all__ = ["BACKENDS", "Opening"]

_LOG = logging.getLogger(__name__)
BACKENDS = ("dali", "pil", "synthetic")
_SYNTHETIC_PX = 256
_SYNTHETIC_CLASSES = 1000
_SYNTHETIC_LABELS = 40  # of pixels, which are bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """What a loader opens; arguments as of :func:`rsfast.data.train_loader`."""

    root: str | Path | None
    split: str
    backend: str
    limit: int
    num_images: int
    num_classes: int | None
    exif: str
    strict: bool
    tolerate_truncated: bool

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"limit must be at least 0, got {self.limit}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}")
        if self.backend != "synthetic" and self.root is None:
            raise ValueError(f"root must be a folder for the {self.backend} loader, got None")

    def images(self, labels: str | None = None) -> ImageIndex:
        """Of classification; with a list of the labels of a folder without class folders."""
        if self.backend == "synthetic":
            return self._synthetic(self.num_classes or _SYNTHETIC_CLASSES)
        assert self.root is not None
        index = open_split(
            self.root,
            self.split,
            labels=labels,
            exif=self.exif,
            strict=self.strict,
            tolerate_truncated=self.tolerate_truncated,
        )
        _warn_if_unchecked(index.known_as, index.key)
        kept = self._kept(len(index))
        return index if kept is None else index.take(kept)

    def pairs(self, ignore_label: int) -> tuple[ImageIndex, ImageIndex | None]:
        """Images and masks of segmentation; no masks of the synthetic set, which has no files."""
        if self.backend == "synthetic":
            names = labelling_of_numbers(self.num_classes or _SYNTHETIC_LABELS, ignore_label)
            return self._synthetic(len(names.class_names)), None
        assert self.root is not None
        pairs: Pairs = open_pairs(
            self.root,
            self.split,
            ignore_label=ignore_label,
            num_classes=self.num_classes,
            exif=self.exif,
            strict=self.strict,
            tolerate_truncated=self.tolerate_truncated,
        )
        _warn_if_unchecked(pairs.images.known_as, pairs.images.key)
        kept = self._kept(len(pairs.images))
        pairs = pairs if kept is None else pairs.take(kept)
        return pairs.images, pairs.masks

    def _kept(self, count: int) -> np.ndarray | None:
        """The positions that a limit leaves, evenly spaced, and with them the classes."""
        if not 0 < self.limit < count:
            return None
        return np.linspace(0, count - 1, self.limit).round().astype(np.int64)

    def _synthetic(self, num_classes: int) -> ImageIndex:
        return ImageIndex(
            root=Path("synthetic"),
            paths=("",) * self.num_images,
            labels=np.arange(self.num_images, dtype=np.int64) % num_classes,
            sizes=np.full((self.num_images, 2), _SYNTHETIC_PX, dtype=np.int32),
            class_names=tuple(str(label) for label in range(num_classes)),
        )


@cache
def _warn_if_unchecked(root: Path, key: Key) -> None:
    """Once per folder; generated images need no check."""
    if not has_record(key) and not root.is_relative_to(cache_root().absolute()):
        _LOG.warning(
            "%s was never checked: a damaged image ends the run, or goes unnoticed where a GPU "
            "decodes it; to check all images: %s",
            root,
            check_command(root),
        )
