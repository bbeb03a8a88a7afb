"""Applies to the tests of the loaders."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import make_image_folder, make_pair_folder


@pytest.fixture(params=["pil", "dali"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that decodes files."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    return request.param


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 8 validation JPEGs in two classes, about 200 x 160 pixels. Read only."""
    return make_image_folder(tmp_path_factory.mktemp("images"), size=(200, 160))


@pytest.fixture(scope="session")
def pair_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 training and 7 validation images with masks of 4 classes, about 140 x 110. Read only."""
    folder = tmp_path_factory.mktemp("pairs")
    return make_pair_folder(folder, train=9, val=7, size=(110, 140))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """6 training and 4 validation images with masks of 4 classes."""
    return make_pair_folder(tmp_path / "pairs")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """6 training and 4 validation images of two classes."""
    return make_image_folder(tmp_path / "folder", train=3, val=2)
