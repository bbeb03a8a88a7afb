"""How masks are resized and read: the rule in integers, and what a mask must be."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsfast.data import open_pairs
from rsfast.data.masks import decode_mask, nearest

WINDOWS = {
    "whole": (0, 0, 40, 56),
    "part": (3, 11, 17, 25),
    "pixel": (39, 55, 1, 1),
    "around": (-13, -20, 70, 97),
    "above_and_left": (-40, -56, 80, 112),
    "below_and_right": (0, 0, 80, 112),
}


def by_definition(
    mask: np.ndarray, window: tuple[int, int, int, int], resolution: int, flip: bool, fill: int
) -> np.ndarray:
    """Pixel by pixel, in exact fractions."""
    top, left, height, width = window
    result = np.full((resolution, resolution), fill, dtype=np.uint8)
    for i in range(resolution):
        row = top + math.floor((i + Fraction(1, 2)) * height / resolution)
        for j in range(resolution):
            from_left = resolution - 1 - j if flip else j
            column = left + math.floor((from_left + Fraction(1, 2)) * width / resolution)
            if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]:
                result[i, j] = mask[row, column]
    return result


@pytest.mark.parametrize("flip", [False, True], ids=["upright", "mirrored"])
@pytest.mark.parametrize("resolution", [1, 13, 32, 56])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_pixel_takes_the_label_in_which_its_centre_lies(
    window: tuple[int, int, int, int], resolution: int, flip: bool
) -> None:
    mask = np.random.default_rng(0).integers(0, 256, (40, 56), dtype=np.uint8)
    found = nearest(mask, window, resolution, flip=flip, fill=77)
    assert (found == by_definition(mask, window, resolution, flip, 77)).all()


@pytest.mark.parametrize("resolution", [7, 32, 100])
def test_the_rule_is_pillows_nearest_neighbour(resolution: int) -> None:
    mask = np.random.default_rng(1).integers(0, 256, (40, 56), dtype=np.uint8)
    size = (resolution, resolution)
    expected = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST, box=(11, 3, 36, 20))
    found = nearest(mask, (3, 11, 17, 25), resolution, flip=False, fill=0)
    assert (found == np.asarray(expected)).all()


def test_a_mask_is_read_as_it_is(pair_root: Path) -> None:
    pairs = open_pairs(pair_root, "train")
    for position in range(len(pairs.masks)):
        stored = np.asarray(Image.open(pairs.masks.path(position)))
        assert (decode_mask(pairs.images, pairs.masks, position) == stored).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), "cannot decode mask {mask}: "),
        (lambda file: Image.new("P", (9, 9)).save(file), "cannot decode mask {mask}: its pixels"),
        (lambda file: Image.new("L", (9, 8)).save(file), "{mask} has changed since"),
        (lambda file: file.unlink(), "{mask} is gone"),
    ],
    ids=["cut_off", "palette", "another_size", "gone"],
)
def test_a_mask_that_changes_under_way_is_named(pairs: Path, cache: Path, change, said) -> None:
    found = open_pairs(pairs, "train")
    mask = found.masks.path(2)
    change(Path(mask))
    with pytest.raises(RuntimeError) as raised:
        decode_mask(found.images, found.masks, 2)
    assert str(raised.value).startswith(said.format(mask=mask))
    if "cannot decode" in said:
        assert f"python -m rsfast.data exclude {pairs} {found.images.path(2)}" in str(raised.value)


def test_the_digest_tells_other_pixels_of_a_mask_and_not_how_they_are_stored(
    pairs: Path, cache: Path
) -> None:
    before = open_pairs(pairs, "train")
    file = Path(before.masks.path(1))
    labels = np.array(Image.open(file))
    Image.fromarray(labels).save(file, compress_level=0)
    assert open_pairs(pairs, "train").digest == before.digest
    Image.fromarray(labels[::-1]).save(file)  # as many pixels of each label
    after = open_pairs(pairs, "train")
    assert after.images.digest == before.images.digest
    assert after.digest != before.digest
    others = np.array([0, 2, 3])
    assert after.take(others).digest == before.take(others).digest != after.digest
    Image.fromarray(labels).save(file)
    assert open_pairs(pairs, "train").digest == before.digest
