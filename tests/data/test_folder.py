"""The index of an image folder: contents, cache, and what is said about folders it cannot use."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import make_image_folder, smooth_image
from rsfast.data import folder
from rsfast.data.cache import cache_root
from rsfast.data.folder import FolderIndex, index_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six JPEGs of different sizes: three cats, three dogs."""
    return make_image_folder(tmp_path / "set", train=3, val=0) / "train"


@pytest.fixture
def no_header_is_read(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def refuse(file: Path) -> None:
        raise AssertionError(f"{file} was opened")

    monkeypatch.setattr(folder, "_header_size", refuse)
    return monkeypatch


def contents(index: FolderIndex) -> tuple:
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
