"""Validation images in one folder, with a list of their labels."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from archives import samples_of, write_tar
from helpers import cut
from rsfast.data import index_folder, open_split, val_loader
from rsfast.data.__main__ import main

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def flat(folder: Path) -> Path:
    """The data set with its four validation images in one folder: a.jpg ... d.jpg."""
    for number, path in enumerate(sorted((folder / "val").glob("*/*.jpg"))):
        path.rename(folder / "val" / f"{'abcd'[number]}.jpg")
    for name in ("cat", "dog"):
        (folder / "val" / name).rmdir()
    return folder


@pytest.mark.parametrize(
    "lines",
    [
        "b.jpg dog\na.jpg cat\nd.jpg cat\nc.jpg dog\n",
        "b.jpg 1\na.jpg 0\nd.jpg 0\nc.jpg 1\n",
        "\ufeffa.jpg,cat\nb.jpg, dog\nd.jpg,cat\nc.jpg,dog\n",
        "cat\ndog\ndog\ncat\n",
        "0\n1\n1\n0\n",
    ],
    ids=["names", "numbers", "commas", "names_in_order", "numbers_in_order"],
)
def test_a_flat_folder_takes_its_labels_from_a_list(
    lines: str, flat: Path, backend: str, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text(lines)
    loader = val_loader(
        flat, (32,), 4, backend=backend, workers=0, labels=str(tmp_path / "list.txt")
    )
    (batch,) = loader
    assert batch.labels.tolist() == [0, 1, 1, 0]
    assert loader.class_names == ("cat", "dog") == index_folder(flat / "train").class_names
    assert loader.plan.index.paths == ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1\n2\n2\n1\n", "classes from 0, got 1 to 2. Those of ILSVRC2012_validation_ground_truth"),
        ("1\n1\n1\n1\n", "classes from 0, got 1 to 1. Those of ILSVRC2012"),
        ("0\n1\n2\n1\n", "must be those of the 2 classes from 0, got 0 to 2 in line 3"),
        (
            "cat\ndog\n0\ncat\n",
            r"line 3 of .*list.txt: label '0' is a number, and line 1 has a name",
        ),
        ("cat\n\ndog\nemu\ncat\n", "line 4 of .*list.txt: label 'emu' is none of the 2 classes$"),
        ("a cat\nb dog\nc cat\nd cat", "line 1 of .* none of the 2 classes, and no image called a"),
        ("cat\ndog\ncat\n", "must have a line for each of the 4 images in .*, got 3$"),
        ("a.jpg cat\nb.jpg dog\nc.jpg cat\n", "name each image of .* once, 1 are missing.* d.jpg"),
        (
            "a.jpg cat\na.jpg dog\nb.jpg cat\nc.jpg cat\nd.jpg cat",
            "line 2 of .*: image a.jpg comes twice, first in line 1$",
        ),
        (
            "a.jpg cat\nb.jpg cat\nc.jpg cat\nd.jpg cat\ne.jpg cat",
            "line 5 of .*: no image called e.jpg",
        ),
        ("x.jpg\tcat\nb.jpg\tdog\n", "line 1 of .*list.txt: no image called x.jpg in .*val$"),
        ("a.jpg cat\ncat\nc.jpg cat\nd.jpg cat", "line 2 of .* must be `file label` as other"),
        ("", "must have a line for each of the 4 images in .*, got 0$"),
    ],
)
def test_lists_that_do_not_say_the_label_of_each_image_are_refused(
    lines: str, message: str, flat: Path
) -> None:
    (flat / "list.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        open_split(flat, "val", labels=flat / "list.txt")


def test_validation_images_without_a_list_are_counted_and_the_flag_is_named(flat: Path) -> None:
    with pytest.raises(ValueError, match="found none; it holds 4 images: --val-list FILE reads"):
        open_split(flat, "val")


def test_numbers_that_are_names_of_other_classes_are_refused(flat: Path) -> None:
    (flat / "list.txt").write_text("0\n1\n1\n0\n")
    (flat / "classes.txt").write_text("1\n0\n")
    with pytest.raises(ValueError, match="must not be names of classes, too"):
        open_split(flat, "val", labels=flat / "list.txt")
    (flat / "classes.txt").write_text("0\n1\n")
    assert open_split(flat, "val", labels=flat / "list.txt").labels.tolist() == [0, 1, 1, 0]


def test_a_list_that_cannot_be_read_or_goes_with_a_pattern_is_refused(flat: Path) -> None:
    with pytest.raises(ValueError, match="none.txt must be a text file that can be read"):
        open_split(flat, "val", labels=flat / "none.txt")
    shard = write_tar(flat / "x.tar", samples_of(flat / "train"))
    with pytest.raises(
        ValueError, match="list of labels goes with a folder of images, got .*x.tar"
    ):
        open_split(str(shard), "val", labels=flat / "none.txt")


def test_a_flat_folder_is_checked_and_an_image_of_it_left_out(
    flat: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (flat / "list.txt").write_text("cat\ndog\ndog\ncat\n")
    cut(flat / "val" / "b.jpg")

    def labels() -> list[int]:
        loader = val_loader(
            flat, (32,), 4, backend=backend, workers=0, labels=str(flat / "list.txt")
        )
        (batch,) = loader
        return batch.labels.tolist()

    with pytest.raises(RuntimeError, match="cannot decode .*val/b.jpg") as caught:
        labels()
    assert main(["check", str(flat)]) == 1
    out = capsys.readouterr().out
    assert "bad       val/b.jpg" in out
    assert "train: 6 images, 0 bad" in out
    assert labels() == [0, 1, 0]
    command = shlex.split(re.search("; to leave it out: (.*)$", str(caught.value))[1])[3:]
    assert main(command) == 0
    assert main(["exclude", str(flat), str(flat / "val" / "a.jpg"), "train/cat/0000.jpg"]) == 0
    assert labels() == [1, 0]
    assert len(index_folder(flat / "train")) == 5
    assert main(["exclude", str(flat), "val/z.jpg"]) == 2
    assert main(["convert", str(flat), str(flat.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert "class folders or archives, got images alone; --val-list FILE reads their" in error
    assert not (flat.parent / "out").exists(), "all splits are looked at before one is written"


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_a_flat_folder_is_converted_with_its_list(form: str, flat: Path, tmp_path: Path) -> None:
    labels = tmp_path / "list.txt"
    labels.write_text("b.jpg dog\na.jpg cat\nd.jpg cat\nc.jpg dog\n")
    out = tmp_path / "out"
    assert main(["convert", str(flat), str(out), "--to", form, "--val-list", str(labels)]) == 0
    expected = open_split(flat, "val", labels=labels)
    found = open_split(out, "val")
    assert found.class_names == expected.class_names == ("cat", "dog")
    assert {(found.read(row), label) for row, label in enumerate(found.labels.tolist())} == {
        (expected.read(row), label) for row, label in enumerate(expected.labels.tolist())
    }
    assert len(found) == 4
