"""The built-in image set: layout, determinism, caching, and what its classes can be told by."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rsfast.data import builtin
from rsfast.data.builtin import CLASS_NAMES, builtin_root

SMALL = {"num_train": 40, "num_val": 20, "workers": 2}


@pytest.fixture(scope="module")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builtin_root(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture(scope="module")
def probe_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough training images (200) to estimate how well a texture shows."""
    return builtin_root(tmp_path_factory.mktemp("probe"), num_train=200, num_val=10)


def files_by_name(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.jpg")}


def validation_view(image: Image.Image, resolution: int) -> Image.Image:
    """Shorter side to int(r / 0.875) with an antialiased bilinear resize, centre crop r."""
    scale = int(resolution / 0.875) / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def looks_vertical(luma: NDArray[np.float64]) -> bool:
    """Oracle of the texture: vertical stripes put more gradient energy across than down."""
    return bool(np.mean(np.diff(luma, axis=1) ** 2) > np.mean(np.diff(luma, axis=0) ** 2))


def texture_accuracy(root: Path, resolution: int) -> float:
    hits = []
    for path in sorted(root.glob("train/*/*.jpg")):
        with Image.open(path) as image:
            luma = np.asarray(validation_view(image.convert("L"), resolution), dtype=np.float64)
        hits.append(looks_vertical(luma) == path.parent.name.endswith("vertical"))
    return float(np.mean(hits))


def best_threshold_accuracy(feature: NDArray[np.float64], is_vertical: NDArray[np.bool_]) -> float:
    """Accuracy of the best cut through one feature, fitted on the very same images."""
    sorted_labels = is_vertical[np.argsort(feature)]
    verticals_below = np.concatenate([[0], np.cumsum(sorted_labels)])
    horizontals_below = np.arange(len(feature) + 1) - verticals_below
    correct = horizontals_below + (sorted_labels.sum() - verticals_below)
    accuracy = correct / len(feature)
    return float(max(accuracy.max(), 1 - accuracy.min()))


def test_every_split_holds_every_class_equally_often(small_root: Path) -> None:
    assert sorted(path.name for path in small_root.iterdir()) == ["train", "val"]
    for split, per_class in (("train", 4), ("val", 2)):
        folders = sorted(path.name for path in (small_root / split).iterdir())
        assert folders == list(CLASS_NAMES)
        for name in folders:
            files = [path.name for path in (small_root / split / name).iterdir()]
            assert len(files) == per_class
            assert all(re.fullmatch(r"\d{4}\.jpg", file) for file in files)


def test_every_image_is_an_rgb_jpeg_of_useful_size(small_root: Path) -> None:
    sizes = set()
    for path in small_root.rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert min(image.size) >= 96
            assert max(image.size) <= 256
            sizes.add(image.size)
    assert len(sizes) > 20
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_the_number_of_workers_does_not_change_a_byte(small_root: Path, tmp_path: Path) -> None:
    for workers in (1, 5):
        again = builtin_root(tmp_path / str(workers), **{**SMALL, "workers": workers})
        assert files_by_name(again) == files_by_name(small_root)


def test_a_larger_set_begins_with_the_images_of_a_smaller_one(
    small_root: Path, probe_root: Path
) -> None:
    larger = files_by_name(probe_root)
    for name, content in files_by_name(small_root).items():
        if name.startswith("train"):
            assert larger[name] == content


def test_no_two_images_and_no_two_seeds_agree(small_root: Path, tmp_path: Path) -> None:
    other = builtin_root(tmp_path, seed=1, **SMALL)
    contents = [*files_by_name(small_root).values(), *files_by_name(other).values()]
    assert len(set(contents)) == 2 * (SMALL["num_train"] + SMALL["num_val"])


def test_a_second_call_does_not_generate_again(
    small_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_root.rglob("*")}
    assert builtin_root(small_root.parent, **SMALL) == small_root
    assert {path: path.stat().st_mtime_ns for path in small_root.rglob("*")} == before
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_generation_is_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_root: Path
) -> None:
    write_image = builtin._write_image

    def interrupt_at_image_30(root: Path, seed: int, split: str, index: int) -> None:
        if index == 30:
            raise KeyboardInterrupt
        write_image(root, seed, split, index)

    monkeypatch.setattr(builtin, "_write_image", interrupt_at_image_30)
    with pytest.raises(KeyboardInterrupt):
        builtin_root(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []

    # A killed process cannot clean up: its partial folder stays, and must not be taken for a set.
    monkeypatch.setattr(builtin, "_write_image", write_image)
    stale = tmp_path / f".{small_root.name}.partial-1-00000000"
    (stale / "train" / CLASS_NAMES[0]).mkdir(parents=True)
    root = builtin_root(tmp_path, **SMALL)
    assert root == tmp_path / small_root.name
    assert files_by_name(root) == files_by_name(small_root)


def test_racing_generations_end_with_one_complete_set(tmp_path: Path, small_root: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        racers = [pool.submit(builtin_root, tmp_path, **SMALL) for _ in range(3)]
        roots = {racer.result() for racer in racers}
    assert list(tmp_path.iterdir()) == list(roots)
    assert files_by_name(roots.pop()) == files_by_name(small_root)


def test_a_cache_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        builtin_root(file, **SMALL)


def test_a_name_taken_by_a_file_is_an_error(tmp_path: Path, small_root: Path) -> None:
    (tmp_path / small_root.name).touch()
    with pytest.raises(OSError, match=small_root.name):
        builtin_root(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [small_root.name]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RSFAST_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
        ({"RSFAST_CACHE": "", "XDG_CACHE_HOME": "xdg"}, "xdg/rsfast"),
        ({}, "home/.cache/rsfast"),
    ],
    ids=["RSFAST_CACHE", "XDG_CACHE_HOME", "home"],
)
def test_the_environment_names_the_cache_folder(
    variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RSFAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    root = builtin_root(num_train=10, num_val=10)
    assert root == tmp_path / expected / f"builtin-v{builtin.FORMAT_VERSION}-10-10-0"


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("num_train", 0, "positive multiple of 10"),
        ("num_train", 1601, "positive multiple of 10"),
        ("num_val", -10, "positive multiple of 10"),
        ("num_val", 15, "positive multiple of 10"),
        ("seed", -1, "at least 0"),
        ("workers", 0, "positive"),
    ],
)
def test_a_bad_argument_is_named_with_its_rule_and_value(
    argument: str, value: int, rule: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} must be .*{rule}.*, got {value}$"):
        builtin_root(tmp_path, **{**SMALL, argument: value})
    assert list(tmp_path.iterdir()) == []


