"""Parquet files: where images are found in them, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from archives import archived, write_parquet
from helpers import JPEG, PNG, make_image_folder
from rsfast.data import open_split
from rsfast.data.__main__ import main
from rsfast.data.convert import convert

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """9 training and 6 validation images of three classes, as files of their own."""
    return make_image_folder(tmp_path / "folder", ("cat", "dog", "eel"), train=3, val=2)


def test_compressed_parquet_warns_that_random_reads_cost_row_groups(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    data = archived(folder, tmp_path / "packed", "compressed_parquet")
    index = open_split(data, "train")
    assert (index.archive._contents.offsets < 0).all()
    assert "9 of 9 images in" in caplog.text
    assert "each read in random order costs a whole row group" in caplog.text
    assert "and 1 more files are compressed" in caplog.text
    assert "rsfast.data convert" in caplog.text
    caplog.clear()
    convert(data, tmp_path / "shards")
    monkeypatch.setenv("RANK", "1")
    open_split(data, "train")
    monkeypatch.delenv("RANK")
    assert "row group" not in caplog.text, "while converting, and by every rank"
    plain = open_split(archived(folder, tmp_path / "plain", "parquet"), "train")
    assert (plain.archive._contents.offsets >= 0).all()
    assert "row group" not in caplog.text


# Each: images, labels, names of the columns if not the usual ones, and what is said.
PARQUET_REFUSED = {
    "null_image": ([JPEG, None], [0, 1], "row 1 of row group 0 .* must hold an image, got null"),
    "null_label": ([JPEG, JPEG], [0, None], "must have a class number from 0, got None"),
    "negative_label": ([JPEG, JPEG], [0, -1], "must have a class number from 0, got -1"),
    "label_too_high": ([JPEG, JPEG], [0, 2], r"must be in \[0, 2\).*got 2$"),
}


@pytest.mark.parametrize("name", PARQUET_REFUSED)
def test_parquet_files_that_do_not_say_what_they_hold_are_refused(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    images, labels, message = PARQUET_REFUSED[name]
    file = tmp_path / "data" / "train" / "a.parquet"
    write_parquet(file, images, labels, classes=["cat", "dog"])
    with pytest.raises(ValueError, match=message):
        open_split(tmp_path / "data", "train")


def test_parquet_files_with_other_columns_or_cut_off_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    from pyarrow import parquet

    file = tmp_path / "data" / "train" / "a.parquet"
    file.parent.mkdir(parents=True)
    for columns, message in (
        ({"picture": [JPEG], "label": [0]}, "must have a column image, .* got the columns picture"),
        ({"image": ["a.jpg"], "label": [0]}, "must have a column image, of bytes"),
        ({"image": [JPEG]}, "must have a column label of whole numbers, got none"),
        ({"image": [JPEG], "label": ["cat"]}, "of whole numbers, got string"),
    ):
        parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(ValueError, match=message):
            open_split(tmp_path / "data", "train")
    parquet.write_table(pyarrow.table({"image": [JPEG], "label": [0]}), file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="Parquet file .* is cut off or damaged"):
        open_split(tmp_path / "data", "train")


def test_images_of_parquet_files_need_no_name_and_may_share_one(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    file = tmp_path / "data" / "train" / "a.parquet"
    names = ["x.jpg", "x.jpg", None]
    write_parquet(file, [JPEG, PNG, JPEG], [0, 1, 1], names, compression="none")
    index = open_split(tmp_path / "data", "train")
    assert len(set(index.paths)) == 3
    assert [index.read(row) for row in range(3)] == [JPEG, PNG, JPEG]
    assert index.class_names == ("0", "1")


def test_without_pyarrow_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "rsfast.data.parquet", raising=False)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.parquet").touch()
    with pytest.raises(ImportError, match=r"Parquet files need pyarrow: pip install .*parquet"):
        open_split(tmp_path, "train")
    assert main(["check", str(tmp_path)]) == 2
    assert "rsfast.data: error: Parquet files need pyarrow" in capsys.readouterr().err
