"""Which images a step of validation has, and how they are resized and cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from plan_helpers import index_of
from rsfast.data.plan import ValPlan


def val_plan(count: int = 40, **arguments) -> ValPlan:
    arguments = {"resolutions": (224, 96), "batch_size": 8, **arguments}
    return ValPlan(index=index_of(count), **arguments)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 7, 24, 25])
def test_ranks_together_validate_every_image_once(
    count: int, batch_size: int, world_size: int
) -> None:
    seen, per_rank = [], []
    for rank in range(world_size):
        plan = val_plan(count, batch_size=batch_size, rank=rank, world_size=world_size)
        batches = [plan.batch(0, step).images for step in range(plan.steps)]
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        per_rank.append(sum(len(batch) for batch in batches))
        seen += [image for batch in batches for image in batch.tolist()]
    assert sorted(seen) == list(range(count))
    assert max(per_rank) - min(per_rank) <= 1


def test_validation_is_the_same_in_every_epoch() -> None:
    plan = val_plan()
    for step in range(plan.steps):
        first, later = plan.batch(0, step), plan.batch(7, step)
        for field in dataclasses.fields(first):
            np.testing.assert_array_equal(getattr(first, field.name), getattr(later, field.name))


SPEC_SIZES = {224: 256, 192: 219, 160: 182, 128: 146, 96: 109}
IMAGE_SIZES = (
    (375, 500),
    (500, 375),
    (333, 500),
    (256, 257),
    (224, 224),
    (97, 1000),
    (4288, 2848),
    (1, 1),
)


def test_the_shorter_side_is_resized_as_published_and_the_centre_cut_out() -> None:
    sizes = np.array(IMAGE_SIZES, np.int32)
    index = dataclasses.replace(index_of(len(sizes)), sizes=sizes)
    plan = ValPlan(index=index, resolutions=tuple(SPEC_SIZES), batch_size=len(sizes))
    batch = plan.batch(0, 0)
    assert batch.resized.dtype == np.int32
    assert batch.corners.dtype == np.int32
    for level, (r, shorter) in enumerate(SPEC_SIZES.items()):
        for n, (height, width) in enumerate(IMAGE_SIZES):
            if height <= width:
                resized = [shorter, int(shorter * width / height)]
            else:
                resized = [int(shorter * height / width), shorter]
            assert batch.resized[level, n].tolist() == resized
            corner = [round((side - r) / 2) for side in resized]
            assert batch.corners[level, n].tolist() == corner
            assert all(0 <= at <= side - r for at, side in zip(corner, resized, strict=True))


@pytest.mark.parametrize("resolution", [32, 49, 64, 112, 288, 448])
def test_other_resolutions_keep_seven_eighths_of_the_shorter_side(resolution: int) -> None:
    batch = val_plan(resolutions=(resolution,)).batch(0, 0)
    shorter = batch.resized[0].min(axis=1)
    assert shorter.tolist() == [int(resolution / 0.875)] * 8


def test_crop_none_resizes_the_whole_image() -> None:
    batch = val_plan(crop="none", resolutions=(224, 96)).batch(0, 0)
    assert batch.resized.tolist() == [[[224, 224]] * 8, [[96, 96]] * 8]
    assert not batch.corners.any()


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [("batch_size", 0, "at least 1"), ("crop", "corner", "one of .*center.*none")],
)
def test_a_bad_argument_is_named_with_its_rule_and_value(
    argument: str, value: object, rule: str
) -> None:
    with pytest.raises(ValueError, match=rf"{argument} must be .*{rule}") as caught:
        val_plan(**{argument: value})
    assert str(caught.value).endswith(f"got {value!r}")
