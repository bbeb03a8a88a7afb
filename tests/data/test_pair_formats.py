"""Files beside images and masks that are neither, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mask_helpers import make_mask_folder
from rsfast.data import open_pairs, open_split
from rsfast.data.__main__ import main

# Python 3.12 says so of every fork beside a thread; the workers of the check only decode.
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]


def checked(root: Path, capsys: pytest.CaptureFixture[str], *, code: int) -> str:
    """What the check of a data set prints."""
    found = main(["check", str(root)])
    said = capsys.readouterr()
    assert found == code, said
    return said.out + said.err


def test_a_mask_of_another_format_is_named_with_its_image(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = pairs / "trainannot" / "0000.png"
    Image.open(mask).save(mask.with_suffix(".jpg"))
    assert "unused    trainannot/0000.jpg" in checked(pairs, capsys, code=0)
    mask.unlink()
    said = checked(pairs, capsys, code=1)
    assert (
        "bad       train/0000.jpg  no mask trainannot/0000.png (0000.jpg is none: masks must be "
        "PNG, JPEG loses labels)\n"
    ) in said
    assert "trainannot/0000.jpg  " not in said


def test_what_no_loader_reads_and_what_is_hidden_is_no_part_and_said(
    pairs: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    image = Image.open(pairs / "train" / "0000.jpg")
    image.save(pairs / "train" / "extra.gif")
    image.save(pairs / "train" / ".hidden.jpg")
    (pairs / "train" / ".cache").mkdir()
    said = checked(pairs, capsys, code=0)
    for name in (".hidden.jpg", ".cache", "extra.gif"):
        assert f"unused    train/{name}" in said
    open_pairs(pairs, "train")
    assert "not every loader reads are no part of the data set: 1 .gif" in caplog.text
    assert "2 files or folders" in caplog.text
    assert f"{pairs / 'train'} are passed over, being hidden or visited already" in caplog.text


def test_masks_under_a_network_of_classes_name_the_task(tmp_path: Path) -> None:
    root = make_mask_folder(tmp_path / "masks")
    with pytest.raises(ValueError, match="trainannot holds, are of segmentation: --arch refinenet"):
        open_split(root, "train")
