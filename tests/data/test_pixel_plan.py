"""The windows of segmentation, and that they depend on seed, epoch and step alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rsfast.data import open_pairs
from rsfast.data.augment import Augment
from rsfast.data.pixel_plan import PixelTrainPlan, PixelValPlan, border_of, scaled_windows

SIZES = np.array([[360, 480], [100, 51], [7, 9]], dtype=np.int32)


def plan(root: Path, **changes) -> PixelTrainPlan:
    pairs = open_pairs(root, "train")
    settings = {"num_levels": 3, "batch_size": 4, "resolution": 48, "seed": 3, **changes}
    return PixelTrainPlan(index=pairs.images, masks=pairs.masks, **settings)


def windows(scale: tuple[float, float], count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Of images of 360 x 480 pixels, and the sizes of these."""
    sizes = np.broadcast_to(SIZES[:1], (count, 2))
    draws = np.random.default_rng(0).random((count, 3))
    return scaled_windows(draws, sizes, scale), sizes


def test_scale_one_is_the_whole_image() -> None:
    draws = np.random.default_rng(0).random((3, 3))
    found = scaled_windows(draws, SIZES, (1.0, 1.0))
    assert found.tolist() == [[0, 0, height, width] for height, width in SIZES.tolist()]


@pytest.mark.parametrize("scale", [0.5, 2.0, 1.3])
def test_a_window_has_the_ratio_of_the_image_and_its_sides_divided_by_the_scale(
    scale: float,
) -> None:
    draws = np.random.default_rng(0).random((3, 3))
    found = scaled_windows(draws, SIZES, (scale, scale))
    assert found[:, 2:].tolist() == np.rint(SIZES / scale).astype(int).tolist()


def test_a_small_window_lies_in_the_image_and_a_large_one_holds_it() -> None:
    for scale, is_within in (((1.2, 2.0), True), ((0.5, 0.9), False)):
        found, sizes = windows(scale)
        start, end = found[:, :2], found[:, :2] + found[:, 2:]
        inside, around = (start >= 0) & (end <= sizes), (start <= 0) & (end >= sizes)
        assert (inside if is_within else around).all()


def test_windows_are_placed_everywhere_and_scales_are_log_uniform() -> None:
    found, sizes = windows((0.5, 2.0))
    scales = sizes[:, 1] / found[:, 3]
    assert 0.49 < scales.min() < 0.51
    assert 1.97 < scales.max() < 2.03
    assert abs(np.mean(np.log2(scales))) < 0.03
    assert abs(np.mean(scales < 2**-0.5) - 0.25) < 0.03
    for side in (0, 1):
        room = sizes[:, side] - found[:, 2 + side]
        wide = np.abs(room) > 50
        place = found[wide, side] / room[wide]
        assert abs(place.mean() - 0.5) < 0.02
        assert place.min() < 0.01
        assert place.max() > 0.99


def test_a_window_is_never_empty() -> None:
    draws = np.random.default_rng(0).random((50, 3))
    found = scaled_windows(draws, np.ones((50, 2), dtype=np.int32), (2.0, 4.0))
    assert (found == [0, 0, 1, 1]).all()


def test_all_levels_share_window_and_flip(pair_root: Path) -> None:
    batch = plan(pair_root).batch(0, 0)
    assert batch.windows.shape == (3, 4, 4)
    assert batch.flips.shape == (3, 4)
    assert (batch.windows == batch.windows[0]).all()
    assert (batch.flips == batch.flips[0]).all()
    assert batch.shared_window
    assert not plan(pair_root, flip="none").batch(0, 0).flips.any()


def test_half_of_the_images_are_mirrored(pair_root: Path) -> None:
    one = plan(pair_root)
    flips = np.concatenate([one.batch(epoch, 0).flips[0] for epoch in range(250)])
    assert abs(flips.mean() - 0.5) < 0.05


def test_windows_depend_neither_on_ranks_nor_on_levels_nor_on_what_was_asked_before(
    pair_root: Path,
) -> None:
    whole = plan(pair_root, batch_size=6).batch(4, 1)
    parts = [
        plan(pair_root, batch_size=2, rank=rank, world_size=3, num_levels=1).batch(4, 1)
        for rank in range(3)
    ]
    for name in ("windows", "flips"):
        joined = np.concatenate([getattr(part, name)[0] for part in parts])
        assert (joined == getattr(whole, name)[0]).all()
    assert np.concatenate([part.images for part in parts]).tolist() == whole.images.tolist()


def test_seed_epoch_and_step_change_the_windows(pair_root: Path) -> None:
    one = plan(pair_root).batch(0, 0).windows
    for other in (
        plan(pair_root, seed=4).batch(0, 0),
        plan(pair_root).batch(1, 0),
        plan(pair_root).batch(0, 1),
    ):
        assert (one != other.windows).any()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"scale": (0.01, 1.0)}, r"^scale must be a range within 0.1 to 10.0, .* \(0.01, 1.0\)$"),
        ({"scale": (2.0, 1.0)}, r"^scale must be a range within 0.1 to 10.0, .* \(2.0, 1.0\)$"),
        ({"scale": (0.5, np.inf)}, r"^scale must be a range within 0.1 to 10.0, .* \(0.5, inf\)$"),
        ({"crop": "multi"}, r"^crop must be one of \('single',\) for segmentation, .*got 'multi'$"),
        ({"flip": "independent"}, r"^flip must be one of \('shared', 'none'\) for segmentation"),
        ({"augment": Augment(mixup=0.2)}, r"^augment must change nothing for segmentation"),
        ({"batch_size": 0}, r"^batch_size must be at least 1, got 0$"),
    ],
)
def test_what_segmentation_cannot_do_is_refused(pair_root: Path, change: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        plan(pair_root, **change)


def test_validation_squashes_whole_images(pair_root: Path) -> None:
    pairs = open_pairs(pair_root, "val")
    settings = {"resolutions": (48, 32), "batch_size": 3}
    one = PixelValPlan(index=pairs.images, masks=pairs.masks, **settings)
    batch = one.batch(0, 0)
    assert batch.resized.tolist() == [[[r, r]] * 3 for r in (48, 32)]
    assert not batch.corners.any()
    ranks = [dataclasses.replace(one, rank=rank, world_size=2) for rank in (0, 1)]
    seen = [p for rank in ranks for step in range(rank.steps) for p in rank.images(0, step)]
    assert sorted(seen) == list(range(7))


def test_the_border_is_made_of_bytes_whatever_the_mean() -> None:
    assert border_of((0.485, 0.456, 0.406)) == (124, 116, 104)
    assert border_of((-0.5, 0.2, 1.5)) == (0, 51, 255)
