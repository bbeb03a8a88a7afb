"""What each batch holds: images, crop windows and flips, as pure functions of (seed, epoch, step).

Loaders render a plan and draw no random number themselves. So all loaders see the same windows,
the pictures of a step do not depend on the number of ranks it is spread over, and any step can be
made again without the ones before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rsfast.data.augment import (
    NOTHING,
    Augment,
    Blends,
    draw_blends,
    draw_colour_shifts,
    draw_erasures,
)
from rsfast.data.index import ImageIndex
from rsfast.data.operations import Operations, draw_operations
from rsfast.files.pictures import VAL_CROPS, val_geometry

__all__ = ["TrainBatch", "TrainPlan", "ValBatch", "ValPlan", "random_windows"]

CROP_MODES = ("single", "multi")
FLIP_MODES = ("shared", "independent", "none")
_TRIES = 10
# Last part of the seed of what is drawn besides windows and flips; not 0.
_MIXING, _OPERATING, _ERASING, _LIGHTING = 1, 2, 3, 4
DRAWS = 2 * _TRIES + 2  # random numbers per window: area and ratio of each try, top and left


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One rank's part of a training step.

    Attributes:
        images: [N] int64 positions in the index.
        windows: [L, N, 4] int32 top, left, height, width in pixels of the stored image.
        flips: [L, N] bool, horizontal.
        shared_window: all levels have the same window, so one decode and one cut serve them.
        operations: what is done to each window before it is resized; None for nothing.
        border: RGB of what a window has beyond the image; None where no window reaches there.
    """

    images: np.ndarray
    windows: np.ndarray
    flips: np.ndarray
    shared_window: bool
    operations: Operations | None = None
    border: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class ValBatch:
    """One rank's part of a validation step.

    Attributes:
        images: [N] int64 positions in the index.
        resized: [L, N, 2] int32 height and width that the whole image is resized to.
        corners: [L, N, 2] int32 top and left of the r x r crop out of it.
    """

    images: np.ndarray
    resized: np.ndarray
    corners: np.ndarray


