"""Extents: arithmetic level by level, and questions that levels may answer differently."""

from __future__ import annotations

import math

import pytest

from rsfast.pyramid import Extent
from rsfast.pyramid.extent import extent_of, of_level


def test_arithmetic_is_level_by_level() -> None:
    height = Extent([224, 192, 96])
    assert (height // 32).values == (7, 6, 3)
    assert (2 * height - 1).values == (447, 383, 191)
    assert (height + Extent([1, 2, 3])).values == (225, 194, 99)
    assert math.ceil(height / 100).values == (3, 2, 1)
    assert (100 - height).values == (-124, -92, 4)
    assert (-height).values == (-224, -192, -96)
    assert (height % 64).values == (32, 0, 32)


def test_what_all_levels_have_is_a_number() -> None:
    assert extent_of([7, 7, 7]) == 7
    assert Extent([224, 192]) * 0 == 0
    # Padding of a "same" convolution with stride 2 and a kernel of 3, for even sizes.
    height = Extent([224, 192])
    assert (math.ceil(height / 2) - 1) * 2 + 3 - height == 1


def test_a_question_needs_one_answer() -> None:
    height = Extent([224, 96])
    assert height > 32
    assert height != 128
    assert max(height, 0) is height
    assert bool(height)
    for question in (lambda: height > 100, lambda: height == 96, lambda: bool(height - 96)):
        with pytest.raises(ValueError, match=r"levels, of \(.*\) pixels, answer differently"):
            question()


def test_an_extent_is_no_number() -> None:
    for use in (int, float, range):
        with pytest.raises(ValueError, match=r"needs one number where its levels have \(4, 3\)"):
            use(Extent([4, 3]))


def test_arguments_of_one_level() -> None:
    height, width = Extent([4, 3]), Extent([8, 6])
    assert of_level(((height, width), [1, height], "same", None), 1) == (
        (3, 6),
        [1, 3],
        "same",
        None,
    )
