"""RandAugment: what is drawn, what each operation does, and how near the loaders are."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from helpers import smooth_image
from rsfast.config import TrainConfig
from rsfast.data import Augment, Loader, train_loader
from rsfast.data.operations import (
    OPERATIONS,
    Operations,
    draw_operations,
    is_geometric,
    posterize_mask,
    solarize_threshold,
    source_matrix,
)
from rsfast.data.pil_operations import operate, operated

RESOLUTIONS = (48, 32, 24)
TWO_OF_NINE = Augment(rand_augment=(2, 9))
MAGNITUDES = (0, 9, 17, 30)


def noisy_image(height: int, width: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = np.asarray(smooth_image(height, width, rng)).astype(int)
    return Image.fromarray((pixels + rng.integers(-15, 16, pixels.shape)).clip(0, 255).astype("u1"))


# Of many shapes, flat ones and such as have no inside among them.
PICTURES = [
    *(noisy_image(int(h), int(w), n) for n, (h, w) in enumerate([(97, 131), (40, 220), (201, 75)])),
    smooth_image(120, 90, np.random.default_rng(5)),
    Image.new("RGB", (30, 20), (9, 200, 30)),
    Image.new("RGB", (1, 1), (9, 200, 30)),
    Image.new("RGB", (50, 2), (0, 255, 30)),
]


def loader_of(root: Path, backend: str = "pil", batch_size: int = 4, **arguments) -> Loader:
    arguments = {"workers": 0, "seed": 3, "normalize": "none", "augment": TWO_OF_NINE, **arguments}
    return train_loader(root, RESOLUTIONS, batch_size, backend=backend, **arguments)


def one_operation(name: str, magnitude: int, count: int) -> Operations:
    """The same for all, in both of its directions."""
    drawn = draw_operations(np.random.default_rng(0), 500, 1, magnitude)
    rows = np.flatnonzero(drawn.numbers[:, 0] == OPERATIONS.index(name))
    amounts = sorted({float(amount) for amount in drawn.amounts[rows, 0]})
    column = np.resize(amounts, count)[:, None]
    return Operations(np.full((count, 1), OPERATIONS.index(name)), column, magnitude)


def test_operations_are_alike_likely_and_take_both_directions() -> None:
    drawn = draw_operations(np.random.default_rng(0), 14_000, 2, 9)
    assert drawn.numbers.shape == drawn.amounts.shape == (14_000, 2)
    counts = np.bincount(drawn.numbers.ravel(), minlength=14)
    assert np.abs(counts - 2000).max() < 4.5 * math.sqrt(2000)
    for number, name in enumerate(OPERATIONS):
        amounts = drawn.amounts[drawn.numbers == number]
        middle = 1.0 if name in ("brightness", "color", "contrast", "sharpness") else 0.0
        above = (amounts > middle).mean()
        if is_geometric(name) or middle:
            assert len(set(amounts.tolist())) == 2
            assert above == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(amounts)))
        else:
            assert not amounts.any()


@pytest.mark.parametrize(
    ("name", "magnitude", "amount"),
    [
        ("shear_x", 30, 0.3),
        ("shear_y", 9, 0.09),
        ("translate_x", 30, 150 / 331),
        ("translate_y", 15, 75 / 331),
        ("rotate", 9, 9.0),
        ("brightness", 10, 1.3),
        ("color", 30, 1.9),
        ("contrast", 0, 1.0),
        ("sharpness", 20, 1.6),
    ],
)
def test_ranges_are_those_of_torchvision(name: str, magnitude: int, amount: float) -> None:
    assert one_operation(name, magnitude, 2).amounts.max() == pytest.approx(amount)


def test_bits_and_thresholds_are_those_of_torchvision() -> None:
    bits = [bin(posterize_mask(m)).count("1") for m in range(31)]
    assert bits == [8 - round(m / 7.5) for m in range(31)]
    assert (bits[0], bits[9], bits[30]) == (8, 7, 4)
    assert all(posterize_mask(m) == 256 - 2 ** (8 - bits[m]) for m in range(31))
    assert (solarize_threshold(0), solarize_threshold(30)) == (255.0, 0.0)
    assert solarize_threshold(9) == pytest.approx(178.5)


@pytest.mark.parametrize("angle", [-30.0, 9.0])
@pytest.mark.parametrize("size", [(90, 61), (40, 40)])
def test_a_rotation_is_pillows(angle: float, size: tuple[int, int]) -> None:
    picture = noisy_image(*size, seed=1)
    assert operate(picture, "rotate", angle, 9) == picture.rotate(angle)


def test_translations_and_shears_move_into_the_direction_of_their_amount() -> None:
    picture = noisy_image(40, 50, seed=2)
    pixels = np.asarray(picture)
    right = np.asarray(operate(picture, "translate_x", 0.1, 9))
    assert np.array_equal(right[:, 5:], pixels[:, :-5])
    assert not right[:, :5].any()
    up = np.asarray(operate(picture, "translate_y", -0.1, 9))
    assert np.array_equal(up[:-4], pixels[4:])
    assert not up[-4:].any()
    sheared = np.asarray(operate(picture, "shear_x", 0.3, 9))
    for y in range(40):
        moved = math.ceil(0.3 * (y + 0.5) - 0.5)
        assert np.array_equal(sheared[y, moved:], pixels[y, : 50 - moved])
    assert np.array_equal(source_matrix("equalize", 0.0, 40, 50), np.eye(2, 3))


def test_enhancements_and_tables_are_pillows() -> None:
    picture = noisy_image(40, 50, seed=2)
    for name in ("brightness", "color", "contrast", "sharpness"):
        enhancer = getattr(ImageEnhance, name.title())
        assert operate(picture, name, 1.3, 9) == enhancer(picture).enhance(1.3)
    assert operate(picture, "posterize", 0.0, 30) == ImageOps.posterize(picture, 4)
    assert operate(picture, "solarize", 0.0, 15) == ImageOps.solarize(picture, 127.5)
    assert operate(picture, "autocontrast", 0.0, 9) == ImageOps.autocontrast(picture)
    assert operate(picture, "identity", 0.0, 9) == picture


def test_equalize_spreads_the_ranks_over_all_values() -> None:
    ramp = np.repeat(np.arange(100, 140, dtype=np.uint8), 5).reshape(10, 20)
    picture = Image.fromarray(np.stack([ramp, 255 - ramp, np.full_like(ramp, 7)], axis=2))
    red, green, blue = np.moveaxis(np.asarray(operate(picture, "equalize", 0.0, 9)), 2, 0)
    expected = np.rint(np.repeat(np.arange(40), 5) * 255 / 39).reshape(10, 20)
    assert np.array_equal(red, expected)
    assert np.array_equal(green, 255 - expected)
    assert (blue == 7).all()
    # Without many black pixels, whose number Pillow does not subtract, its formula is near.
    values = np.random.default_rng(0).normal(128, 30, (400, 500, 3)).clip(0, 255)
    large = Image.fromarray(values.astype(np.uint8))
    ours, pillows = (
        np.asarray(image).astype(int)
        for image in (operate(large, "equalize", 0.0, 9), ImageOps.equalize(large))
    )
    assert np.abs(ours - pillows).max() <= 5


def by_dali(pictures: list[Image.Image], operations: Operations) -> list[np.ndarray]:
    dali = pytest.importorskip("rsfast.data.dali", reason="the dali loader needs NVIDIA DALI")
    shapes = np.array([[(picture.height, picture.width) for picture in pictures]])
    told = dali.fields_of(operations, shapes)
    stored = [np.asarray(picture) for picture in pictures]
    pipeline = dali.Pipeline(len(pictures), 2, None, prefetch_queue_depth=1, exec_async=False)
    with pipeline:
        images, *fields = dali.fn.external_source(
            source=lambda: [stored, *map(list, told)], num_outputs=1 + len(told)
        )
        images = dali.fn.reshape(images, layout="HWC")
        pipeline.set_outputs(*dali.operated([images], fields, operations.magnitude, False))
    (result,) = pipeline.run()
    return [np.array(result.at(n)) for n in range(len(pictures))]


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_dali_paints_what_pillow_does(name: str, magnitude: int) -> None:
    """Bit for bit, but for what the operations themselves leave open."""
    pictures = [picture for picture in PICTURES for _ in range(2)]
    operations = one_operation(name, magnitude, len(pictures))
    differing = count = 0
    for n, found in enumerate(by_dali(pictures, operations)):
        error = np.abs(found.astype(int) - np.asarray(operated(pictures[n], operations, n)))
        if name == "sharpness":  # Pillow leaves the outermost pixels as they are
            error = error[1:-1, 1:-1]
        differing += np.count_nonzero(error)
        count += error.size
    # Of a rotated picture, pixels whose source lies between two; measured: 0.0010.
    assert differing <= (0.003 * count if name == "rotate" else 0)


def test_dali_does_one_operation_after_another() -> None:
    names = [name for name in OPERATIONS if name not in ("rotate", "sharpness")]
    pairs = list(itertools.permutations(names, 2))[::5]
    pictures = [PICTURES[n % 4] for n in range(len(pairs))]
    amounts = [
        [one_operation(name, 9, 2).amounts[n % 2, 0] for name in pair]
        for n, pair in enumerate(pairs)
    ]
    numbers = [[OPERATIONS.index(name) for name in pair] for pair in pairs]
    operations = Operations(np.array(numbers), np.array(amounts), 9)
    for n, found in enumerate(by_dali(pictures, operations)):
        expected = np.asarray(operated(pictures[n], operations, n))
        assert np.array_equal(found, expected), pairs[n]


@pytest.mark.parametrize("crop", ["single", "multi"])
def test_both_loaders_give_nearly_the_same_pictures(crop: str, image_root: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    options = {"crop": crop, "flip": "independent", "batch_size": 6}
    for epoch in range(3):
        loaders = [loader_of(image_root, name, **options) for name in ("dali", "pil")]
        for loader in loaders:
            loader.epoch = epoch
        for ours, other in zip(*loaders, strict=True):
            assert ours.indices.tolist() == other.indices.tolist()
            error = 255 * (ours.images.rows - other.images.rows).abs()
            assert error.mean() < 1.0  # another operation differs by dozens


def test_all_levels_show_the_crop_after_one_draw(backend: str, image_root: Path) -> None:
    loader = loader_of(image_root, backend, batch_size=12, flip="none")
    plain = loader_of(image_root, backend, batch_size=12, flip="none", augment=Augment())
    (batch,), (alone,) = loader, plain
    changed = [
        (ours - other).abs().mean((1, 2, 3)) > 0.02
        for ours, other in zip(batch.images.levels(), alone.images.levels(), strict=True)
    ]
    assert changed[0].sum() >= 6
    for level in changed[1:]:
        assert (level == changed[0]).float().mean() > 0.8
    small = torch.nn.functional.interpolate(
        batch.images.level(0), (24, 24), mode="bilinear", antialias=True
    )
    assert 255 * (small - batch.images.level(2)).abs().mean() < 4.0


def test_operations_move_no_window_and_no_flip_and_are_pure(image_root: Path) -> None:
    plans = [loader_of(image_root, augment=a).plan for a in (Augment(), TWO_OF_NINE, TWO_OF_NINE)]
    seen = set()
    for epoch, step in ((0, 0), (0, 1), (2, 1)):
        plain, ours, again = (plan.batch(epoch, step) for plan in plans)
        assert plain.operations is None
        for name in ("images", "windows", "flips"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(ours, name))
        np.testing.assert_array_equal(ours.operations.numbers, again.operations.numbers)
        np.testing.assert_array_equal(ours.operations.amounts, again.operations.amounts)
        seen.add(ours.operations.numbers.tobytes())
    assert len(seen) == 3


def test_two_ranks_share_the_operations_of_one(backend: str, image_root: Path) -> None:
    whole = list(loader_of(image_root, backend, batch_size=6))
    ranks = [
        list(loader_of(image_root, backend, batch_size=3, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *ranks, strict=True):
        for level in range(len(RESOLUTIONS)):
            joined = torch.cat([first.images.level(level), second.images.level(level)])
            assert torch.equal(joined, batch.images.level(level))


@pytest.mark.parametrize("crop", ["single", "multi"])
def test_the_graph_of_a_gpu_can_be_made(crop: str, image_root: Path) -> None:
    dali = pytest.importorskip("rsfast.data.dali", reason="the dali loader needs NVIDIA DALI")
    loader = loader_of(image_root, "dali", device="cuda:0", crop=crop)
    pipeline: Any = loader._decoder._define(dali.Feed(loader.plan))
    assert [output.device for output in pipeline._graph_out] == [
        *["gpu"] * len(RESOLUTIONS),
        "cpu",  # the sizes of the files
    ]


@pytest.mark.parametrize("text", ["2", "2:", ":9", "0:9", "11:9", "2:31", "two:9", "2:9:1", "2:-1"])
def test_what_is_no_rand_augment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^rand_augment must "):
        TrainConfig(rand_augment=text)


def test_the_setting_becomes_what_the_loader_is_told() -> None:
    assert TrainConfig(rand_augment="2:9").augment == TWO_OF_NINE
    assert TrainConfig(random_erasing=0.25).augment == Augment(random_erasing=0.25)
