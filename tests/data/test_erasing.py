"""Random erasing: which rectangles, and that all levels lose the same one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rsfast.data import Augment, Loader, train_loader
from rsfast.data.augment import draw_erasures
from rsfast.data.mixing import erase

RESOLUTIONS = (48, 32, 24)


def loader_of(root: Path, backend: str = "pil", **arguments) -> Loader:
    arguments = {"workers": 0, "seed": 3, "augment": Augment(random_erasing=0.6), **arguments}
    return train_loader(root, RESOLUTIONS, 4, backend=backend, **arguments)


def test_rectangles_have_the_published_areas_ratios_and_probability() -> None:
    boxes = draw_erasures(np.random.default_rng(0), 20_000, 0.3).astype(np.float64)
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    erased = height > 0
    assert erased.mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 20_000))
    assert (boxes >= 0).all()
    assert (boxes <= 1 + 1e-6).all()
    areas, ratios = (height * width)[erased], (height / np.where(erased, width, 1))[erased]
    assert areas.min() == pytest.approx(0.02, abs=1e-3)
    assert areas.max() == pytest.approx(1 / 3, abs=1e-3)
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.005)
    assert ratios.min() == pytest.approx(0.3, rel=0.01)
    assert ratios.max() == pytest.approx(3.3, rel=0.01)
    assert np.median(ratios) == pytest.approx(math.sqrt(0.3 * 3.3), rel=0.05)
    # The place is anywhere that the rectangle fits.
    room = boxes[erased, :2] / (1 - np.stack([height, width], axis=1)[erased])
    assert room.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.parametrize(("probability", "erased"), [(0.0, 0), (1.0, 200)])
def test_none_or_all_are_erased(probability: float, erased: int) -> None:
    boxes = draw_erasures(np.random.default_rng(0), 200, probability)
    assert np.count_nonzero(boxes.any(axis=1)) == erased


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_in_the_rectangle_become_0_and_no_others(dtype: torch.dtype, channels: int) -> None:
    boxes = np.array([[0, 0, 0.5, 0.25], [0, 0, 0, 0], [0.3, 0.7, 0.9, 1.0]], np.float32)
    rows = torch.ones(3 * sum(r * r for r in RESOLUTIONS), channels, dtype=dtype)
    erase(rows, RESOLUTIONS, boxes)
    levels = rows.split([3 * r * r for r in RESOLUTIONS])
    for level, r in zip(levels, RESOLUTIONS, strict=True):
        pixels = level.view(3, r, r, channels)
        assert not pixels[0, : r // 2, : r // 4].any()
        assert pixels[0].sum() == channels * (r * r - r * r // 8)
        assert pixels[1].all()
        centres = (np.arange(r) + 0.5) / r
        down, across = (centres >= 0.3) & (centres < 0.9), centres >= 0.7
        inside = torch.from_numpy(np.outer(down, across))
        assert torch.equal(pixels[2, :, :, 0] == 0, inside)


def test_a_loader_erases_the_pictures_that_it_would_give(backend: str, image_root: Path) -> None:
    loader = loader_of(image_root, backend)
    plain = loader_of(image_root, backend, augment=Augment())
    count = 0
    for step, (batch, alone) in enumerate(zip(loader, plain, strict=True)):
        boxes = loader.plan.erasures(0, step)
        expected = alone.images.rows.clone()
        erase(expected, RESOLUTIONS, boxes)
        assert torch.equal(batch.images.rows, expected)
        assert torch.equal(batch.labels, alone.labels)
        assert batch.mix is None
        count += np.count_nonzero(boxes.any(axis=1))
    assert 3 <= count < 12


def test_erasing_is_pure_and_the_same_for_any_number_of_ranks(image_root: Path) -> None:
    whole, again = (loader_of(image_root).plan for _ in range(2))
    parts = [
        train_loader(
            *(image_root, RESOLUTIONS, 2),
            backend="pil",
            seed=3,
            augment=Augment(random_erasing=0.6),
            rank=rank,
            world_size=2,
        ).plan
        for rank in (0, 1)
    ]
    seen = set()
    for at in ((0, 0), (0, 1), (1, 0)):
        boxes = whole.erasures(*at)
        np.testing.assert_array_equal(boxes, again.erasures(*at))
        np.testing.assert_array_equal(boxes, np.concatenate([p.erasures(*at) for p in parts]))
        seen.add(boxes.tobytes())
    assert len(seen) == 3


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match=r"^random_erasing must be in \[0, 1\], got "):
        Augment(random_erasing=probability)
