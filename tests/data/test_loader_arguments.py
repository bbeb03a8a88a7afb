"""Arguments that the loaders refuse."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from rsfast.data import Loader, train_loader, val_loader

RESOLUTIONS = (48, 32, 24)


def training(root: Path | None, backend: str, **arguments) -> Loader:
    arguments = {"batch_size": 4, "workers": 0, "resolutions": RESOLUTIONS, **arguments}
    return train_loader(root, backend=backend, **arguments)


def validation(root: Path | None, backend: str, **arguments) -> Loader:
    arguments = {"batch_size": 3, "workers": 0, "resolutions": RESOLUTIONS, **arguments}
    return val_loader(root, backend=backend, **arguments)


@pytest.mark.parametrize("make", [training, validation], ids=["train", "val"])
def test_an_unknown_backend_is_rejected(make, image_root: Path) -> None:
    with pytest.raises(ValueError, match=r"^backend must be one of .*dali.*pil.*, got 'opencv'$"):
        make(image_root, "opencv")


@pytest.mark.parametrize("make", [training, validation], ids=["train", "val"])
def test_a_root_is_required(make, backend: str) -> None:
    with pytest.raises(ValueError, match=rf"^root must be a folder for the {backend} .*got None$"):
        make(None, backend)


@pytest.mark.parametrize(
    ("make", "split"), [(training, "train"), (validation, "val")], ids=["train", "val"]
)
def test_a_missing_split_folder_is_named(make, split: str, backend: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / split} does not exist")):
        make(tmp_path, backend)


@pytest.mark.parametrize(
    "resolutions", [(), (96, 128), (96, 96), (32, 0), (32, -8)], ids=lambda value: str(value)
)
def test_training_resolutions_must_descend(
    resolutions: tuple[int, ...], backend: str, image_root: Path
) -> None:
    rule = rf"^resolutions must be .*descending.*got {re.escape(str(resolutions))}$"
    with pytest.raises(ValueError, match=rule):
        training(image_root, backend, resolutions=resolutions)


@pytest.mark.parametrize("resolutions", [(), (32, 0), (-8,)], ids=lambda value: str(value))
def test_validation_resolutions_must_be_positive(
    resolutions: tuple[int, ...], backend: str, image_root: Path
) -> None:
    with pytest.raises(ValueError, match=r"^resolutions must"):
        validation(image_root, backend, resolutions=resolutions)


@pytest.mark.parametrize(
    ("make", "argument", "value"),
    [
        (training, "normalize", "cifar"),
        (training, "crop", "center"),
        (training, "flip", "vertical"),
        (training, "batch_size", 0),
        (training, "crop_area", (0.0, 1.0)),
        (training, "max_steps", -1),
        (validation, "normalize", "cifar"),
        (validation, "crop", "single"),
        (validation, "batch_size", 0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_bad_argument_is_named_with_its_value(
    make, argument: str, value: object, backend: str, image_root: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{argument} must be .*got {re.escape(repr(value))}$"):
        make(image_root, backend, **{argument: value})


def test_without_dali_the_error_says_what_to_install(
    image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "rsfast.data.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[dali-cuda13\]'"):
        training(image_root, "dali")
