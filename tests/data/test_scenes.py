"""The built-in set of segmentation: layout, determinism, exact masks, and what classes show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsfast.data import builtin, open_pairs
from rsfast.data.builtin import builtin_root
from rsfast.data.scenes import CLASS_NAMES
from rsfast.files.task_names import TASKS

pytestmark = pytest.mark.usefixtures("cache")
SMALL = {"task": "segmentation", "num_train": 24, "num_val": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builtin_root(tmp_path_factory.mktemp("scenes"), **SMALL)


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def masks_of(root: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(root.glob("trainannot/*.png"))]


def image_of(root: Path, number: int) -> Image.Image:
    with Image.open(root / "train" / f"{number:04d}.jpg") as image:
        return image.convert("RGB")


def test_the_set_is_a_data_set_of_segmentation_without_a_bad_pair(root: Path) -> None:
    for split, count in (("train", 24), ("val", 6)):
        pairs = open_pairs(root, split, strict=True)
        assert len(pairs.images) == count
        assert pairs.images.class_names == CLASS_NAMES
        assert pairs.images.sizes.tolist() == pairs.masks.sizes.tolist()
        height, width = pairs.images.sizes.T
        assert (height >= 116).all()
        assert (width > height).all()
        assert (width <= 190).all()


def test_neither_workers_nor_the_size_of_the_set_change_a_byte(root: Path, tmp_path: Path) -> None:
    fewer = content(builtin_root(tmp_path, **{**SMALL, "num_train": 5, "workers": 3}))
    whole = content(root)
    assert len(fewer) == 2 * (5 + 6) + 1
    assert fewer.items() <= whole.items()
    images = [value for path, value in whole.items() if path.endswith(".jpg")]
    assert len(set(images)) == len(images) == 30


def test_a_second_call_does_not_generate_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_generate", None)
    assert builtin_root(root.parent, **SMALL) == root
    assert root.name == "builtin-scenes-v1-24-6-0"


def test_both_tasks_have_a_set_of_their_own(tmp_path: Path) -> None:
    names = {builtin_root(tmp_path, num_train=10, num_val=10, task=task).name for task in TASKS}
    assert len(names) == 2


def test_no_class_is_rare_or_fills_the_images(root: Path) -> None:
    counts = np.sum([np.bincount(mask.ravel(), minlength=6) for mask in masks_of(root)], axis=0)
    shares = dict(zip(CLASS_NAMES, counts / counts.sum(), strict=True))
    assert 0.5 < shares.pop("background") < 0.75
    assert 0.008 < shares.pop("wire") < 0.03
    assert all(0.05 < share < 0.12 for share in shares.values()), shares


def stray(root: Path, down: int, across: int) -> float:
    """Mean share of a plain shape's pixels of another colour, of masks moved by some pixels."""
    shares = []
    for number, mask in enumerate(masks_of(root)):
        chroma = np.asarray(image_of(root, number).convert("YCbCr"), dtype=np.float64)[:, :, 1:]
        moved = np.roll(mask, (down, across), axis=(0, 1))
        for label in (1, 2):
            if 600 < (mask == label).sum() < 2400:  # hardly two shapes of the class
                inside = chroma[moved == label]
                far = np.abs(inside - np.median(inside, axis=0)).max(axis=1) > 10
                shares.append(far.mean())
    assert len(shares) > 10
    return float(np.mean(shares))


def test_masks_fit_the_images_to_the_pixel(root: Path) -> None:
    exact = stray(root, 0, 0)
    for down, across in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        assert exact < 0.6 * stray(root, down, across)


def stripes_seen(root: Path, resolution: int) -> float:
    """Share of the striped pixels whose direction shows in the picture squashed to r x r."""
    right, total = 0.0, 0
    for number, mask in enumerate(masks_of(root)):
        image = image_of(root, number).convert("L")
        small = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
        luma = np.asarray(small, dtype=np.float64)
        labels = np.asarray(Image.fromarray(mask).resize(small.size, Image.Resampling.NEAREST))
        across = np.abs(np.diff(luma, axis=1, append=luma[:, -1:]))
        down = np.abs(np.diff(luma, axis=0, append=luma[-1:]))
        for label, is_upright in ((3, False), (4, True)):
            inside = labels == label
            if inside.sum() < 20:
                continue
            strong = max(across[inside].mean(), down[inside].mean()) > 8
            agrees = (across[inside].mean() > down[inside].mean()) == is_upright
            right += inside.mean() * (agrees if strong else 0.5)
            total += inside.mean()
    return right / total


def test_stripes_fade_with_the_resolution(root: Path) -> None:
    seen = {r: stripes_seen(root, r) for r in (96, 48, 24)}
    assert seen[96] > 0.95
    assert seen[96] > seen[48] + 0.01
    assert seen[48] > seen[24] + 0.1


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("task", "detection", r"task must be one of \('classification', 'segmentation'\), got 'de"),
        ("num_train", 0, "num_train must be a positive number, got 0"),
        ("num_val", -1, "num_val must be a positive number, got -1"),
    ],
)
def test_a_bad_argument_is_named(argument: str, value: object, rule: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rule):
        builtin_root(tmp_path, **{**SMALL, argument: value})
