"""The index of an image folder: contents, cache, and what is said about folders it cannot use."""

from __future__ import annotations

import io
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import JPEG, PNG, cut, make_image_folder, smooth_image
from rsfast.data import folder, train_loader, val_loader
from rsfast.data.__main__ import main
from rsfast.data.cache import cache_root
from rsfast.data.check import check_split
from rsfast.data.folder import index_folder
from rsfast.data.index import ImageIndex

# Python 3.12 says so of every fork beside a thread; the workers of the check only decode.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set whose path must be quoted: 6 training and 4 validation images of two classes."""
    return make_image_folder(tmp_path / "my set", train=3, val=2)


@pytest.fixture
def root(data: Path) -> Path:
    """Six JPEGs of different sizes: three cats, three dogs."""
    return data / "train"


@pytest.fixture
def no_header_is_read(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def refuse(file: Path) -> None:
        raise AssertionError(f"{file} was opened")

    monkeypatch.setattr(folder, "_header_size", refuse)
    return monkeypatch


def contents(index: ImageIndex) -> tuple:
    return (
        index.root,
        index.paths,
        index.labels.tolist(),
        index.sizes.tolist(),
        index.class_names,
    )


def archive_of(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def test_index_lists_every_image_by_class_and_name(root: Path) -> None:
    index = index_folder(root)
    assert index.class_names == ("cat", "dog")
    assert index.paths == tuple(f"{name}/000{n}.jpg" for name in ("cat", "dog") for n in range(3))
    assert index.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.labels.dtype == np.int64
    assert len(index) == 6
    assert index.path(4) == str(root / "dog" / "0001.jpg")


def test_sizes_are_height_and_width_of_each_file(root: Path) -> None:
    index = index_folder(root)
    assert index.sizes.dtype == np.int32
    assert len({tuple(size) for size in index.sizes.tolist()}) > 3  # the files differ
    for path, (height, width) in zip(index.paths, index.sizes.tolist(), strict=True):
        with Image.open(root / path) as image:
            assert (width, height) == image.size


def test_sizes_are_those_stored_whatever_the_exif_rotation_says(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    smooth_image(40, 60, np.random.default_rng(0)).save(root / "cat" / "0000.jpg", exif=exif)
    assert index_folder(root).sizes[0].tolist() == [40, 60]


def test_a_relative_root_gives_absolute_paths(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    assert contents(index_folder("train")) == contents(index_folder(root))


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.JPEG", "a.JpG", "a.webp", "a.bmp"])
def test_every_image_extension_is_found_in_any_case(root: Path, name: str) -> None:
    smooth_image(20, 30, np.random.default_rng(0)).save(root / "cat" / name)
    index = index_folder(root)
    assert index.sizes[index.paths.index(f"cat/{name}")].tolist() == [20, 30]


def test_files_that_are_no_images_by_name_are_ignored_without_a_word(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(index_folder(root))
    (root / "cat" / "notes.txt").write_text("a cat")
    (root / "list.csv").write_text("a,b")
    assert contents(index_folder(root)) == before
    assert caplog.records == []


def test_images_in_sub_folders_and_behind_links_belong_to_the_class(
    root: Path, tmp_path: Path
) -> None:
    image = smooth_image(20, 30, np.random.default_rng(0))
    places = [root / "cat" / str(number) for number in range(9)]
    for place in (*places, tmp_path / "elsewhere"):
        place.mkdir()
        image.save(place / "a.jpg")
    (root / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "emu").symlink_to(tmp_path / "elsewhere")
    index = index_folder(root)
    assert index.class_names == ("cat", "dog", "emu")
    assert index.paths[3:12] == tuple(f"cat/{number}/a.jpg" for number in range(9))
    assert index.paths[-2:] == ("dog/more/a.jpg", "emu/a.jpg")
    assert index.labels.tolist() == [0] * 12 + [1] * 4 + [2]


def test_a_second_call_reads_no_header(root: Path, request: pytest.FixtureRequest) -> None:
    first = contents(index_folder(root))
    request.getfixturevalue("no_header_is_read")
    assert contents(index_folder(root)) == first


def test_the_cache_lies_in_the_cache_folder_and_can_be_turned_off(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "cache"))
    without = contents(index_folder(root, cache=False))
    assert not (tmp_path / "cache").exists()
    assert contents(index_folder(root)) == without
    assert [file.suffix for file in (cache_root() / "index").iterdir()] == [".npz"]
    monkeypatch.setattr(folder, "_read_sizes", lambda root, paths, workers: np.ones((6, 2), int))
    assert index_folder(root, cache=False).sizes.tolist() == [[1, 1]] * 6


def test_an_added_file_invalidates_the_cache(root: Path) -> None:
    index_folder(root)
    smooth_image(20, 30, np.random.default_rng(0)).save(root / "cat" / "9999.jpg")
    index = index_folder(root)
    assert index.paths[3] == "cat/9999.jpg"
    assert index.sizes[3].tolist() == [20, 30]
    assert index.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_removed_file_invalidates_the_cache(root: Path) -> None:
    before = index_folder(root)
    (root / "cat" / "0001.jpg").unlink()
    after = index_folder(root)
    assert after.paths == before.paths[:1] + before.paths[2:]
    assert after.sizes.tolist() == np.delete(before.sizes, 1, axis=0).tolist()


def test_a_renamed_file_invalidates_the_cache_even_if_the_folders_time_is_set_back(
    root: Path,
) -> None:
    os.utime(root / "cat", ns=(0, 0))
    before = index_folder(root)
    (root / "cat" / "0000.jpg").rename(root / "cat" / "9999.jpg")
    os.utime(root / "cat", ns=(0, 0))
    after = index_folder(root)
    assert after.paths[:3] == (*before.paths[1:3], "cat/9999.jpg")
    assert after.sizes.tolist() == before.sizes[[1, 2, 0, 3, 4, 5]].tolist()


def test_a_file_replaced_under_its_old_name_invalidates_the_cache(root: Path) -> None:
    os.utime(root / "cat", ns=(0, 0))  # so that the clock's resolution plays no part
    index_folder(root)
    (root / "cat" / "0001.jpg").unlink()
    smooth_image(20, 30, np.random.default_rng(0)).save(root / "cat" / "0001.jpg")
    assert index_folder(root).sizes[1].tolist() == [20, 30]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"no archive", id="garbage"),
        pytest.param(lambda content: content[: len(content) // 2], id="cut"),
        pytest.param(lambda content: content[:60] + b"\0" * 8 + content[68:], id="corrupt"),
        pytest.param(lambda content: content.replace(b"sizes", b"other"), id="another_array"),
        pytest.param(lambda content: archive_of(sizes=np.ones((5, 2))), id="another_shape"),
    ],
)
def test_a_damaged_cache_file_is_made_again(
    damage, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "cache"))
    first = contents(index_folder(root))
    (file,) = (cache_root() / "index").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert contents(index_folder(root)) == first
    assert file.read_bytes() == whole


def test_a_cache_folder_that_cannot_be_written_costs_only_a_warning(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "file"))
    assert len(index_folder(root)) == 6
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "not cached" in record.getMessage()


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\xff\xd8\xff\xe0"], ids=["empty", "text", "header_only"]
)
def test_an_unreadable_file_is_left_out_with_a_warning_that_names_it(
    root: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    good = index_folder(root)
    (root / "cat" / "0001a.jpg").write_bytes(content)
    for _ in ("read", "from the cache"):
        caplog.clear()
        assert contents(index_folder(root)) == contents(good)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "1 of 7 files" in record.getMessage()
        assert "cat/0001a.jpg" in record.getMessage()
        assert str(root) in record.getMessage()


def test_many_unreadable_files_are_counted_and_the_first_five_named(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(7):
        (root / "dog" / f"bad{number}.png").touch()
    index_folder(root)
    (record,) = caplog.records
    assert "7 of 13 files" in record.getMessage()
    assert record.getMessage().endswith("dog/bad3.png, dog/bad4.png, ...")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist$"):
        index_folder(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data folder .*file"):
        index_folder(tmp_path / "file")


def test_a_folder_without_class_folders_is_named(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    smooth_image(20, 30, np.random.default_rng(0)).save(tmp_path / "flat" / "0.jpg")
    with pytest.raises(ValueError, match=r"flat must have one sub-folder per class, found none$"):
        index_folder(tmp_path / "flat")


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["empty.jpg"]], ids=str)
def test_a_class_folder_without_a_readable_image_is_named(root: Path, files: list[str]) -> None:
    (root / "eel").mkdir()
    for name in files:
        (root / "eel" / name).touch()
    with pytest.raises(ValueError, match=r"train/eel must hold at least one image .*found none$"):
        index_folder(root)


def test_an_image_of_a_kind_that_no_loader_decodes_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_image_folder(tmp_path, train=2, val=2)
    Image.new("RGB", (40, 30)).save(tmp_path / "val" / "dog" / "0001.jpg", format="GIF")
    index = index_folder(tmp_path / "val")
    assert len(index) == 3
    assert "dog/0001.jpg" in caplog.text


def test_the_record_holds_after_the_listing_has_changed(data: Path) -> None:
    cut(data / "train" / "cat" / "0001.jpg")
    check_split(data / "train")
    (data / "train" / "cat" / "0000.jpg").unlink()
    (data / "train" / "dog" / "added.png").write_bytes(PNG)
    paths = index_folder(data / "train").paths
    assert paths == ("cat/0002.jpg", *(f"dog/000{n}.jpg" for n in range(3)), "dog/added.png")


def test_the_record_is_found_under_any_spelling_of_the_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(data / "train" / "cat" / "0001.jpg")
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(data)
    check_split("train")
    for spelling in ("train", data / "train", tmp_path / "link" / "train", "val/../train"):
        assert len(index_folder(spelling)) == 5


@pytest.mark.parametrize("broken", [b"", JPEG[:-300]], ids=["empty", "truncated"])
@pytest.mark.parametrize("checked_again", [False, True])
def test_a_repaired_file_comes_back_with_its_size(
    data: Path, broken: bytes, checked_again: bool
) -> None:
    file = data / "train" / "cat" / "0001.jpg"
    file.write_bytes(broken)
    check_split(data / "train")
    assert "cat/0001.jpg" not in index_folder(data / "train").paths
    smooth_image(44, 33, np.random.default_rng(0)).save(file)
    for _ in range(2):
        index = index_folder(data / "train")
        assert index.sizes[index.paths.index("cat/0001.jpg")].tolist() == [44, 33]
        if checked_again:
            assert check_split(data / "train").findings == []


def test_a_bad_file_that_is_replaced_by_another_bad_one_stays_out(data: Path) -> None:
    file = cut(data / "train" / "cat" / "0001.jpg")
    check_split(data / "train")
    file.write_bytes(b"no image either")
    assert "cat/0001.jpg" not in index_folder(data / "train").paths


def test_strict_refuses_bad_files_and_says_how_to_list_them(data: Path) -> None:
    for make in (train_loader, val_loader):
        make(data, (32, 16), 2, backend="pil", workers=0, strict=True)
    for name in ("0001.jpg", "0002.jpg"):
        cut(data / "train" / "cat" / name)
    cut(data / "val" / "dog" / "0000.jpg")
    assert main(["check", str(data)]) == 1
    for make, count, first in ((train_loader, 2, "cat/0001.jpg"), (val_loader, 1, "dog/0000.jpg")):
        rule = f"no bad image when strict, found {count}, the first is {first}"
        command = f"python -m rsfast.data check '{data}'"
        with pytest.raises(ValueError, match=f"{rule}.*{re.escape(command)}$"):
            make(data, (32, 16), 2, backend="pil", strict=True)
        make(data, (32, 16), 2, backend="pil")
    excluded = ["train/cat/0001.jpg", "train/cat/0002.jpg", "val/dog/0000.jpg"]
    assert main(["exclude", str(data), *excluded]) == 0
    assert len(index_folder(data / "train", strict=True)) == 4


def test_strict_refuses_a_damaged_header_without_a_check(data: Path) -> None:
    (data / "val" / "dog" / "0000.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"found 1, the first is dog/0000\.jpg"):
        index_folder(data / "val", strict=True)


def test_excluded_files_are_left_out_until_it_is_undone(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data / "val")
    files = ["train/cat/0000.jpg", str(data / "train" / "dog" / "0002.jpg"), "dog/0001.jpg"]
    assert main(["exclude", str(data), *files]) == 0
    assert "train: files left out by hand: 2" in capsys.readouterr().out
    left = ("cat/0001.jpg", "cat/0002.jpg", "dog/0000.jpg", "dog/0001.jpg")
    assert index_folder(data / "train").paths == left
    assert len(index_folder(data / "val")) == 3
    (data / "train" / "cat" / "0000.jpg").write_bytes(JPEG)  # a change does not undo it
    assert index_folder(data / "train").paths == left
    assert main(["check", str(data)]) == 0
    out = capsys.readouterr().out
    assert out.count("excluded  ") == 3
    assert "excluded  train/cat/0000.jpg  by hand" in out
    assert main(["exclude", "--undo", str(data / "train"), "cat/0000.jpg"]) == 0
    assert index_folder(data / "train").paths == ("cat/0000.jpg", *left)
    assert main(["exclude", "--undo", str(data / "train"), "cat/0000.jpg"]) == 2
    assert "must be a file that is excluded, got cat/0000.jpg" in capsys.readouterr().err


def test_a_bad_file_that_is_excluded_is_settled(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(data / "val" / "dog" / "0001.jpg")
    assert main(["check", str(data)]) == 1
    assert main(["exclude", str(data), "val/dog/0001.jpg"]) == 0
    capsys.readouterr()
    assert main(["check", str(data)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"excluded  val/dog/0001.jpg  by hand; bad: .*truncated", out)


def test_a_folder_that_cannot_be_read_is_an_error_not_an_empty_class(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # tests may run as data
    with pytest.raises(ValueError, match="train/cat must be readable: Permission denied$"):
        index_folder(data / "train")
