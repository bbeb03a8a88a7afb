"""Cut-off images that are used as far as they can be decoded, where that is asked for."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from helpers import JPEG, PNG, encoded, make_image_folder, smooth_image
from rsfast.data import Loader, index_folder, val_loader
from rsfast.data.__main__ import main
from rsfast.data.cache import cache_root
from rsfast.data.check import check_split

TALL = smooth_image(160, 200, np.random.default_rng(1))
EXIF = Image.Exif()
EXIF[0x0112] = 6
WHOLE = encoded(TALL, "JPEG", quality=90)
# File name to content; the last two can be decoded in no part.
CUT_OFF = {
    "half.jpg": WHOLE[: len(WHOLE) // 2],
    "turned.jpg": encoded(TALL, "JPEG", exif=EXIF)[: len(WHOLE) // 2],
    "without_end.jpg": JPEG[:-2],
    "half.png": PNG[: len(PNG) // 2],
    "head.jpg": WHOLE[:20],
    "half.webp": encoded(TALL, "WEBP")[:-900],
}
USED = ("half.jpg", "half.png", "turned.jpg", "without_end.jpg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two good images of each class and the cut-off ones, checked."""
    root = make_image_folder(tmp_path / "images", train=2, val=2)
    for name, content in CUT_OFF.items():
        (root / "val" / "cat" / name).write_bytes(content)
    check_split(root / "val", workers=1)
    return root


def validation(root: Path, backend: str, **arguments) -> Loader:
    arguments = {"tolerate_truncated": True, "normalize": "none", "crop": "none", **arguments}
    return val_loader(root, (48,), 3, backend=backend, workers=0, **arguments)


def images_of(loader: Loader) -> dict[str, torch.Tensor]:
    """File name -> [3, 48, 48] from 0 to 255."""
    images = torch.cat([batch.images.level(0) for batch in loader])
    names = [os.path.basename(path) for path in loader.plan.index.paths]
    return dict(zip(names, (255 * images).round(), strict=True))


def test_cut_off_images_are_used_where_that_is_asked_for(root: Path) -> None:
    plain = index_folder(root / "val")
    assert len(plain) == 4
    assert plain.copies is None
    tolerant = index_folder(root / "val", tolerate_truncated=True, strict=False)
    assert {os.path.basename(path) for path in set(tolerant.paths) - set(plain.paths)} == {*USED}
    assert len(tolerant.copies) == 4
    assert tolerant.digest != plain.digest
    for path, size in zip(tolerant.paths, tolerant.sizes.tolist(), strict=True):
        with Image.open(root / "val" / path) as image:
            assert size == [image.height, image.width]


def test_the_picture_is_there_up_to_where_the_file_ends(backend: str, root: Path) -> None:
    images = images_of(validation(root, backend))
    expected = TALL.resize((48, 48), Image.Resampling.BILINEAR)
    error = images["half.jpg"].permute(1, 2, 0) - torch.tensor(np.asarray(expected).astype("f4"))
    rows = error.abs().mean((1, 2))
    assert rows[:12].max() < 5
    assert rows[-6:].min() > 15
    assert images["half.jpg"][:, -4:].std() < 1  # one colour


def test_both_loaders_show_the_same_of_them(root: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    for exif in ("ignore", "honour"):
        ours, other = (images_of(validation(root, name, exif=exif)) for name in ("dali", "pil"))
        assert {*USED} < set(ours)
        for name in ours:
            error = (ours[name] - other[name]).abs()[:, 1:-1, 1:-1]
            assert error.max() <= (1 if name in USED else 2), name


def test_a_copy_keeps_the_orientation(backend: str, root: Path) -> None:
    index = validation(root, backend, exif="honour").plan.index
    assert index.sizes[index.paths.index("cat/turned.jpg")].tolist() == [200, 160]


def test_copies_are_made_once_and_told_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = set((cache_root() / "repaired").glob("*"))
    caplog.set_level(logging.WARNING)
    copies = index_folder(root / "val", tolerate_truncated=True).copies
    said = f"4 cut-off images in {root / 'val'} are used as far as they can be decoded"
    assert said in caplog.text
    assert "2 of 10 files" in caplog.text  # left out all the same
    made = set((cache_root() / "repaired").glob("*")) - before
    assert {Path(copy) for copy in copies.values()} == made
    times = {file: file.stat().st_mtime_ns for file in made}
    assert index_folder(root / "val", tolerate_truncated=True).copies == copies
    assert {file: file.stat().st_mtime_ns for file in made} == times


def test_a_strict_run_minds_only_what_is_not_tolerated(root: Path) -> None:
    with pytest.raises(ValueError, match="found 2, the first is cat/half.webp"):
        index_folder(root / "val", strict=True, tolerate_truncated=True)
    for name in ("head.jpg", "half.webp"):
        (root / "val" / "cat" / name).unlink()
    assert len(index_folder(root / "val", strict=True, tolerate_truncated=True)) == 8


def test_pillow_stays_as_strict_as_it_was(root: Path) -> None:
    index_folder(root / "val", tolerate_truncated=True)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_folder_that_was_never_checked_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"^tolerate_truncated needs to know .*data check "):
        index_folder(root / "train", tolerate_truncated=True)


def test_a_cache_that_cannot_be_written_is_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rsfast.data.repairing.os.replace", refuse)
    with pytest.raises(ValueError, match="must be writable for tolerate_truncated: .*denied"):
        index_folder(root / "val", tolerate_truncated=True)
    assert not list((cache_root() / "repaired").glob(".*"))


def test_people_are_told_the_file_and_not_its_copy(
    backend: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "cache"))
    check_split(root / "val", workers=1)
    loader = validation(root, backend)
    index = loader.plan.index
    file = root / "val" / "cat" / "half.jpg"
    copy = Path(index.copies["cat/half.jpg"])
    whole = copy.read_bytes()
    copy.write_bytes(whole[:200])
    with pytest.raises(RuntimeError, match=f"decode {file}: .*; to leave it out: ") as caught:
        list(loader)
    assert str(copy) not in str(caught.value)
    command = shlex.split(str(caught.value).rpartition(": ")[2])[3:]
    assert main(command) == 0
    assert "cat/half.jpg" not in index_folder(root / "val", tolerate_truncated=True).paths
    copy.unlink()
    with pytest.raises(RuntimeError, match=f"^the repaired copy {copy} of {file} is gone: start"):
        list(loader)
    assert main([*command, "--undo"]) == 0
    assert len(list(validation(root, backend))) == len(loader)
    assert copy.read_bytes() == whole
