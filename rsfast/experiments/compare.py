"""Means, spreads and paired tests of accuracies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["Difference", "Spread", "paired_difference", "spread"]

_LEVEL = 0.95  # of all intervals

Hits = NDArray[np.bool_]  # [S, n]: of each seed and image, whether it was right


@dataclass(frozen=True, slots=True)
class Spread:
    """Accuracy over seeds.

    Attributes:
        seeds: how many.
        mean: in percent.
        sd: standard deviation over the seeds; NaN for one.
    """

    seeds: int
    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Accuracy of one method less that of another, on the same seeds and images, in points.

    The two intervals answer two questions: would other seeds say the same, on these images (paired
    t-test over seeds); would other images, of these networks (normal approximation over images)?

    Attributes:
        seeds: how many pairs of networks.
        mean: in points.
        seeds_low, seeds_high: 95 % interval over the seeds; NaN for one seed, and where all seeds
            differ by the same, which says nothing about their spread.
        p: of the paired t-test over the seeds; NaN likewise.
        images_low, images_high: 95 % interval over the images.
    """

    seeds: int
    mean: float
    seeds_low: float
    seeds_high: float
    p: float
    images_low: float
    images_high: float

    @property
    def is_decided(self) -> bool:
        """Whether both intervals leave out zero."""
        over_seeds = self.seeds_low > 0 or self.seeds_high < 0
        over_images = self.images_low > 0 or self.images_high < 0
        return over_seeds and over_images


def spread(accuracies: NDArray[np.floating]) -> Spread:
    """Mean and standard deviation of [S] percentages."""
    sd = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else math.nan
    return Spread(len(accuracies), float(np.mean(accuracies)), sd)


def paired_difference(ours: list[Hits], theirs: list[Hits]) -> Difference:
    """Compares two methods on the same seeds and images.

    Args:
        ours, theirs: of each resolution, [S, n]; the difference is that of the mean over the
            resolutions.
    """
    pairs = zip(ours, theirs, strict=True)
    points = 100.0 * np.mean([a.astype(float) - b.astype(float) for a, b in pairs], axis=0)
    by_seed, by_image = points.mean(axis=1), points.mean(axis=0)
    seeds, images = points.shape
    mean = float(points.mean())
    low = high = p = math.nan
    if seeds > 1 and np.ptp(by_seed) > 0:
        test = stats.ttest_1samp(by_seed, 0.0)
        interval = test.confidence_interval(_LEVEL)
        low, high, p = float(interval.low), float(interval.high), float(test.pvalue)
    reach = stats.norm.ppf((1 + _LEVEL) / 2) * float(np.std(by_image, ddof=1)) / math.sqrt(images)
    return Difference(seeds, mean, low, high, p, mean - reach, mean + reach)
