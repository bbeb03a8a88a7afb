"""Colour noise: what is drawn, what it adds to the pixels, and that nothing else moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rsfast.config import TrainConfig
from rsfast.data import Augment, Loader, train_loader
from rsfast.data.augment import draw_colour_shifts
from rsfast.data.mixing import erase, shift_colours

RESOLUTIONS = (48, 32, 24)
LIT = Augment(lighting=0.1)
# Of fb.resnet.torch; rows of the matrix are red, green and blue, columns the components.
VALUES = [0.2175, 0.0188, 0.0045]
VECTORS = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
STD = (0.229, 0.224, 0.225)


def loader_of(root: Path | None, backend: str = "pil", batch_size: int = 4, **arguments) -> Loader:
    arguments = {"workers": 0, "seed": 3, "augment": LIT, **arguments}
    return train_loader(root, RESOLUTIONS, batch_size, backend=backend, **arguments)


def test_shifts_follow_the_published_formula() -> None:
    found = draw_colour_shifts(np.random.default_rng(5), 7, 0.3)
    assert found.dtype == np.float32
    normal = np.random.default_rng(5).standard_normal((7, 3))
    for shift, drawn in zip(found, normal, strict=True):
        for colour in range(3):
            terms = zip(VECTORS[colour], VALUES, drawn, strict=True)
            expected = sum(vector * value * 0.3 * number for vector, value, number in terms)
            assert shift[colour] == pytest.approx(expected, rel=1e-6)


def test_shifts_are_normal_with_the_covariance_of_imagenets_colours() -> None:
    count = 50_000
    shifts = draw_colour_shifts(np.random.default_rng(0), count, 0.1).astype(np.float64)
    directions, scale = np.array(VECTORS), 0.1 * np.array(VALUES)
    deviation = np.sqrt(((directions * scale) ** 2).sum(axis=1))
    assert (np.abs(shifts.mean(axis=0)) < 4 * deviation / np.sqrt(count)).all()
    expected = directions @ np.diag(scale**2) @ directions.T
    np.testing.assert_allclose(np.cov(shifts.T), expected, rtol=0.03)
    amounts = shifts @ np.linalg.inv(directions).T / scale  # of each component
    np.testing.assert_allclose(np.corrcoef(amounts.T), np.eye(3), atol=0.02)
    assert (np.abs(amounts) < 1).mean() == pytest.approx(0.6827, abs=0.005)


@pytest.mark.parametrize("channels", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_image_is_moved_by_its_shift_and_padding_is_not(
    dtype: torch.dtype, channels: int
) -> None:
    shifts = np.array([[0.1, -0.2, 0.3], [0.0, 0.0, 0.0], [-1.0, 2.0, 0.5]], np.float32)
    rows = torch.randn(3 * sum(r * r for r in RESOLUTIONS), channels).to(dtype)
    rows[:, 3:] = 0
    before = rows.clone()
    shift_colours(rows, RESOLUTIONS, shifts, STD)
    pixels = [3 * r * r for r in RESOLUTIONS]
    for ours, level, r in zip(rows.split(pixels), before.split(pixels), RESOLUTIONS, strict=True):
        for n, shift in enumerate(shifts):
            own = slice(n * r * r, (n + 1) * r * r)
            added = torch.from_numpy(shift / np.float32(STD))
            torch.testing.assert_close(ours[own, :3], (level[own, :3].float() + added).to(dtype))
            assert not ours[own, 3:].any()


@pytest.mark.parametrize("normalize", ["none", "imagenet"])
def test_a_loader_lights_the_pictures_that_it_would_give_and_then_erases(
    backend: str, normalize: str, image_root: Path
) -> None:
    augment = Augment(lighting=0.1, random_erasing=0.6)
    loader = loader_of(image_root, backend, augment=augment, normalize=normalize)
    plain = loader_of(image_root, backend, augment=Augment(), normalize=normalize)
    erased = 0
    for step, (batch, alone) in enumerate(zip(loader, plain, strict=True)):
        shifts, boxes = loader.plan.colour_shifts(0, step), loader.plan.erasures(0, step)
        assert plain.plan.colour_shifts(0, step) is None
        expected = []
        for level in alone.images.levels():
            added = torch.from_numpy(shifts / np.array(loader.std)).float()
            lit = level + added[:, :, None, None]
            expected.append(lit.permute(0, 2, 3, 1).reshape(-1, 3))
        rows = torch.cat(expected)
        erase(rows, RESOLUTIONS, boxes)
        torch.testing.assert_close(batch.images.rows, rows)
        assert torch.equal(batch.images.rows == 0, rows == 0)
        assert torch.equal(batch.labels, alone.labels)
        erased += np.count_nonzero(boxes.any(axis=1))
    assert 3 <= erased < 12


def test_values_beyond_black_and_white_are_kept(image_root: Path) -> None:
    loader = loader_of(image_root, normalize="none", augment=Augment(lighting=5.0))
    rows = torch.cat([batch.images.rows for batch in loader])
    assert rows.min() < 0
    assert rows.max() > 1


def test_a_mixture_gets_one_shift(image_root: Path) -> None:
    mixing = Augment(mixup=0.4, cutmix=1.0)
    both = Augment(mixup=0.4, cutmix=1.0, lighting=0.1)
    loader = loader_of(image_root, augment=both, normalize="none")
    plain = loader_of(image_root, augment=mixing, normalize="none")
    for step, (batch, alone) in enumerate(zip(loader, plain, strict=True)):
        shifts = torch.from_numpy(loader.plan.colour_shifts(0, step))
        for level, other in zip(batch.images.levels(), alone.images.levels(), strict=True):
            torch.testing.assert_close(level, other + shifts[:, :, None, None])


def test_lighting_moves_no_window_flip_mixture_or_rectangle(image_root: Path) -> None:
    rest = {"mixup": 0.4, "cutmix": 1.0, "random_erasing": 0.5, "rand_augment": (2, 9)}
    plain, lit = (
        loader_of(image_root, augment=Augment(**rest, **more)).plan
        for more in ({}, {"lighting": 0.1})
    )
    for at in ((0, 0), (0, 2), (3, 1)):
        ours, other = lit.batch(*at), plain.batch(*at)
        for name in ("images", "windows", "flips"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(other, name))
        np.testing.assert_array_equal(ours.operations.numbers, other.operations.numbers)
        np.testing.assert_array_equal(lit.erasures(*at), plain.erasures(*at))
        np.testing.assert_array_equal(lit.blends(*at).boxes, plain.blends(*at).boxes)


def test_shifts_are_pure_and_the_same_for_any_number_of_ranks(image_root: Path) -> None:
    whole, again, other = (loader_of(image_root, seed=seed).plan for seed in (3, 3, 4))
    parts = [loader_of(image_root, batch_size=2, rank=r, world_size=2).plan for r in (0, 1)]
    seen = {other.colour_shifts(0, 0).tobytes()}
    for at in ((0, 0), (0, 1), (1, 0)):
        shifts = whole.colour_shifts(*at)
        assert shifts.shape == (4, 3)
        np.testing.assert_array_equal(shifts, again.colour_shifts(*at))
        joined = np.concatenate([part.colour_shifts(*at) for part in parts])
        np.testing.assert_array_equal(shifts, joined)
        seen.add(shifts.tobytes())
    assert len(seen) == 4


def test_an_epoch_continues_with_the_same_light(backend: str, image_root: Path) -> None:
    expected = list(loader_of(image_root, backend))
    loader = loader_of(image_root, backend)
    loader.first_step = 2
    (last,) = loader
    assert torch.equal(last.images.rows, expected[2].images.rows)


def test_both_loaders_add_the_same(image_root: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    pairs = zip(loader_of(image_root, "dali"), loader_of(image_root, "pil"), strict=True)
    plain = [loader_of(image_root, name, augment=Augment()) for name in ("dali", "pil")]
    for (dali, pil), dark, dull in zip(pairs, *plain, strict=True):
        torch.testing.assert_close(
            dali.images.rows - dark.images.rows,
            pil.images.rows - dull.images.rows,
            atol=1e-6,
            rtol=0,
        )


@pytest.mark.parametrize("deviation", [-0.1, float("nan"), float("inf")])
def test_what_is_no_deviation_is_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match=r"^lighting must be a finite number of at least 0, got "):
        Augment(lighting=deviation)


def test_the_setting_is_what_the_loader_is_told() -> None:
    assert TrainConfig(lighting=0.1).augment == LIT
