"""Mixup and CutMix: what is drawn, what the pixels become, and that nothing else moves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from rsfast.config import TrainConfig
from rsfast.data import Augment, Loader, index_folder, train_loader
from rsfast.data.augment import Blends, draw_blends, partners
from rsfast.data.mixing import mixed

RESOLUTIONS = (48, 32, 24)
BOTH = Augment(mixup=0.4, cutmix=1.0)


def loader_of(root: Path | None, backend: str = "pil", batch_size: int = 4, **arguments) -> Loader:
    arguments = {"workers": 0, "seed": 3, "normalize": "none", **arguments}
    return train_loader(root, RESOLUTIONS, batch_size, backend=backend, **arguments)


def draw(mixup: float, cutmix: float, count: int = 20_000, seed: int = 0) -> Blends:
    return draw_blends(np.random.default_rng(seed), count, mixup, cutmix)


def random_rows(count: int, seed: int = 0) -> torch.Tensor:
    pixels = count * sum(r * r for r in RESOLUTIONS)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (pixels, 3), dtype=torch.uint8, generator=generator)


def levels_of(rows: torch.Tensor, count: int) -> list[np.ndarray]:
    """[N, r, r, 3] of each level."""
    parts = rows.split([count * r * r for r in RESOLUTIONS])
    return [part.view(count, r, r, 3).numpy() for part, r in zip(parts, RESOLUTIONS, strict=True)]


def by_the_book(level: np.ndarray, blends: Blends, other: np.ndarray) -> np.ndarray:
    """One pixel after another, in float64."""
    result = level.astype(np.float64)
    r = level.shape[1]
    for n, (top, left, bottom, right) in enumerate(blends.boxes.tolist()):
        for y in range(r):
            for x in range(r):
                if top <= (y + 0.5) / r < bottom and left <= (x + 0.5) / r < right:
                    kept = float(blends.kept[n])
                    result[n, y, x] = kept * level[n, y, x] + (1 - kept) * level[other[n], y, x]
    return result


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_of_mixup_follow_the_beta_distribution(alpha: float) -> None:
    blends = draw(mixup=alpha, cutmix=0.0)
    assert (blends.boxes == (0, 0, 1, 1)).all()
    deviation = np.sqrt(1 / (4 * (2 * alpha + 1)))
    assert blends.share.mean() == pytest.approx(0.5, abs=4 * deviation / np.sqrt(20_000))
    assert blends.share.std() == pytest.approx(deviation, rel=0.03)


def test_boxes_of_cutmix_lie_in_the_image_and_their_area_is_the_share() -> None:
    blends = draw(mixup=0.0, cutmix=1.0)
    assert not blends.kept.any()
    top, left, bottom, right = blends.boxes.T.astype(np.float64)
    assert (blends.boxes >= 0).all()
    assert (blends.boxes <= 1).all()
    np.testing.assert_allclose(blends.share, 1 - (bottom - top) * (right - left), atol=1e-6)
    inside = (blends.boxes > 0).all(axis=1) & (blends.boxes < 1).all(axis=1)
    np.testing.assert_allclose((bottom - top)[inside], (right - left)[inside], atol=1e-6)
    # Whole boxes have an area uniform in [0, 1]; what is cut off leaves more of the own image.
    assert 0.6 < blends.share.mean() < 0.75


def test_with_both_half_of_the_images_get_a_box() -> None:
    blends = draw(mixup=0.4, cutmix=1.0)
    whole = (blends.boxes == (0, 0, 1, 1)).all(axis=1)
    assert whole.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(20_000))
    assert not blends.kept[~whole].any()
    assert blends.kept[whole].any()


@pytest.mark.parametrize(
    ("count", "expected"),
    [(2, [1, 0]), (4, [1, 0, 3, 2]), (5, [1, 0, 3, 2, 0]), (3, [1, 0, 0])],
    ids=str,
)
def test_neighbours_are_partners(count: int, expected: list[int]) -> None:
    assert partners(count).tolist() == expected


def test_pixels_are_mixed_within_the_box_and_rounded_once() -> None:
    count = 5
    rows, blends = random_rows(count), draw(mixup=0.5, cutmix=1.0, count=count, seed=4)
    whole = (blends.boxes == (0, 0, 1, 1)).all(axis=1)
    assert 0 < whole.sum() < count
    found, mix = mixed(rows, RESOLUTIONS, np.arange(count), blends)
    assert torch.equal(rows, random_rows(count))  # the given rows stay as they are
    assert found.dtype == torch.uint8
    assert mix.labels.tolist() == partners(count).tolist()
    assert mix.share.dtype == torch.float32
    for ours, level in zip(levels_of(found, count), levels_of(rows, count), strict=True):
        exact = by_the_book(level, blends, partners(count))
        assert np.abs(ours - exact).max() <= 0.5 + 1e-4
        np.testing.assert_array_equal(ours[~whole], exact[~whole])  # a box copies bytes


def test_a_level_shows_the_share_of_its_label_within_two_pixels_of_its_side() -> None:
    count = 200
    blends = draw(mixup=0.0, cutmix=1.0, count=count)
    colours = np.where(np.arange(count) % 2, 255, 0).astype(np.uint8)  # neighbours differ
    flat = torch.cat([torch.from_numpy(colours).repeat_interleave(r * r) for r in RESOLUTIONS])
    found, mix = mixed(flat[:, None].repeat(1, 3), RESOLUTIONS, np.arange(count), blends)
    for level, r in zip(levels_of(found, count), RESOLUTIONS, strict=True):
        visible = (level[..., 0] == colours[:, None, None]).mean(axis=(1, 2))
        assert np.abs(visible - mix.share.numpy()).max() <= 2 / r


def test_a_loader_mixes_the_pictures_that_it_would_give(backend: str, image_root: Path) -> None:
    labels = index_folder(image_root / "train").labels
    plain = list(loader_of(image_root, backend))
    loader = loader_of(image_root, backend, augment=BOTH)
    for step, (batch, alone) in enumerate(zip(loader, plain, strict=True)):
        assert batch.mix is not None
        assert alone.mix is None
        assert torch.equal(batch.labels, alone.labels)
        assert torch.equal(batch.indices, alone.indices)
        own = batch.indices.numpy()
        assert batch.mix.labels.tolist() == labels[own[partners(4)]].tolist()
        assert batch.mix.labels.dtype == torch.int64
        blends = loader.plan.blends(0, step)
        assert torch.equal(batch.mix.share, torch.from_numpy(blends.share))
        rows = (255 * alone.images.rows).round().to(torch.uint8)
        expected, _ = mixed(rows, RESOLUTIONS, alone.labels.numpy(), blends)
        assert torch.equal((255 * batch.images.rows).round().to(torch.uint8), expected)


def test_mixing_moves_no_window_and_no_flip(image_root: Path) -> None:
    plain, mixing = (loader_of(image_root, **more).plan for more in ({}, {"augment": BOTH}))
    for epoch, step in ((0, 0), (0, 2), (3, 1)):
        for name in ("images", "windows", "flips"):
            expected = getattr(plain.batch(epoch, step), name)
            np.testing.assert_array_equal(getattr(mixing.batch(epoch, step), name), expected)
        assert plain.blends(epoch, step) is None


def test_mixtures_are_a_pure_function_of_seed_epoch_and_step(image_root: Path) -> None:
    plan, again = (loader_of(image_root, augment=BOTH).plan for _ in range(2))
    seen = set()
    for at in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.testing.assert_array_equal(plan.blends(*at).boxes, again.blends(*at).boxes)
        np.testing.assert_array_equal(plan.blends(*at).kept, again.blends(*at).kept)
        seen.add(tuple(plan.blends(*at).share.tolist()))
    seen.add(tuple(loader_of(image_root, augment=BOTH, seed=4).plan.blends(0, 0).share.tolist()))
    assert len(seen) == 5


def test_ranks_with_an_even_batch_share_the_pictures_of_one_rank(image_root: Path) -> None:
    whole = list(loader_of(image_root, batch_size=4, augment=BOTH))
    ranks = [
        list(loader_of(image_root, batch_size=2, rank=rank, world_size=2, augment=BOTH))
        for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *ranks, strict=True):
        for level in range(len(RESOLUTIONS)):
            joined = torch.cat([first.images.level(level), second.images.level(level)])
            assert torch.equal(joined, batch.images.level(level))
        for name in ("labels", "share"):
            joined = torch.cat([getattr(part.mix, name) for part in (first, second)])
            assert torch.equal(joined, getattr(batch.mix, name))


def test_the_synthetic_batch_stays_as_it_is_under_the_mixtures() -> None:
    options = {"num_images": 8, "num_classes": 3}
    plain = list(loader_of(None, "synthetic", **options))
    mixing = loader_of(None, "synthetic", augment=Augment(cutmix=1.0), **options)
    first = list(mixing)
    assert not torch.equal(first[0].images.rows, plain[0].images.rows)
    mixing.epoch = 0
    for batch, again in zip(mixing, first, strict=True):
        assert torch.equal(batch.images.rows, again.images.rows)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_an_alpha_that_is_none_is_refused(name: str, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a finite number of at least 0, got "):
        Augment(**{name: alpha})


def test_a_single_image_has_no_partner(image_root: Path) -> None:
    with pytest.raises(ValueError, match=r"^batch_size must be at least 2 for mixup and cutmix"):
        loader_of(image_root, batch_size=1, augment=BOTH)


def test_settings_become_what_the_loader_is_told() -> None:
    assert TrainConfig().augment == Augment()
    assert dataclasses.replace(TrainConfig(), mixup=0.2, cutmix=1.0).augment == Augment(
        mixup=0.2, cutmix=1.0
    )
