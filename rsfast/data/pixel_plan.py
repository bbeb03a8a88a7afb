"""What each batch of segmentation holds: as in classification, with windows that scale draws.

A window of an image of W x H pixels at scale s is W / s x H / s of its pixels: all of the image at
scale 1, a part of it above, the image with a border around it below. It is squashed to r x r for
every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rsfast.data.augment import NOTHING
from rsfast.data.index import ImageIndex
from rsfast.data.masks import IGNORE_LABEL, digest_of, nearest
from rsfast.data.plan import TrainBatch, TrainPlan, ValBatch, ValPlan

__all__ = [
    "PixelPlan",
    "PixelTrainPlan",
    "PixelValPlan",
    "border_of",
    "check_scale",
    "label_sizes",
    "labels_of",
    "most_labels",
    "scaled_windows",
]

_FLIP_MODES = ("shared", "none")
_SMALLEST, _LARGEST = 0.1, 10.0  # scales; the border of a small one is held with its image
_DRAWS = 4  # random numbers per image: scale, top, left, flip


def check_scale(scale: tuple[float, ...]) -> None:
    """Refuses what is no range, and windows that would not fit into memory.

    Raises:
        ValueError: naming the range and the value.
    """
    if len(scale) != 2 or not _SMALLEST <= scale[0] <= scale[1] <= _LARGEST:
        raise ValueError(
            f"scale must be a range within {_SMALLEST} to {_LARGEST}, such as 0.5 2.0, got {scale}"
        )


def scaled_windows(draws: np.ndarray, sizes: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Windows of a log-uniform scale, placed uniformly.

    Args:
        draws: [n, 3] numbers in [0, 1).
        sizes: [n, 2] height and width in pixels.
        scale: smallest and largest.

    Returns:
        [n, 4] int32 top, left, height, width. A window that is smaller than the image lies in it, a
        larger one holds all of it.
    """
    low, high = math.log(scale[0]), math.log(scale[1])
    scales = np.exp(low + (high - low) * draws[:, :1])
    sizes = sizes.astype(np.int64)
    windows = np.maximum(1, np.rint(sizes / scales).astype(np.int64))
    room = sizes - windows  # below 0, the part of the window that is beyond the image
    places = np.floor(draws[:, 1:3] * (np.abs(room) + 1)).astype(np.int64) * np.sign(room)
    return np.concatenate([places, windows], axis=1).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class PixelTrainPlan(TrainPlan):
    """Training batches of one rank, with order and ranks as in classification.

    Args:
        masks: of the images of the index, in the same order; None where nothing is decoded.
        resolution: of the labels, the largest of the levels.
        scale: range of the scale of windows.
        ignore_label: label of the pixels of a window that lie beyond the image.
        border: RGB of these pixels, from 0 to 255.
    """

    masks: ImageIndex | None
    resolution: int
    scale: tuple[float, float] = (0.5, 2.0)
    ignore_label: int = IGNORE_LABEL
    border: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale)
        for name, value, allowed in (
            ("crop", self.crop, ("single",)),
            ("flip", self.flip, _FLIP_MODES),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{name} must be one of {allowed} for segmentation, whose levels share one "
                    f"mask, got {value!r}"
                )
        if self.crop_area != TrainPlan.crop_area:
            raise ValueError(
                f"crop_area is of classification; segmentation has scale, got {self.crop_area}"
            )
        if self.augment != NOTHING:
            raise ValueError(
                "augment must change nothing for segmentation, whose masks would not follow, got "
                f"{self.augment}"
            )

    @property
    def digest(self) -> str:
        """A name for the images and the pixels of their masks."""
        return digest_of(self.index, self.masks)

    def batch(self, epoch: int, step: int) -> TrainBatch:
        """This rank's part of one step, both counted from 0."""
        whole, own = self._part
        images = self.images(epoch, step)
        draws = self._generator(epoch, step).random((whole, _DRAWS))[own]
        windows = scaled_windows(draws[:, :3], self.index.sizes[images], self.scale)
        flips = (draws[:, 3] < 0.5) & (self.flip == "shared")
        levels = (self.num_levels, self.batch_size)
        return TrainBatch(
            images,
            np.broadcast_to(windows, (*levels, 4)),
            np.broadcast_to(flips, levels),
            shared_window=True,
            border=self.border,
        )


@dataclass(frozen=True, kw_only=True)
class PixelValPlan(ValPlan):
    """Validation batches of one rank: whole images, and their masks at their own sizes.

    Args:
        masks: of the images of the index, in the same order; None where nothing is decoded.
    """

    masks: ImageIndex | None
    crop: str = "none"

    @property
    def digest(self) -> str:
        """A name for the images and the pixels of their masks."""
        return digest_of(self.index, self.masks)


PixelPlan = PixelTrainPlan | PixelValPlan


def labels_of(
    plan: PixelPlan, batch: TrainBatch | ValBatch, masks: Iterable[np.ndarray]
) -> np.ndarray:
    """The labels of one step, as `Rendered` has them.

    Args:
        plan: of the step.
        batch: of the plan.
        masks: of its images, [H, W] uint8 each.
    """
    if isinstance(batch, ValBatch):
        return np.concatenate([mask.reshape(-1) for mask in masks])
    assert isinstance(plan, PixelTrainPlan)
    labels = np.empty((len(batch.images), plan.resolution, plan.resolution), dtype=np.uint8)
    for n, mask in enumerate(masks):
        top, left, height, width = batch.windows[0, n].tolist()
        labels[n] = nearest(
            mask,
            (top, left, height, width),
            plan.resolution,
            flip=bool(batch.flips[0, n]),
            fill=plan.ignore_label,
        )
    return labels.reshape(-1)


def border_of(mean: Sequence[float]) -> tuple[int, int, int]:
    """The bytes nearest to the mean RGB values of a normalisation, which are in [0, 1]."""
    red, green, blue = (min(255, max(0, round(255 * value))) for value in mean)
    return red, green, blue


def label_sizes(plan: PixelPlan, images: np.ndarray) -> list[tuple[int, int]]:
    """Height and width of the labels of some images."""
    if isinstance(plan, PixelTrainPlan):
        return [(plan.resolution, plan.resolution)] * len(images)
    sizes = plan.index.sizes if plan.masks is None else plan.masks.sizes
    return [(height, width) for height, width in sizes[images].tolist()]


def most_labels(plan: TrainPlan | ValPlan) -> int:
    """Pixels of the labels of a batch at most; none of classification."""
    if isinstance(plan, PixelTrainPlan):
        return plan.batch_size * plan.resolution**2
    if isinstance(plan, PixelValPlan):
        largest = plan.index.sizes.astype(np.int64).prod(axis=1).max(initial=0)
        return plan.batch_size * int(largest)
    return 0
