"""Files that go, change, or cannot be read for a while, when the data set is already indexed."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import make_image_folder, smooth_image
from rsfast.data import Loader, index, index_folder, reading, train_loader, val_loader
from rsfast.data.__main__ import main

# Python 3.12 says so of every fork beside a thread; workers only decode.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
RESOLUTIONS = (32, 16)
SPLITS = ("train", "val")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images in each split, whose path must be quoted."""
    return make_image_folder(tmp_path / "my set", train=3, val=3)


def loader_of(root: Path, split: str, backend: str, workers: int = 0, **arguments: Any) -> Loader:
    make = train_loader if split == "train" else val_loader
    return make(root, RESOLUTIONS, 2, backend=backend, workers=workers, **arguments)


def rows_of(loader: Loader) -> torch.Tensor:
    return torch.cat([batch.images.rows for batch in loader])


def overwrite(file: Path, height: int, width: int) -> None:
    """Another picture in the same file, of which its folder tells nothing."""
    smooth_image(height, width, np.random.default_rng(0)).save(file)


@pytest.mark.parametrize("size", [(20, 30), (200, 300)], ids=["shrunk", "grown"])
@pytest.mark.parametrize("crop", ["single", "multi", "val"])
def test_an_image_that_was_overwritten_by_one_of_another_size_is_named_with_the_check(
    backend: str, crop: str, size: tuple[int, int], root: Path
) -> None:
    split, modes = ("val", {}) if crop == "val" else ("train", {"crop": crop})
    before = index_folder(root / split)
    file = root / split / "dog" / "0001.jpg"
    overwrite(file, *size)
    height, width = before.sizes[before.paths.index("dog/0001.jpg")]
    with pytest.raises(RuntimeError) as caught:
        rows_of(loader_of(root, split, backend, **modes))
    said = str(caught.value)
    changed = f"from {width} x {height} to {size[1]} x {size[0]} pixels"
    assert said.startswith(f"{file} has changed since the data set was indexed, {changed}; ")
    assert "\n" not in said
    command = said.rpartition(": ")[2]
    assert main(shlex.split(command.removeprefix("python -m rsfast.data "))) == 0
    assert rows_of(loader_of(root, split, backend, **modes)).isfinite().all()


def test_an_image_that_was_overwritten_is_named_for_an_export_too(root: Path) -> None:
    images = index_folder(root / "val")
    overwrite(root / "val" / "cat" / "0000.jpg", 20, 30)
    with pytest.raises(RuntimeError, match=r"0000\.jpg has changed since"):
        index.decode(images, 0)


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.rename(file.with_suffix(".x"))])
@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"dont_use_mmap": True}], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_an_image_that_is_gone_is_named_without_a_command(
    backend: str, split: str, options: dict[str, Any], change: Callable, root: Path
) -> None:
    loader = loader_of(root, split, backend, **options)
    file = root / split / "dog" / "0001.jpg"
    change(file)
    with pytest.raises(RuntimeError) as caught:
        rows_of(loader)
    assert str(caught.value) == (
        f"{file} is gone: it was removed or renamed after the data set was indexed; put it back, "
        "or start a new run, which does without it"
    )


def test_a_data_folder_that_is_gone_is_named(backend: str, root: Path) -> None:
    loader = loader_of(root, "val", backend)
    root.rename(root.with_name("moved"))
    with pytest.raises(RuntimeError, match=f"^data folder {root / 'val'} is gone, and .*mounted"):
        rows_of(loader)


class Flaky:
    """Opens the files of an index, one of which fails so many times."""

    def __init__(self, name: str, error: int, times: int) -> None:
        self.name, self.error, self.times = name, error, times
        self.pauses: list[float] = []

    def open(self, path: str, *rest: Any) -> Any:
        if path.endswith(self.name) and self.times:
            self.times -= 1
            raise OSError(self.error, os.strerror(self.error), path)
        return open(path, *rest)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, int], Flaky]:
    def make(name: str, error: int, times: int) -> Flaky:
        fault = Flaky(name, error, times)
        monkeypatch.setattr(index, "open", fault.open, raising=False)
        monkeypatch.setattr(reading.time, "sleep", fault.pauses.append)
        return fault

    return make


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
@pytest.mark.parametrize("split", SPLITS)
def test_an_error_that_passes_is_waited_for(
    split: str, error: int, root: Path, flaky: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    want = rows_of(loader_of(root, split, "pil"))
    fault = flaky("dog/0001.jpg", error, 3)
    assert torch.equal(rows_of(loader_of(root, split, "pil")), want)
    assert (fault.times, fault.pauses) == (0, [0.2, 1.0, 5.0])
    assert caplog.text.count(f"dog/0001.jpg: {os.strerror(error)}; trying again in") == 3


@pytest.mark.parametrize(
    ("error", "tries", "words"),
    [
        (errno.EIO, 4, "4 times within 6 s; the disk or the network fails"),
        (errno.EACCES, 1, "Permission denied"),
        (errno.EMFILE, 1, "Too many open files"),
    ],
)
def test_an_error_that_stays_is_told_and_the_image_is_not_blamed(
    error: int, tries: int, words: str, root: Path, flaky: Callable
) -> None:
    fault = flaky("dog/0001.jpg", error, 99)
    with pytest.raises(RuntimeError) as caught:
        rows_of(loader_of(root, "val", "pil"))
    assert str(caught.value).startswith(f"cannot read {root / 'val' / 'dog' / '0001.jpg'}: ")
    assert words in str(caught.value)
    assert "exclude" not in str(caught.value)
    assert fault.times == 99 - tries


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Has a file away while DALI looks for it, and back when Python reads it."""

    def make(file: Path, times: int) -> Path:
        away = file.with_suffix(".away")
        file.rename(away)
        read = index.ImageIndex.read
        left = times

        def found(self: index.ImageIndex, position: int) -> bytes:
            nonlocal left
            if self.path(position) != str(file):
                return read(self, position)
            left -= 1
            if not left:
                away.rename(file)
            return away.read_bytes() if left else read(self, position)

        monkeypatch.setattr(index.ImageIndex, "read", found)
        return file

    return make


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("times", [1, 2])
def test_dali_goes_on_with_the_step_whose_file_can_be_read_again(
    split: str, times: int, root: Path, absent: Callable
) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    want = rows_of(loader_of(root, split, "dali"))
    loader = loader_of(root, split, "dali")
    absent(root / split / "dog" / "0001.jpg", times)
    batches = list(loader)
    assert torch.equal(torch.cat([batch.images.rows for batch in batches]), want)
    assert loader.epoch == 1
    assert len(list(loader)) == len(batches)


def test_dali_gives_up_on_a_file_that_only_python_can_read(root: Path, absent: Callable) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    loader = loader_of(root, "val", "dali")
    file = absent(root / "val" / "dog" / "0001.jpg", 99)
    with pytest.raises(RuntimeError, match=re.escape(str(file))) as caught:
        rows_of(loader)
    assert str(caught.value).startswith("DALI failed at epoch 0, step 2: ")
    assert str(caught.value).endswith("; --dont-use-mmap does not map files into memory")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dont_use_mmap", [False, True])
def test_an_image_that_was_emptied_is_named(backend: str, dont_use_mmap: bool, root: Path) -> None:
    loader = loader_of(root, "val", backend, dont_use_mmap=dont_use_mmap)
    file = root / "val" / "dog" / "0001.jpg"
    file.write_bytes(b"")
    with pytest.raises(RuntimeError, match=re.escape(f"cannot decode {file}: ")):
        rows_of(loader)
