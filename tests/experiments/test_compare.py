"""Spreads and paired tests: by hand, and how often the intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rsfast.experiments.compare import paired_difference, spread


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
