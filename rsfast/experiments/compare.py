"""Means, spreads and paired tests of accuracies and of mean IoU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "Difference",
    "Spread",
    "bootstrapped_difference",
    "figures_of_counts",
    "paired_difference",
    "spread",
]

_LEVEL = 0.95  # of all intervals
_RESAMPLES = 2000
_MOST_WEIGHTS = 2**22  # of images in resamples, held at a time: 32 MiB

Hits = NDArray[np.bool_]  # [S, n]: of each seed and image, whether it was right
Counts = NDArray[np.int64]  # [S, n, K, 3]: pixels of a class, taken for it, and both


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
    t-test over seeds); would other images, of these networks (normal approximation over images, or
    bootstrap of what is no mean over images)?

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
    mean = float(points.mean())
    deviation = float(np.std(by_image, ddof=1)) / math.sqrt(len(by_image))
    reach = stats.norm.ppf((1 + _LEVEL) / 2) * deviation
    return Difference(len(by_seed), mean, *_over_seeds(by_seed), mean - reach, mean + reach)


def bootstrapped_difference(ours: list[Counts], theirs: list[Counts]) -> Difference:
    """Compares the mean IoU of two methods on the same seeds and images.

    Mean IoU is no mean over images, but a ratio of sums over them. So the images are drawn anew,
    with replacement, and the same ones for both methods, all seeds and all resolutions: the counts
    of those drawn are added up, and the interval is that of the percentiles of what comes out.

    Args:
        ours, theirs: of each resolution, [S, n, K, 3]; the difference is that of the mean over the
            resolutions.
    """
    pairs = list(zip(ours, theirs, strict=True))
    by_seed = np.mean([_iou(a.sum(1)) - _iou(b.sum(1)) for a, b in pairs], axis=0)
    found = []
    for weights in _resamples(ours[0].shape[1]):
        parts = [_resampled(weights, a) - _resampled(weights, b) for a, b in pairs]
        found.append(np.mean(parts, axis=0))
    tails = (1 - _LEVEL) / 2, (1 + _LEVEL) / 2
    low, high = map(float, np.quantile(np.concatenate(found), tails))
    return Difference(len(by_seed), float(by_seed.mean()), *_over_seeds(by_seed), low, high)


def figures_of_counts(counts: NDArray[np.integer | np.floating]) -> NDArray[np.float64]:
    """[3, ...] pixel accuracy, mean accuracy and mean IoU in percent of [..., K, 3] counts.

    A class without a pixel does not count in mean accuracy, and in mean IoU only if it was
    predicted. Figures of nothing at all are 0.
    """
    labelled, predicted, right = np.moveaxis(counts, -1, 0)
    pixel = right.sum(-1) / np.maximum(labelled.sum(-1), 1)
    pairs = (right, labelled), (right, labelled + predicted - right)
    return 100.0 * np.stack([pixel, *(_mean_ratio(*pair) for pair in pairs)])


def _mean_ratio(parts: NDArray[Any], wholes: NDArray[Any]) -> NDArray[np.float64]:
    """[...] mean of the ratios [..., K] that there are."""
    ratios = parts / np.maximum(wholes, 1)  # of nothing 0, which adds nothing
    return ratios.sum(-1) / np.maximum((wholes > 0).sum(-1), 1)


def _iou(counts: NDArray[Any]) -> NDArray[np.float64]:
    return figures_of_counts(counts)[2]


def _resamples(images: int) -> Iterator[NDArray[np.float64]]:
    """[part, n] how often each image is drawn, in all resamples, some at a time."""
    rng = np.random.default_rng(0)
    left = _RESAMPLES
    while left:
        part = min(left, max(1, _MOST_WEIGHTS // images))
        drawn = rng.integers(images, size=(part, images)) + images * np.arange(part)[:, None]
        yield np.bincount(drawn.ravel(), minlength=part * images).reshape(part, -1).astype(float)
        left -= part


def _resampled(weights: NDArray[np.float64], counts: Counts) -> NDArray[np.float64]:
    """[part] mean IoU of the resamples, averaged over the seeds of [S, n, K, 3] counts."""
    sums = (weights @ of_seed.reshape(len(of_seed), -1).astype(float) for of_seed in counts)
    shape = len(weights), *counts.shape[2:]
    return np.mean([_iou(each.reshape(shape)) for each in sums], axis=0)


def _over_seeds(by_seed: NDArray[np.floating]) -> tuple[float, float, float]:
    """Ends of the interval, and p, of the differences of [S] seeds; NaN if they say nothing."""
    if len(by_seed) < 2 or np.ptp(by_seed) == 0:
        return math.nan, math.nan, math.nan
    test = stats.ttest_1samp(by_seed, 0.0)
    interval = test.confidence_interval(_LEVEL)
    return float(interval.low), float(interval.high), float(test.pvalue)
