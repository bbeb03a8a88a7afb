"""Conversions between class folders, tar shards and Parquet files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
import torch

from archives import write_parquet, write_tar
from helpers import JPEG, PNG
from rsfast.data import convert as conversion
from rsfast.data import open_split, train_loader
from rsfast.data.__main__ import main
from rsfast.data.convert import convert

pytestmark = pytest.mark.usefixtures("cache")


def contents(root: Path) -> dict[str, bytes]:
    """Path below root to content."""
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def images_of(root: Path) -> list[tuple[bytes, int, str]]:
    """Content, label and class of every training image, in the order of the index."""
    index = open_split(root, "train")
    return [
        (index.read(row), label, index.class_names[label])
        for row, label in enumerate(index.labels.tolist())
    ]


def test_a_folder_becomes_shards_that_train_on_the_same_batches_and_back(
    folder: Path, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, back = tmp_path / "shards", tmp_path / "back"
    assert main(["convert", str(folder), str(shards), "--images-per-shard", "4"]) == 0
    assert main(["convert", str(shards), str(back)]) == 0
    assert capsys.readouterr().out.count("the same seed trains on the same batches") == 4
    ours, other = (
        list(train_loader(root, (32,), 4, backend=backend, workers=0)) for root in (shards, folder)
    )
    for a, b in zip(ours, other, strict=True):
        assert torch.equal(a.images.rows, b.images.rows)
        assert torch.equal(a.labels, b.labels)
    copies = contents(back)
    assert copies.pop("train/manifest.json")
    assert copies.pop("val/manifest.json")
    assert copies == contents(folder)


def test_the_manifest_says_what_each_shard_holds(folder: Path, tmp_path: Path) -> None:
    (train, val) = convert(folder, tmp_path / "shards", images_per_shard=4)
    assert (train.images, train.files, train.written, val.images) == (6, 2, 2, 4)
    manifest = json.loads((train.folder / "manifest.json").read_text())
    assert (manifest["images"], manifest["classes"]) == (6, ["cat", "dog"])
    assert [shard["images"] for shard in manifest["shards"]] == [4, 2]
    for shard in manifest["shards"]:
        content = (train.folder / shard["name"]).read_bytes()
        assert len(content) == shard["bytes"]
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]


def test_the_same_images_make_the_same_shards(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(folder, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards_end_before_they_exceed_their_size(folder: Path, tmp_path: Path) -> None:
    sizes = [len(image) for image, *_ in images_of(folder)]
    (train, _) = convert(folder, tmp_path / "shards", shard_bytes=sizes[0] + sizes[1])
    with tarfile.open(train.folder / "train-00000.tar") as tar:
        assert tar.getnames() == ["cat/0000.jpg", "cat/0000.cls", "cat/0001.jpg", "cat/0001.cls"]
    (tiny, _) = convert(folder, tmp_path / "tiny", shard_bytes=1)
    assert tiny.files == 6


def test_parquet_files_become_shards_with_their_class_names(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    names = ["tench, Tinca tinca", "a/b"]
    images = [image for image, *_ in images_of(folder)]
    file = tmp_path / "parquet" / "train" / "0.parquet"
    write_parquet(file, images, [1, 0, 1, 0, 1, 0], ["x.y.JPEG"] * 6, names, row_group_size=2)
    (done,) = convert(tmp_path / "parquet", tmp_path / "shards", images_per_shard=4)
    assert done.same_order
    assert images_of(tmp_path / "shards") == images_of(tmp_path / "parquet")
    (copy,) = convert(tmp_path / "shards", tmp_path / "folder2")
    assert not copy.same_order  # labels alternate, and a folder is sorted by class
    index = open_split(tmp_path / "folder2", "train")
    assert index.class_names == ("0_tench, Tinca tinca", "1_a_b")
    assert sorted(image for image, *_ in images_of(tmp_path / "folder2")) == sorted(images)


def test_an_interrupted_conversion_continues_and_leaves_no_half_shard(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = tmp_path / "whole"
    convert(folder, whole, images_per_shard=2)
    add, calls = conversion._add, []

    def interrupt(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        calls.append(name)
        if len(calls) == 7:  # in the second shard
            raise KeyboardInterrupt
        add(tar, name, content)

    monkeypatch.setattr(conversion, "_add", interrupt)
    command = ["convert", str(folder), str(tmp_path / "shards"), "--images-per-shard", "2"]
    assert main(command) == 130
    assert "the next convert continues" in capsys.readouterr().err
    train = tmp_path / "shards" / "train"
    assert sorted(f.name for f in train.iterdir()) == [
        "classes.txt",
        "manifest.json",
        "train-00000.tar",
    ]
    with pytest.raises(ValueError, match="holds a conversion that was interrupted: run it again"):
        open_split(tmp_path / "shards", "train")
    before = (train / "train-00000.tar").stat().st_mtime_ns
    monkeypatch.setattr(conversion, "_add", add)
    assert main(command) == 0
    assert "6 images in 3 files, 2 of them written now" in capsys.readouterr().out
    assert (train / "train-00000.tar").stat().st_mtime_ns == before
    assert contents(tmp_path / "shards") == contents(whole)


def test_a_shard_that_was_damaged_is_written_again(folder: Path, tmp_path: Path) -> None:
    (train, _) = convert(folder, tmp_path / "shards", images_per_shard=2)
    whole = contents(tmp_path / "shards")
    file = train.folder / "train-00001.tar"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    assert [done.written for done in convert(folder, tmp_path / "shards", images_per_shard=2)] == [
        1,
        0,
    ]
    assert contents(tmp_path / "shards") == whole


def test_what_is_not_read_back_as_it_was_written_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = conversion._add
    monkeypatch.setattr(conversion, "_add", lambda tar, name, c: add(tar, name, bytes(len(c))))
    with pytest.raises(OSError, match="cat/0000.jpg in .* was not read back as it was written"):
        convert(folder, tmp_path / "shards")
    assert not list((tmp_path / "shards").rglob("*.tar*"))


def test_a_shard_that_is_missing_or_foreign_is_refused_by_the_manifest(
    folder: Path, tmp_path: Path
) -> None:
    (train, _) = convert(folder, tmp_path / "shards", images_per_shard=2)
    last = train.folder / "train-00002.tar"
    moved = last.rename(tmp_path / last.name)
    with pytest.raises(
        ValueError, match=r"3 shards of its manifest.json, found no train-00002.tar"
    ):
        open_split(tmp_path / "shards", "train")
    moved.rename(last)
    write_tar(train.folder / "x.tar", [("a.jpg", JPEG), ("a.cls", b"0")])
    with pytest.raises(ValueError, match=r"x.tar must be as .*manifest.json says \(not in it\)"):
        open_split(tmp_path / "shards", "train")


def test_names_with_dots_sub_folders_and_doubles_stay_apart(tmp_path: Path) -> None:
    root = tmp_path / "folder" / "train" / "c.at"
    (root / "deep.er").mkdir(parents=True)
    for name in ("a.b.jpg", "a_b.jpg", "a_b__2.jpg", "a.b.PNG", "c.jpg", "deep.er/a.b.jpg"):
        (root / name).write_bytes(PNG if name.endswith("PNG") else JPEG)
    convert(tmp_path / "folder", tmp_path / "shards")
    assert len(images_of(tmp_path / "shards")) == 6
    assert images_of(tmp_path / "shards") == images_of(tmp_path / "folder")
    convert(tmp_path / "shards", tmp_path / "back")
    images = [image for image, *_ in images_of(tmp_path / "folder")]
    assert sorted(image for image, *_ in images_of(tmp_path / "back")) == sorted(images)


def test_images_of_parquet_files_get_an_extension_where_they_have_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    file = tmp_path / "parquet" / "train" / "0.parquet"
    write_parquet(file, [JPEG, PNG, JPEG], [0, 1, 0], ["img.0001", "img.0002", None])
    for form in ("shards", "folder"):
        convert(tmp_path / "parquet", tmp_path / form, to=form)
        found = {(image, label) for image, label, _ in images_of(tmp_path / form)}
        assert found == {(JPEG, 0), (PNG, 1)}
        assert len(images_of(tmp_path / form)) == 3


def test_an_image_that_changed_makes_another_conversion(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "shards")
    (folder / "train" / "cat" / "0000.jpg").write_bytes(PNG)
    with pytest.raises(ValueError, match="a part of the same conversion, got one of other images"):
        convert(folder, tmp_path / "shards")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "out"], "data folder .*nowhere does not exist$"),
        (["folder", "folder"], "DST must be a folder apart from SRC"),
        (["folder", "folder/train/x"], "DST must be a folder apart from SRC"),
        (["folder", "folder/out"], "DST must be a folder apart from SRC"),
        (["folder", "out", "--val-list", "x"], "--val-list holds the labels of a val/ without"),
        (["folder", "full"], "DST .*full/train must be empty, got a folder with notes.txt$"),
        (
            ["folder", "out", "--shard-size", "much"],
            "--shard-size must look like 256MB, got 'much'",
        ),
        (["folder", "out", "--shard-size", "0"], "--shard-size must look like 256MB, got '0'"),
        (["folder", "out", "--images-per-shard", "0"], "--images-per-shard must be at least 1"),
        (["folder", "part"], "must be empty or hold a part of the same conversion"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_conversions_that_make_no_sense_exit_with_two_and_a_sentence(
    argv: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "full" / "train").mkdir(parents=True)
    (folder.parent / "full" / "train" / "notes.txt").touch()
    convert("folder", "part", images_per_shard=1)
    assert main(["convert", *argv]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "count"), [("256MB", 2**28), ("1GiB", 2**30), ("1.5k", 1536), ("1000", 1000)]
)
def test_sizes_are_powers_of_1024(text: str, count: int) -> None:
    assert conversion.parse_size(text) == count


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_images_left_out_by_hand_are_not_converted(
    form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, path = folder, "train/cat/0001.jpg"
    if form == "shards":
        convert(folder, tmp_path / "source", images_per_shard=2)
        source, path = tmp_path / "source", "train/train-00000.tar/cat/0001.jpg"
    assert main(["exclude", str(source), path]) == 0
    expected = images_of(source)
    assert len(expected) == 5
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/out/train: images excluded by hand in SRC, and left out: 1\n" in said
    assert said.count("left out: ") == 1
    assert images_of(tmp_path / "out") == expected
    names = [str(file.relative_to(folder)) for file in folder.glob("train/*/*.jpg")]
    if form == "folder":
        assert main(["exclude", str(source), *(name for name in names if name != path)]) == 0
        with pytest.raises(
            ValueError, match=r"must hold an image that can be read and is not excl"
        ):
            convert(source, tmp_path / "none")


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_files_that_cannot_be_opened_are_left_out_and_counted_and_bad_images_copied(
    form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train" / "cat" / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    os.mkfifo(folder / "train" / "dog" / "pipe.jpg")
    bad = folder / "train" / "dog" / "0000.jpg"
    bad.write_bytes(b"no image")
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--to", form]) == 0
    said = capsys.readouterr().out
    assert (
        f"{out}/train: files of SRC that cannot be opened, and left out: 2, the first is "
        f"cat/gone.jpg\n"
    ) in said
    assert f"{out}/val: files" not in said
    assert said.startswith(f"{out}/train: 6 images")
    assert any(b"no image" in content for content in contents(out).values())
    assert len(open_split(out, "train")) == 5
