"""Which images, windows and flips a step has: order, ranks, statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plan_helpers import index_of
from rsfast.data.plan import DRAWS, TrainBatch, TrainPlan, ValPlan, random_windows

EVERY_MODE = pytest.mark.parametrize(
    ("crop", "flip"),
    [(crop, flip) for crop in ("single", "multi") for flip in ("shared", "independent", "none")],
)
LOG_RATIO = math.log(4 / 3)


def train_plan(count: int = 40, **arguments) -> TrainPlan:
    return TrainPlan(index=index_of(count), **{"num_levels": 3, "batch_size": 8, **arguments})


def epoch_images(plan: TrainPlan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.batch(epoch, step).images for step in range(plan.steps)])


def assert_same(ours: TrainBatch, other: TrainBatch) -> None:
    assert ours.shared_window == other.shared_window
    for name in ("images", "windows", "flips"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(other, name), err_msg=name)


def window_by_the_book(
    draws: np.ndarray, height: int, width: int, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params of torchvision, one image at a time; top, left, height, width.

    Takes its ten pairs of draws and the two of the position from `draws` instead of a generator.
    """
    for share, ratio in zip(draws[:10], draws[10:20], strict=True):
        pixels = (area[0] + (area[1] - area[0]) * share) * height * width
        aspect = math.exp(-LOG_RATIO + 2 * LOG_RATIO * ratio)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def test_windows_are_those_of_random_resized_crop() -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, math.log(3000), (3000, 2))).astype(np.int32)
    draws = rng.random((len(sizes), DRAWS))
    for area in ((0.08, 1.0), (0.5, 0.6), (1.0, 1.0)):
        expected = [
            window_by_the_book(own, height, width, area)
            for own, (height, width) in zip(draws, sizes.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(random_windows(draws, sizes, area), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 5000), (3, 4), (65500, 2)], ids=str)
def test_windows_of_odd_images_hold_a_pixel_and_lie_inside(size: tuple[int, int]) -> None:
    draws = np.random.default_rng(0).random((500, DRAWS))
    windows = random_windows(draws, np.tile(np.array(size, np.int32), (500, 1)), (0.08, 1.0))
    assert windows.dtype == np.int32
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2:] >= 1).all()
    assert (windows[:, :2] + windows[:, 2:] <= size).all()


@pytest.mark.parametrize("edge", [0.0, np.nextafter(1.0, 0.0)], ids=["smallest", "largest"])
def test_the_ends_of_the_draws_stay_inside(edge: float) -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, (500, 2), dtype=np.int32)
    draws = np.full((500, DRAWS), 0.5)
    draws[:, :10] = 0.3
    draws[:, -2:] = edge
    windows = random_windows(draws, sizes, (0.08, 1.0))
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, :2] + windows[:, 2:] <= sizes).all()


def test_areas_and_ratios_are_in_range_and_every_position_is_used() -> None:
    size = np.array([[400, 500]], np.int32)
    draws = np.random.default_rng(0).random((20_000, DRAWS))
    top, left, height, width = random_windows(draws, size.repeat(20_000, 0), (0.2, 0.5)).T
    # Half a pixel of rounding on sides of at least 173 pixels.
    for values, low, high in (
        (height * width / (400 * 500), 0.2, 0.5),
        (width / height, 3 / 4, 4 / 3),
    ):
        assert low * 0.99 <= values.min() < low * 1.02
        assert high * 0.98 < values.max() <= high * 1.01
    for start, extent, side in ((top, height, 400), (left, width, 500)):
        assert start.min() == 0
        assert (start + extent).max() == side


def test_areas_are_uniform_and_ratios_log_uniform_where_every_try_fits() -> None:
    count = 20_000
    draws = np.random.default_rng(0).random((count, DRAWS))
    sizes = np.full((count, 2), 4000, np.int32)
    _, _, height, width = random_windows(draws, sizes, (0.08, 0.7)).T.astype(np.float64)
    shares = (height * width / 4000**2 - 0.08) / (0.7 - 0.08)
    ratios = (np.log(width / height) + LOG_RATIO) / (2 * LOG_RATIO)
    bound = 1.95 / math.sqrt(count)  # Kolmogorov, 0.1 %
    for uniform in (np.sort(shares), np.sort(ratios)):
        assert np.abs(uniform - (np.arange(count) + 0.5) / count).max() < bound


