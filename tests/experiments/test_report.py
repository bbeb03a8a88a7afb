"""What a report says of its numbers."""

from __future__ import annotations

import math

import pytest

from rsfast.experiments.compare import Difference
from rsfast.experiments.report import reading


def difference(mean: float, reach: float, images: float = 0.1) -> Difference:
    over_seeds = mean - reach, mean + reach
    return Difference(3, mean, *over_seeds, 0.01, mean - images, mean + images)


@pytest.mark.parametrize(
    ("found", "paper", "expected"),
    [
        (difference(2.0, 1.0), 1.5, "reproduced"),
        (difference(-2.0, 1.0), 1.5, "not reproduced"),
        (difference(2.0, 3.0), 1.5, "not decided"),
        (difference(2.0, 1.0, images=3.0), 1.5, "not decided"),
        (difference(2.0, 1.0), None, "higher"),
        (difference(-2.0, 1.0), 0.0, "lower"),
        (Difference(1, 2.0, math.nan, math.nan, math.nan, 1.0, 3.0), 1.5, "not decided"),
    ],
)
def test_reading_follows_both_intervals_and_the_papers_sign(
    found: Difference, paper: float | None, expected: str
) -> None:
    assert reading(found, paper) == expected
