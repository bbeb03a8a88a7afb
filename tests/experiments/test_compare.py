"""Spreads and paired tests: by hand, and how often the intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rsfast.experiments import compare
from rsfast.experiments.compare import (
    bootstrapped_difference,
    figures_of_counts,
    paired_difference,
    spread,
)
from rsfast.tasks.segmentation import class_counts, figures_of


def test_spread_by_hand() -> None:
    found = spread(np.array([50.0, 52.0, 54.0]))
    assert (found.seeds, found.mean, found.sd) == (3, 52.0, 2.0)
    assert math.isnan(spread(np.array([50.0])).sd)


def test_difference_by_hand() -> None:
    # Two seeds, four images: ours is right once more with the first, twice more with the second.
    ours = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=bool)
    theirs = np.array([[1, 1, 0, 0], [0, 1, 0, 1]], dtype=bool)
    found = paired_difference([ours], [theirs])
    assert found.mean == 37.5  # of 25 and 50 points
    reach = 12.706 * 12.5  # t of one degree of freedom at 97.5 %, times the standard error
    assert found.seeds_low == pytest.approx(37.5 - reach, abs=0.01)
    assert found.seeds_high == pytest.approx(37.5 + reach, abs=0.01)
    assert found.p == pytest.approx(0.2048, abs=1e-4)  # 2 (1/2 - atan(3) / pi)
    by_image = np.array([50.0, 0.0, 100.0, 0.0])
    reach = 1.95996 * by_image.std(ddof=1) / 2
    assert found.images_low == pytest.approx(37.5 - reach, abs=0.001)
    assert not found.is_decided


def test_resolutions_are_averaged_image_by_image() -> None:
    right, wrong = np.ones((3, 80), dtype=bool), np.zeros((3, 80), dtype=bool)
    right[0, 0] = False
    found = paired_difference([right, wrong], [wrong, wrong])
    assert found.mean == pytest.approx(50 * 239 / 240)
    assert found.is_decided


def test_one_seed_decides_nothing() -> None:
    right, wrong = np.ones((1, 8), dtype=bool), np.zeros((1, 8), dtype=bool)
    found = paired_difference([right], [wrong])
    assert found.mean == 100.0
    assert math.isnan(found.p)
    assert math.isnan(found.seeds_low)
    assert not found.is_decided


def test_seeds_that_differ_by_the_same_say_nothing_of_their_spread() -> None:
    theirs = np.eye(2, 8, dtype=bool)
    ours = theirs | np.eye(2, 8, k=2, dtype=bool)  # one image more, another one with each seed
    found = paired_difference([ours], [theirs])
    assert found.mean == 12.5
    assert math.isnan(found.p)
    assert not found.is_decided


def test_intervals_hold_nineteen_times_of_twenty() -> None:
    rng = np.random.default_rng(0)
    over_seeds = over_images = 0
    for _ in range(400):
        # Networks of seeds that differ by 3 points, images that are easy or hard for both methods.
        skill = rng.normal(0.05, 0.03, (4, 1))
        hard = rng.random((1, 500))
        theirs = rng.random((4, 500)) < hard
        ours = rng.random((4, 500)) < hard + skill
        found = paired_difference([ours], [theirs])
        # What both would have: the probability is cut at 1, uniformly hard images aside.
        truth = 100 * np.mean(
            np.minimum(1, np.linspace(0, 1, 2001) + 0.05) - np.linspace(0, 1, 2001)
        )
        over_seeds += found.seeds_low <= truth <= found.seeds_high
        fixed = 100 * np.mean(np.minimum(1, hard + skill) - hard)  # of these networks and images
        over_images += found.images_low <= fixed <= found.images_high
    assert 0.92 <= over_seeds / 400 <= 0.98
    assert over_images / 400 >= 0.93


def test_figures_of_counts_are_those_of_the_confusion_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randint(0, 50, (4, 6, 6), generator=generator)
    matrices[1, 2] = 0  # a class that is only predicted
    matrices[2, :, 3] = matrices[2, 3] = 0  # and one that is not there
    found = figures_of_counts(class_counts(matrices).numpy())
    expected = [figures_of(matrix) for matrix in matrices]
    assert pytest.approx(np.array(expected)) == found.T
    assert figures_of_counts(np.zeros((2, 3), dtype=int)).tolist() == [0.0, 0.0, 0.0]


def counts_of(rng: np.random.Generator, skill: np.ndarray, images: int) -> np.ndarray:
    """[S, n, 2, 3] of two classes; `skill` is the share of the pixels that are right, by seed."""
    pixels = rng.integers(20, 200, (images, 2))
    right = rng.binomial(pixels, skill[:, None, None])
    taken = right + (pixels - right)[..., ::-1]
    return np.stack([np.broadcast_to(pixels, right.shape), taken, right], axis=-1)


def test_a_bootstrap_is_that_of_images_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    levels = [
        [counts_of(np.random.default_rng(r), np.array(skill), 7) for r in (1, 2)]
        for skill in ([0.8, 0.9], [0.7, 0.8])
    ]
    monkeypatch.setattr(compare, "_RESAMPLES", 5)
    found = bootstrapped_difference(*levels)

    def difference(chosen: np.ndarray, seed: int) -> float:
        ious = [
            np.mean([figures_of_counts(part[seed, chosen].sum(0))[2] for part in method])
            for method in levels
        ]
        return float(ious[0] - ious[1])

    by_seed = [difference(np.arange(7), seed) for seed in (0, 1)]
    assert found.mean == pytest.approx(np.mean(by_seed))
    assert found.seeds == 2
    assert (found.seeds_low + found.seeds_high) / 2 == pytest.approx(found.mean)
    assert found.seeds_high - found.mean == pytest.approx(
        12.706 * abs(by_seed[0] - by_seed[1]) / 2, rel=1e-4
    )
    drawn = rng.integers(7, size=(5, 7))
    points = [np.mean([difference(chosen, seed) for seed in (0, 1)]) for chosen in drawn]
    assert found.images_low == pytest.approx(np.quantile(points, 0.025))
    assert found.images_high == pytest.approx(np.quantile(points, 0.975))


def test_a_bootstrap_is_the_same_however_many_resamples_are_held_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (counts_of(rng, np.array([share]), 10) for share in (0.8, 0.7))
    whole = bootstrapped_difference([ours], [theirs])
    assert math.isnan(whole.p)
    assert whole.images_low < whole.mean < whole.images_high
    monkeypatch.setattr(compare, "_MOST_WEIGHTS", 70)
    parts = bootstrapped_difference([ours], [theirs])
    assert (parts.mean, parts.images_low, parts.images_high) == pytest.approx(
        (whole.mean, whole.images_low, whole.images_high)
    )


def test_bootstrapped_intervals_hold_nineteen_times_of_twenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "_RESAMPLES", 400)
    rng = np.random.default_rng(0)

    def pair(images: int) -> tuple[np.ndarray, np.ndarray]:
        # Images of very different sizes, on which both methods are the better or worse together.
        pixels = rng.geometric(0.01, (images, 1)) * np.array([4, 1])
        hard = rng.random((images, 1))
        shares = (np.clip(hard + shift, 0, 1) for shift in (0.05, 0.0))
        methods = []
        for share in shares:
            right = rng.binomial(pixels, share)
            taken = right + (pixels - right)[:, ::-1]
            methods.append(np.stack([pixels, taken, right], axis=-1)[None])
        return methods[0], methods[1]

    large = [figures_of_counts(part[0].sum(0))[2] for part in pair(400_000)]
    truth = large[0] - large[1]
    held = 0
    for _ in range(300):
        found = bootstrapped_difference(*([part] for part in pair(60)))
        held += found.images_low <= truth <= found.images_high
    assert 0.90 <= held / 300 <= 0.98