def test_the_mean_area_of_a_square_image_is_054_less_what_does_not_fit() -> None:
    # A try of area a fits when a <= exp(-|log ratio|), so the mean is not that of U[0.08, 1] but
    # E[(exp(-2u) - 0.08^2) / 2] / E[exp(-u) - 0.08] with u uniform in [0, log(4/3)]: 0.4777.
    draws = np.random.default_rng(0).random((20_000, DRAWS))
    sizes = np.full((20_000, 2), 4000, np.int32)
    _, _, height, width = random_windows(draws, sizes, (0.08, 1.0)).T.astype(np.float64)
    shares = height * width / 4000**2
    assert shares.mean() == pytest.approx(0.4777, abs=4 * shares.std() / math.sqrt(20_000))


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((1000, 10), (493, 0, 13, 10)),
        ((10, 1000), (0, 493, 10, 13)),
        ((3000, 1), (1499, 0, 1, 1)),
        ((7, 2000), (0, 995, 7, 9)),
    ],
    ids=str,
)
def test_an_extreme_image_gets_the_largest_centred_window_of_legal_ratio(
    size: tuple[int, int], window: tuple[int, int, int, int]
) -> None:
    draws = np.random.default_rng(0).random((50, DRAWS))
    windows = random_windows(draws, np.tile(np.array(size, np.int32), (50, 1)), (0.08, 1.0))
    assert {tuple(found) for found in windows.tolist()} == {window}


@EVERY_MODE
def test_a_batch_is_a_pure_function_of_seed_epoch_and_step(crop: str, flip: str) -> None:
    plan = train_plan(seed=3, crop=crop, flip=flip)
    steps = [(epoch, step) for epoch in range(3) for step in range(plan.steps)]
    first = {at: plan.batch(*at) for at in steps}
    np.random.seed(1)  # the global generator plays no part
    again = train_plan(seed=3, crop=crop, flip=flip)
    for at in reversed(steps):
        assert_same(again.batch(*at), first[at])
        assert_same(plan.batch(*at), first[at])


def test_writing_to_a_batch_does_not_change_the_next_one() -> None:
    plan = train_plan()
    expected = plan.batch(0, 0).images.copy()
    plan.batch(0, 0).images[:] = -1
    np.testing.assert_array_equal(plan.batch(0, 0).images, expected)


@EVERY_MODE
def test_a_batch_has_the_documented_shapes_and_types(crop: str, flip: str) -> None:
    batch = train_plan(crop=crop, flip=flip, batch_size=5, num_levels=4).batch(0, 1)
    assert (batch.images.shape, batch.images.dtype) == ((5,), np.int64)
    assert (batch.windows.shape, batch.windows.dtype) == ((4, 5, 4), np.int32)
    assert (batch.flips.shape, batch.flips.dtype) == ((4, 5), bool)
    assert batch.shared_window == (crop == "single")


