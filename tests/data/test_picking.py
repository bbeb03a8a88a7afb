"""Levels picked by nearest neighbour: which pixels, in which loaders, and with which settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rsfast.config import TrainConfig
from rsfast.data import Augment, Batch, Loader, train_loader, val_loader
from rsfast.data.mixing import erase, mixed
from rsfast.data.picking import Picking
from rsfast.files.pictures import nearest_pixels

RESOLUTIONS = (48, 32, 20)  # 48 / 32 and 48 / 20 are not whole


def training(root: Path | None, backend: str = "pil", **arguments) -> Loader:
    arguments = {"levels": "nearest", "resolutions": RESOLUTIONS, "batch_size": 4, **arguments}
    arguments = {"normalize": "none", "workers": 0, "seed": 3, **arguments}
    return train_loader(root, backend=backend, **arguments)


def validation(root: Path, backend: str = "pil", **arguments) -> Loader:
    arguments = {"levels": "nearest", "resolutions": RESOLUTIONS, "batch_size": 3, **arguments}
    return val_loader(root, backend=backend, normalize="none", workers=0, **arguments)


def picked(level: Tensor, r: int) -> Tensor:
    """[N, C, r, r] of [N, C, R, R], one pixel after another."""
    side = level.shape[-1]
    result = level.new_empty(*level.shape[:2], r, r)
    for y in range(r):
        for x in range(r):
            result[:, :, y, x] = level[:, :, int(y * side / r), int(x * side / r)]
    return result


def assert_picked(batch: Batch, largest: Tensor) -> None:
    for level, (r, _) in zip(batch.images.levels(), batch.images.sizes, strict=True):
        assert torch.equal(level, picked(largest, r))


@pytest.mark.parametrize("r", [1, 2, 5, 7, 96, 160, 223, 224])
def test_positions_are_the_quotients_rounded_down(r: int) -> None:
    assert nearest_pixels(224, r).tolist() == [(i * 224) // r for i in range(r)]


@pytest.mark.parametrize("side", [1, 7, 8])
def test_levels_in_any_order_are_picked_pixel_by_pixel(side: int) -> None:
    count, wanted = 3, (2, 9, 7, 8, 2, 1)
    picking = Picking("nearest", wanted, side, "cpu")
    assert picking.resized == tuple(sorted({max(r, side) for r in wanted}, reverse=True))
    generator = torch.Generator().manual_seed(0)
    sources = {
        r: torch.randint(0, 256, (count, r, r, 3), dtype=torch.uint8, generator=generator)
        for r in picking.resized
    }
    rows = picking(torch.cat([level.view(-1, 3) for level in sources.values()]), count)
    parts = rows.split([count * r * r for r in wanted])
    for part, r in zip(parts, wanted, strict=True):
        source = sources[max(r, side)].permute(0, 3, 1, 2)
        assert torch.equal(part.view(count, r, r, 3).permute(0, 3, 1, 2), picked(source, r))


def test_levels_that_were_all_resized_are_not_copied() -> None:
    rows = torch.zeros(5, 3, dtype=torch.uint8)
    for picking in (Picking("resize", (2, 1), None, "cpu"), Picking("nearest", (2,), 1, "cpu")):
        assert picking(rows, 1) is rows


def test_training_picks_smaller_levels_from_the_largest(backend: str, image_root: Path) -> None:
    resized = training(image_root, backend, levels="resize")
    alone = training(image_root, backend, resolutions=RESOLUTIONS[:1])
    loader = training(image_root, backend)
    assert loader.resolutions == RESOLUTIONS
    for batch, other, one in zip(loader, resized, alone, strict=True):
        assert batch.indices.tolist() == other.indices.tolist()
        # Window and flip do not depend on how levels are made, so neither does the largest one.
        assert torch.equal(batch.images.level(0), other.images.level(0))
        assert torch.equal(batch.images.level(0), one.images.level(0))
        assert_picked(batch, one.images.level(0))
        assert not torch.equal(batch.images.level(1), other.images.level(1))


def test_validation_picks_smaller_levels_from_the_largest(backend: str, image_root: Path) -> None:
    alone = validation(image_root, backend, resolutions=RESOLUTIONS[:1])
    for batch, one in zip(validation(image_root, backend), alone, strict=True):
        assert_picked(batch, one.images.level(0))


def test_below_a_given_resolution_levels_are_picked_and_above_it_resized(
    backend: str, image_root: Path
) -> None:
    loader = validation(image_root, backend, resolutions=(56, 40, 20), picked_from=48)
    assert loader.plan.resolutions == (56, 48)
    plain = validation(image_root, backend, resolutions=(56, 48), levels="resize")
    for batch, other in zip(loader, plain, strict=True):
        assert torch.equal(batch.images.level(0), other.images.level(0))
        for level, r in ((1, 40), (2, 20)):
            assert torch.equal(batch.images.level(level), picked(other.images.level(1), r))


def test_one_resolution_below_the_given_one_is_trained_as_picked(image_root: Path) -> None:
    whole = training(image_root)
    for batch, one in zip(
        whole, training(image_root, resolutions=(20,), picked_from=48), strict=True
    ):
        assert torch.equal(one.images.level(0), batch.images.level(2))


def test_only_the_largest_level_is_decoded(backend: str, image_root: Path) -> None:
    loader = training(image_root, backend)
    assert loader.plan.num_levels == 1
    for rows in loader._decoder.rows(0, range(2)):
        assert rows.shape == (4 * 48 * 48, 3)


def test_copies_of_a_resolution_are_one_picture(image_root: Path) -> None:
    plain = training(image_root)
    for batch, one in zip(training(image_root, copies=2), plain, strict=True):
        assert [r for r, _ in batch.images.sizes] == [48, 48, 32, 32, 20, 20]
        for number, level in enumerate(batch.images.levels()):
            assert torch.equal(level, one.images.level(number // 2))


def test_levels_are_picked_before_they_are_mixed_and_erased(backend: str, image_root: Path) -> None:
    augment = Augment(mixup=0.4, cutmix=1.0, random_erasing=0.7)
    loader = training(image_root, backend, augment=augment)
    plan = loader.plan
    plain = training(image_root, backend)
    for step, (batch, alone) in enumerate(zip(loader, plain, strict=True)):
        rows = (255 * alone.images.rows).round().to(torch.uint8)
        expected, _ = mixed(rows, RESOLUTIONS, alone.labels.numpy(), plan.blends(0, step))
        expected = expected / 255
        erase(expected, RESOLUTIONS, plan.erasures(0, step))
        torch.testing.assert_close(batch.images.rows, expected)


def test_operations_are_seen_at_all_levels(backend: str, image_root: Path) -> None:
    augment = Augment(rand_augment=(2, 20))
    for batch in training(image_root, backend, augment=augment):
        assert_picked(batch, batch.images.level(0))


def test_an_epoch_continues_with_the_same_pictures(backend: str, image_root: Path) -> None:
    expected = list(training(image_root, backend))
    loader = training(image_root, backend)
    loader.first_step = 1
    continued = list(loader)
    assert len(continued) == len(expected) - 1
    for batch, other in zip(continued, expected[1:], strict=True):
        assert torch.equal(batch.images.rows, other.images.rows)


def test_ranks_share_the_pictures_of_one_rank(image_root: Path) -> None:
    ranks = [list(training(image_root, batch_size=2, rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, first, second in zip(training(image_root), *ranks, strict=True):
        for level in range(len(RESOLUTIONS)):
            joined = torch.cat([first.images.level(level), second.images.level(level)])
            assert torch.equal(joined, batch.images.level(level))


def test_dali_and_pillow_pick_the_same_pixels(image_root: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    for make in (training, validation):
        for ours, other in zip(make(image_root, "dali"), make(image_root, "pil"), strict=True):
            assert ours.indices.tolist() == other.indices.tolist()
            apart = (255 * (ours.images.rows - other.images.rows)).abs().round()
            # Rounding, and the outermost ring, as in tests/data/test_pixels.py.
            assert apart.mean() < 0.3
            for level in ours.images.with_rows(apart).levels():
                assert level[..., 1:-1, 1:-1].max() <= 2


def test_the_synthetic_batch_is_picked_too() -> None:
    options = {"num_images": 8, "num_classes": 3}
    for batch in training(None, "synthetic", **options):
        assert_picked(batch, batch.images.level(0))


@pytest.mark.parametrize("flip", ["shared", "none"])
def test_one_flip_for_all_levels_goes_with_picking(flip: str, image_root: Path) -> None:
    resized = training(image_root, flip=flip, levels="resize")
    for batch, other in zip(training(image_root, flip=flip), resized, strict=True):
        assert_picked(batch, other.images.level(0))
    assert TrainConfig(levels="nearest", flip=flip).levels == "nearest"


@pytest.mark.parametrize(
    ("crop", "flip"), [("multi", "shared"), ("single", "independent"), ("multi", "independent")]
)
def test_windows_and_flips_of_each_level_are_refused(
    crop: str, flip: str, image_root: Path
) -> None:
    message = (
        "^levels nearest makes all levels from one picture of each image and so needs crop single "
        f"and flip shared or none, got crop {crop} and flip {flip}: choose these, or levels resize$"
    )
    with pytest.raises(ValueError, match=message):
        training(image_root, crop=crop, flip=flip)
    with pytest.raises(ValueError, match=message):
        TrainConfig(levels="nearest", crop=crop, flip=flip)
    dataclasses.replace(TrainConfig(), crop=crop, flip=flip)


def test_what_levels_are_picked_from_goes_with_levels_that_are_picked() -> None:
    for picked_from in (96, 224):
        cfg = TrainConfig(levels="nearest", resolutions=(96, 64), picked_from=picked_from)
        assert cfg.picked_from == picked_from
    message = "^picked_from is for levels nearest, and levels resize picks no pixels: add --levels"
    with pytest.raises(ValueError, match=message):
        TrainConfig(picked_from=224)
    message = "^picked_from must be at least 96, the largest of the resolutions, got 95$"
    with pytest.raises(ValueError, match=message):
        TrainConfig(levels="nearest", resolutions=(96, 64), picked_from=95)


@pytest.mark.parametrize("make", [training, validation])
def test_another_word_or_no_resolution_is_refused(make, image_root: Path) -> None:
    with pytest.raises(ValueError, match=r"^levels must be one of \('resize', 'nearest'\), got "):
        make(image_root, levels="bicubic")
    with pytest.raises(ValueError, match=r"^picked_from must be a resolution of at least 1, got 0"):
        make(image_root, picked_from=0)


def test_positions_in_float32_would_differ_where_the_quotient_is_whole() -> None:
    for r, places in ((192, [54, 102, 108]), (160, []), (128, []), (96, [27, 51, 54])):
        step = np.float32(224) / np.float32(r)
        rounded = np.floor(np.arange(r, dtype=np.float32) * step).astype(np.int64)
        assert np.flatnonzero(rounded != nearest_pixels(224, r)).tolist() == places