def random_windows(draws: np.ndarray, sizes: np.ndarray, area: tuple[float, float]) -> np.ndarray:
    """Crop windows: area uniform in `area`, aspect ratio log-uniform in [3/4, 4/3].

    Ten tries; if none fits, the largest centred window whose ratio is in range (what torchvision's
    RandomResizedCrop does).

    Args:
        draws: [n, DRAWS] numbers in [0, 1).
        sizes: [n, 2] height and width in pixels.
        area: smallest and largest share of the image.

    Returns:
        [n, 4] int32 top, left, height, width.
    """
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    shares = area[0] + (area[1] - area[0]) * draws[:, :_TRIES]
    log_ratios = math.log(4 / 3) * (2.0 * draws[:, _TRIES : 2 * _TRIES] - 1.0)
    pixels = shares * (height * width)[:, None]
    tried_w = np.rint(np.sqrt(pixels * np.exp(log_ratios))).astype(np.int64)
    tried_h = np.rint(np.sqrt(pixels / np.exp(log_ratios))).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= width[:, None])
    fits &= (tried_h > 0) & (tried_h <= height[:, None])
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)

    clamped_w = np.maximum(1, np.minimum(width, np.rint(height * 4 / 3).astype(np.int64)))
    clamped_h = np.maximum(1, np.minimum(height, np.rint(width * 4 / 3).astype(np.int64)))
    window_w = np.where(found, np.take_along_axis(tried_w, first, 1)[:, 0], clamped_w)
    window_h = np.where(found, np.take_along_axis(tried_h, first, 1)[:, 0], clamped_h)
    top = np.floor(draws[:, -2] * (height - window_h + 1)).astype(np.int64)
    left = np.floor(draws[:, -1] * (width - window_w + 1)).astype(np.int64)
    top = np.where(found, top, (height - window_h) // 2)
    left = np.where(found, left, (width - window_w) // 2)
    return np.stack([top, left, window_h, window_w], axis=1).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Training batches of one rank.

    Every epoch visits the images in a new order. The last step of an epoch is filled up from the
    head of the order, so that all batches of all ranks are full.

    Args:
        index: the images.
        num_levels: L.
        batch_size: N, per rank.
        rank, world_size: this rank gets the rank-th N images of each step.
        seed: of order, windows and flips.
        crop: "single" window for all levels, or "multi" (one each; Table 6 of the paper).
        flip: "shared" by all levels, "independent", or "none".
        crop_area: range of the window's share of the image.
        augment: what else happens to the images; it moves no window and no flip.
    """

    index: ImageIndex
    num_levels: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    crop: str = "single"
    flip: str = "shared"
    crop_area: tuple[float, float] = (0.08, 1.0)
    augment: Augment = NOTHING

    def __post_init__(self) -> None:
        _check_share(self.batch_size, self.rank, self.world_size)
        if self.crop not in CROP_MODES:
            raise ValueError(f"crop must be one of {CROP_MODES}, got {self.crop!r}")
        if self.flip not in FLIP_MODES:
            raise ValueError(f"flip must be one of {FLIP_MODES}, got {self.flip!r}")
        if not 0.0 < self.crop_area[0] <= self.crop_area[1] <= 1.0:
            raise ValueError(f"crop_area must be a range within (0, 1], got {self.crop_area}")
        if self.augment.mixes and self.batch_size < 2:
            raise ValueError(
                "batch_size must be at least 2 for mixup and cutmix, which mix the images of a "
                f"batch, got {self.batch_size}"
            )

    @property
    def digest(self) -> str:
        """A name for the images and their labels, that of the index."""
        return self.index.digest

    @property
    def steps(self) -> int:
        """Steps per epoch, the same on all ranks."""
        return math.ceil(len(self.index) / (self.batch_size * self.world_size))

    def images(self, epoch: int, step: int) -> np.ndarray:
        """[N] int64 positions in the index of this rank's part of one step, both from 0."""
        order = _order(self.seed, epoch, len(self.index))
        first = (step * self.world_size + self.rank) * self.batch_size
        return order[np.arange(first, first + self.batch_size) % len(order)]

    def batch(self, epoch: int, step: int) -> TrainBatch:
        """This rank's part of one step, both counted from 0."""
        whole, own = self._part
        images = self.images(epoch, step)
        rng = self._generator(epoch, step)
        # The largest level's window, then flips, then other windows: the first two are the same for
        # any number of levels, so that trainings of one seed see the same pictures.
        draws = rng.random((1, whole, DRAWS))
        flips = rng.random((self.num_levels, whole))[:, own] < 0.5
        if self.crop == "multi":
            draws = np.concatenate([draws, rng.random((self.num_levels - 1, whole, DRAWS))])
        if self.flip != "independent":
            flips[:] = flips[0] & (self.flip == "shared")
        sizes = self.index.sizes[images]
        windows = np.stack([random_windows(part[own], sizes, self.crop_area) for part in draws])
        windows = np.broadcast_to(windows, (self.num_levels, self.batch_size, 4))
        operations = self._operations(epoch, step)
        return TrainBatch(images, windows, flips, self.crop == "single", operations)

    def blends(self, epoch: int, step: int) -> Blends | None:
        """How this rank's images of one step are mixed; None where none are."""
        if not self.augment.mixes:
            return None
        whole, own = self._part
        rng = self._generator(epoch, step, _MIXING)
        drawn = draw_blends(rng, whole, self.augment.mixup, self.augment.cutmix)
        return Blends(*(part[own] for part in drawn))

    def erasures(self, epoch: int, step: int) -> np.ndarray | None:
        """[N, 4] what is erased of this rank's images of one step; None where nothing is."""
        if not self.augment.random_erasing:
            return None
        whole, own = self._part
        rng = self._generator(epoch, step, _ERASING)
        return draw_erasures(rng, whole, self.augment.random_erasing)[own]

    def colour_shifts(self, epoch: int, step: int) -> np.ndarray | None:
        """[N, 3] what is added to this rank's images of one step; None where nothing is."""
        if not self.augment.lighting:
            return None
        whole, own = self._part
        rng = self._generator(epoch, step, _LIGHTING)
        return draw_colour_shifts(rng, whole, self.augment.lighting)[own]

    def _operations(self, epoch: int, step: int) -> Operations | None:
        if self.augment.rand_augment is None:
            return None
        whole, own = self._part
        rng = self._generator(epoch, step, _OPERATING)
        drawn = draw_operations(rng, whole, *self.augment.rand_augment)
        return Operations(drawn.numbers[own], drawn.amounts[own], drawn.magnitude)

    def _generator(self, epoch: int, step: int, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, 1 + step, *purpose))

    @property
    def _part(self) -> tuple[int, slice]:
        """The images of a whole step, and this rank's part of them.

        All is drawn for all ranks and then cut, so that the pictures do not depend on the split.
        """
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return self.batch_size * self.world_size, own


@dataclass(frozen=True, kw_only=True)
class ValPlan:
    """Validation batches of one rank: every image exactly once over all ranks, none repeated.

    Ranks may differ by one image, and the last batch may be smaller.

    Args:
        index: the images.
        resolutions: r of each level, in pixels.
        batch_size: N at most.
        rank, world_size: this rank gets every world_size-th image.
        crop: "center" resizes the shorter side to int(r / 0.875) and cuts the centre; "none"
            resizes the whole image to r x r.
    """

    index: ImageIndex
    resolutions: Sequence[int]
    batch_size: int
    rank: int = 0
    world_size: int = 1
    crop: str = "center"

    def __post_init__(self) -> None:
        _check_share(self.batch_size, self.rank, self.world_size)
        if not self.resolutions or min(self.resolutions) < 1:
            raise ValueError(
                f"resolutions must be positive and at least one, got {tuple(self.resolutions)}"
            )
        if self.crop not in VAL_CROPS:
            raise ValueError(f"val crop must be one of {VAL_CROPS}, got {self.crop!r}")

    @property
    def digest(self) -> str:
        """A name for the images and their labels, that of the index."""
        return self.index.digest

    @property
    def steps(self) -> int:
        """Batches of this rank; ranks may differ by one."""
        own = len(range(self.rank, len(self.index), self.world_size))
        return math.ceil(own / self.batch_size)

    def images(self, epoch: int, step: int) -> np.ndarray:
        """[N] int64 positions in the index of one step; the epoch plays no part."""
        own = np.arange(self.rank, len(self.index), self.world_size)
        return own[step * self.batch_size : (step + 1) * self.batch_size]

    def batch(self, epoch: int, step: int) -> ValBatch:
        """This rank's images of one step and where they are cut."""
        images = self.images(epoch, step)
        sizes = self.index.sizes[images].astype(np.int64)
        levels = [val_geometry(sizes, r, self.crop) for r in self.resolutions]
        resized, corners = (np.stack(part).astype(np.int32) for part in zip(*levels, strict=True))
        return ValBatch(images, resized, corners)


def _check_share(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 0)).permutation(count)