@pytest.mark.parametrize("what", ["seed", "epoch", "step"])
def test_another_seed_epoch_or_step_has_other_images_windows_and_flips(what: str) -> None:
    at = {"seed": 0, "epoch": 0, "step": 0}
    here, there = at, {**at, what: 1}
    one, other = (
        train_plan(count=400, batch_size=64, seed=at["seed"]).batch(at["epoch"], at["step"])
        for at in (here, there)
    )
    for name in ("images", "windows", "flips"):
        assert not np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size", "steps"),
    [(40, 8, 1, 5), (40, 4, 5, 2), (41, 8, 1, 6), (39, 4, 2, 5), (3, 8, 1, 1), (5, 4, 4, 1)],
    ids=lambda value: str(value),
)
def test_an_epoch_visits_every_image_and_fills_up_from_its_own_head(
    count: int, batch_size: int, world_size: int, steps: int
) -> None:
    plans = [
        train_plan(count, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {plan.steps for plan in plans} == {steps}
    for epoch in range(3):
        batches = [plan.batch(epoch, step).images for step in range(steps) for plan in plans]
        assert {len(batch) for batch in batches} == {batch_size}
        images = np.concatenate(batches)
        assert sorted(images[:count].tolist()) == list(range(count))
        np.testing.assert_array_equal(
            images[count:], np.resize(images[:count], len(images))[count:]
        )


def test_every_epoch_has_another_order() -> None:
    orders = {tuple(epoch_images(train_plan(), epoch).tolist()) for epoch in range(20)}
    assert len(orders) == 20
    assert tuple(range(40)) not in orders


@EVERY_MODE
def test_two_ranks_share_the_step_of_one_rank_with_twice_the_batch(crop: str, flip: str) -> None:
    whole = train_plan(batch_size=8, crop=crop, flip=flip)
    ranks = [
        train_plan(batch_size=4, crop=crop, flip=flip, rank=rank, world_size=2) for rank in (0, 1)
    ]
    for epoch, step in ((0, 0), (0, 4), (2, 1)):
        first, second = (plan.batch(epoch, step) for plan in ranks)
        assert not set(first.images.tolist()) & set(second.images.tolist())
        joined = TrainBatch(
            images=np.concatenate([first.images, second.images]),
            windows=np.concatenate([first.windows, second.windows], axis=1),
            flips=np.concatenate([first.flips, second.flips], axis=1),
            shared_window=first.shared_window,
        )
        assert_same(joined, whole.batch(epoch, step))


@EVERY_MODE
def test_windows_lie_inside_their_own_image(crop: str, flip: str) -> None:
    plan = train_plan(count=300, batch_size=100, crop=crop, flip=flip)
    for step in range(plan.steps):
        batch = plan.batch(0, step)
        sizes = plan.index.sizes[batch.images]
        assert (batch.windows[..., :2] >= 0).all()
        assert (batch.windows[..., 2:] >= 1).all()
        assert (batch.windows[..., :2] + batch.windows[..., 2:] <= sizes).all()


@EVERY_MODE
def test_a_single_crop_is_one_window_for_all_levels_and_multi_one_for_each(
    crop: str, flip: str
) -> None:
    plan = train_plan(count=64, batch_size=64, crop=crop, flip=flip)
    batch = plan.batch(0, 0)
    assert len({tuple(window) for window in batch.windows[0].tolist()}) == 64
    sizes = plan.index.sizes[batch.images]
    narrow = sizes.max(axis=1) > 4 * sizes.min(axis=1)  # there, most tries end in the same window
    for one, other in ((0, 1), (0, 2), (1, 2)):
        differ = (batch.windows[one] != batch.windows[other]).any(axis=1)
        assert (differ[~narrow] == (crop == "multi")).all()


@EVERY_MODE
def test_flips_are_shared_by_the_levels_or_independent_or_absent(crop: str, flip: str) -> None:
    flips = train_plan(count=400, batch_size=400, crop=crop, flip=flip).batch(0, 0).flips
    half = pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(400))
    for level in flips:
        assert level.mean() == (0 if flip == "none" else half)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (flips[one] == flips[other]).mean() == (half if flip == "independent" else 1)


def test_crop_area_bounds_the_windows_of_a_plan() -> None:
    plan = train_plan(count=200, batch_size=200, crop_area=(0.25, 0.3))
    batch = plan.batch(0, 0)
    height, width = plan.index.sizes[batch.images].T
    shares = batch.windows[0, :, 2] * batch.windows[0, :, 3] / (height * width)
    ordinary = np.abs(np.log(height / width)) < math.log(2)  # the others may need the fallback
    assert ordinary.sum() > 100
    assert 0.24 < shares[ordinary].min() < shares[ordinary].max() < 0.31


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("batch_size", 0, "at least 1"),
        ("batch_size", -3, "at least 1"),
        ("crop", "double", "one of .*single.*multi"),
        ("flip", "vertical", "one of .*shared.*independent.*none"),
        ("crop_area", (0.0, 1.0), "range"),
        ("crop_area", (0.5, 0.4), "range"),
        ("crop_area", (0.5, 1.1), "range"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_bad_argument_is_named_with_its_rule_and_value(
    argument: str, value: object, rule: str
) -> None:
    with pytest.raises(ValueError, match=rf"{argument} must be .*{rule}") as caught:
        train_plan(**{argument: value})
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("plan", [TrainPlan, ValPlan])
@pytest.mark.parametrize(
    ("rank", "world_size", "culprit"),
    [(2, 2, "rank"), (-1, 2, "rank"), (0, 0, "world_size")],
    ids=["rank_too_large", "negative_rank", "no_ranks"],
)
def test_a_rank_outside_the_world_is_rejected(
    plan: type, rank: int, world_size: int, culprit: str
) -> None:
    with pytest.raises(ValueError, match=culprit):
        plan(
            index=index_of(4),
            batch_size=2,
            rank=rank,
            world_size=world_size,
            **{"num_levels": 1} if plan is TrainPlan else {"resolutions": (32,)},
        )


def test_one_window_and_one_flip_are_the_same_for_any_number_of_levels() -> None:
    one, five = (train_plan(num_levels=levels).batch(1, 2) for levels in (1, 5))
    for level in range(5):
        np.testing.assert_array_equal(five.windows[level], one.windows[0])
        np.testing.assert_array_equal(five.flips[level], one.flips[0])
    many = train_plan(num_levels=5, crop="multi").batch(1, 2)
    np.testing.assert_array_equal(many.windows[0], one.windows[0])
    np.testing.assert_array_equal(many.flips, five.flips)
    assert (many.windows[1] != many.windows[0]).any()