def test_the_texture_shows_at_96_pixels_and_mostly_fades_at_32(probe_root: Path) -> None:
    # On 1600 images at 96, 80, 64, 48, 32 pixels: 1.00, 1.00, 0.99, 0.89, 0.77. The standard error
    # on these 200 is at most 0.035.
    accuracy = {r: texture_accuracy(probe_root, r) for r in (96, 64, 48, 32)}
    assert accuracy[96] >= 0.98
    assert 0.90 <= accuracy[64] <= 1.0
    assert 0.76 <= accuracy[48] <= 0.95
    assert 0.60 <= accuracy[32] <= 0.85
    assert accuracy[96] >= accuracy[64] > accuracy[48] > accuracy[32]


def test_a_horizontal_flip_keeps_the_texture(probe_root: Path) -> None:
    for path in sorted(probe_root.glob("train/*/*.jpg"))[::10]:
        with Image.open(path) as image:
            flipped = image.convert("L").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        luma = np.asarray(validation_view(flipped, 96), dtype=np.float64)
        assert looks_vertical(luma) == path.parent.name.endswith("vertical")


def test_neither_colour_nor_contrast_nor_file_size_reveals_the_texture(probe_root: Path) -> None:
    is_vertical, features = [], []
    for path in sorted(probe_root.glob("train/*/*.jpg")):
        with Image.open(path) as image:
            pixels = np.asarray(image, dtype=np.float64)
        bytes_per_pixel = path.stat().st_size / pixels[..., 0].size
        aspect = pixels.shape[1] / pixels.shape[0]
        features.append([*pixels.mean((0, 1)), *pixels.std((0, 1)), bytes_per_pixel, aspect])
        is_vertical.append(path.parent.name.endswith("vertical"))
    # The best cut through 200 images of a feature that says nothing gains 0.04 to 0.09 by luck.
    for feature in np.array(features).T:
        assert best_threshold_accuracy(feature, np.array(is_vertical)) < 0.62
