"""Images that are far longer than wide: validation resizes the part of them that it cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import smooth_image
from rsfast.data import Loader, val_loader
from rsfast.files.pictures import BILINEAR, cut, val_geometry

RESOLUTIONS = (32, 24)


def folder_of(root: Path, *sizes: tuple[int, int]) -> Path:
    """Images of these heights and widths."""
    rng = np.random.default_rng(0)
    (root / "val" / "cat").mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        smooth_image(height, width, rng).save(root / "val" / "cat" / f"{number}.png")
    return root


def validation(root: Path, backend: str, **arguments: Any) -> Loader:
    return val_loader(
        root, RESOLUTIONS, 8, backend=backend, workers=0, normalize="none", **arguments
    )


def pixels_of(loader: Loader) -> np.ndarray:
    """[M, 3] of all levels, in 0 to 255."""
    (batch,) = loader
    return batch.images.rows.numpy() * 255


@pytest.mark.parametrize("size", [(40, 700), (700, 40), (3, 400), (1, 300)])
def test_a_part_resized_is_the_whole_resized_and_cut(size: tuple[int, int]) -> None:
    image = smooth_image(*size, np.random.default_rng(0))
    for r in (32, 64):
        (resized,), (corner,) = val_geometry(np.array([size]), r, "center")
        top, left = corner.tolist()
        whole = image.resize(tuple(resized.tolist()[::-1]), BILINEAR)
        want = np.asarray(whole.crop((left, top, left + r, top + r))).astype(int)
        got = np.asarray(cut(image, resized, corner, r)).astype(int)
        assert np.abs(got - want).max() <= 2
        assert np.abs(got - want).mean() <= 0.15


@pytest.fixture
def resizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Width and height of everything that Pillow resizes to."""
    made: list[tuple[int, int]] = []
    resize: Callable = Image.Image.resize

    def record(image: Image.Image, size: tuple[int, int], *rest: Any, **options: Any) -> Any:
        made.append(size)
        return resize(image, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", record)
    return made


THIN = [(1, 20_000), (6000, 1), (7, 900)]


def test_the_size_of_what_is_resized_is_bounded(
    tmp_path: Path, resizes: list[tuple[int, int]]
) -> None:
    root = folder_of(tmp_path, *THIN, (30, 400))
    resizes.clear()
    pixels_of(validation(root, "pil"))
    assert len(resizes) == 4 * len(RESOLUTIONS)
    assert max(max(size) for size in resizes) == 480  # 36 * 400 / 30, of the one that is not thin


def test_the_size_of_what_dali_resizes_is_bounded(tmp_path: Path) -> None:
    dali = pytest.importorskip("rsfast.data.dali", reason="the dali loader needs NVIDIA DALI")
    loader = validation(folder_of(tmp_path, *THIN, (30, 400)), "dali")
    feed = dali.Feed(loader.plan)
    feed.start(0, range(1))
    count = len(RESOLUTIONS)
    fields = feed.next_val()[1:]
    sizes, corners = fields[2 * count : 3 * count], fields[3 * count :]
    for size, corner, r in zip(sizes, corners, RESOLUTIONS, strict=True):
        assert size[:3].tolist() == [[r, r]] * 3
        assert corner[:3].tolist() == [[0, 0]] * 3
        assert size[3].max() > 10 * r


def test_both_loaders_see_the_same_part(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    root = folder_of(tmp_path, *THIN, (30, 900), (900, 30), (30, 400))
    apart = np.abs(pixels_of(validation(root, "pil")) - pixels_of(validation(root, "dali")))
    assert apart.max() <= 3
    assert apart.mean() <= 0.2
