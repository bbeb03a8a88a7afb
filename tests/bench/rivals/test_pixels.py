"""What colours and places of pixels say of their classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.rivals import pixels

IGNORED = 9


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Black above white; labels 0 in the upper three quarters, 1 below, and ignored on the left.

    The validation image is the same but for a row of grey, which no training image has.
    """
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for split in ("train", "val"):
        image = np.zeros((64, 32, 3), dtype=np.uint8)
        image[32:] = 255
        if split == "val":
            image[-1] = 128
        mask = np.zeros((64, 32), dtype=np.uint8)
        mask[48:] = 1
        mask[:, :4] = IGNORED
        for folder, array in ((split, image), (f"{split}annot", mask)):
            (tmp_path / folder).mkdir()
            Image.fromarray(array).save(tmp_path / folder / "0.png")
    return tmp_path


def test_floors_are_the_commonest_class_of_all_pixels_of_a_colour_and_of_a_place(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pixels.main(["--data", str(root), "--ignore-label", str(IGNORED)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "floor,pixel,mean,iou"
    found = {name: list(map(float, rest)) for name, *rest in (line.split(",") for line in lines)}
    # White is as often 0 as 1: the first of them.
    assert found["constant"] == found["colour"] == [75.0, 50.0, 37.5]
    assert found["place"] == [100.0, 100.0, 100.0]


def test_a_colour_is_told_by_its_pixels_and_one_that_was_never_seen_by_all(root: Path) -> None:
    mask = np.zeros((64, 32), dtype=np.uint8)
    mask[32:] = 1
    mask[:, :4] = IGNORED
    Image.fromarray(mask).save(root / "trainannot" / "0.png")
    mask[:] = 0
    mask[32:63] = 1
    Image.fromarray(mask).save(root / "valannot" / "0.png")
    train, val = (pixels.open_pairs(root, s, ignore_label=IGNORED) for s in ("train", "val"))
    assert pixels.figures(train, val, "colour", IGNORED) == (100.0, 100.0, 100.0)
    assert pixels.figures(train, val, "constant", IGNORED)[1] == 50.0
