"""Images in tar shards and Parquet files: what an index holds of them, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import multiprocessing
import os
import pickle
import re
import shlex
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from archives import samples_of, write_parquet, write_tar
from helpers import JPEG, PNG, cut, make_image_folder
from rsfast.data import archive, index_folder, open_split, train_loader, val_loader
from rsfast.data.__main__ import main
from rsfast.data.check import check_split
from rsfast.data.dataset import find_splits

# Python 3.12 says so of every fork beside a thread; the workers only decode.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
FORMS = ["shards", "parquet", "compressed_parquet"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """9 training and 6 validation images of three classes, as files of their own."""
    return make_image_folder(tmp_path / "folder", ("cat", "dog", "eel"), train=3, val=2)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """How archives hold the images."""
    if request.param != "shards":
        pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    return request.param


def archived(folder: Path, to: Path, form: str) -> Path:
    """The same images, in the same order, two archives per split; the path must be quoted."""
    for split in ("train", "val"):
        index = index_folder(folder / split)
        half = len(index) // 2
        for number, rows in enumerate((range(half), range(half, len(index)))):
            name = f"{split}-{number:05d}-of-00002"
            if form == "shards":
                members = samples_of(folder / split)[2 * rows.start : 2 * rows.stop]
                write_tar(to / split / f"{name}.tar", members)
                (to / split / "classes.txt").write_text("cat\ndog\neel\n")
                continue
            write_parquet(
                to / split / f"{name}.parquet",
                [index.read(row) for row in rows],
                index.labels[rows].tolist(),
                [index.paths[row] for row in rows],
                index.class_names,
                compression="none" if form == "parquet" else "gzip",
                row_group_size=2,
                write_statistics=False,  # which would hold two images as they are
            )
    return to


@pytest.fixture
def data(folder: Path, tmp_path: Path, form: str) -> Path:
    """The images of the folder in archives."""
    return archived(folder, tmp_path / "my archives", form)


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """The images of the folder in shards."""
    return archived(folder, tmp_path / "my archives", "shards")


def batches(make: Callable, root: Path | str, backend: str, **options) -> list:
    options = {"workers": 0, **options}
    if make is train_loader:
        options |= {"seed": 3, "flip": "independent"}
    return list(make(root, (32, 24), 4, backend=backend, **options))


def assert_same(ours: list, other: list) -> None:
    assert len(ours) == len(other) > 1
    for a, b in zip(ours, other, strict=True):
        assert torch.equal(a.images.rows, b.images.rows)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)


@pytest.mark.parametrize("make", [train_loader, val_loader], ids=["train", "val"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder_bit_for_bit(
    backend: str, make: Callable, workers: int, folder: Path, data: Path
) -> None:
    expected = batches(make, folder, backend)
    assert_same(batches(make, data, backend, workers=workers), expected)


def test_a_second_epoch_and_the_middle_of_one_are_those_of_the_folder(
    backend: str, folder: Path, data: Path
) -> None:
    ours, other = (
        train_loader(root, (32,), 2, backend=backend, workers=1) for root in (data, folder)
    )
    for loader in (ours, other):
        next(iter(loader))  # a loop that is left early
        loader.epoch, loader.first_step = 1, 3
    assert_same(list(ours), list(other))
    assert_same(list(ours), list(other))


def test_an_index_holds_bytes_labels_sizes_and_names(folder: Path, data: Path, form: str) -> None:
    index, other = open_split(data, "train"), index_folder(folder / "train")
    assert index.labels.tolist() == other.labels.tolist()
    assert index.labels.dtype == np.int64
    assert index.sizes.tolist() == other.sizes.tolist()
    assert index.class_names == ("cat", "dog", "eel")
    for position in (8, 0, 4, 4):
        assert index.read(position) == other.read(position)
    extension = "tar" if form == "shards" else "parquet"
    assert index.paths[0].startswith(f"train-00000-of-00002.{extension}/")
    assert index.path(0) == str(data / "train" / index.paths[0])
    part = index.take(np.array([7, 2]))
    assert (part.read(0), part.read(1)) == (other.read(7), other.read(2))


def test_a_second_start_opens_no_archive(
    data: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_split(data, "train")
    module = "rsfast.data.shards._index_shard" if form == "shards" else "rsfast.data.parquet._rows"

    def refuse(*arguments) -> None:
        raise AssertionError("an archive was opened")

    monkeypatch.setattr(module, refuse)
    second = open_split(data, "train")
    assert (second.paths, second.digest) == (first.paths, first.digest)
    assert second.sizes.tolist() == first.sizes.tolist()
    assert second.read(5) == first.read(5)


def test_what_is_damaged_in_the_cache_is_made_again(data: Path, cache: Path) -> None:
    first = open_split(data, "train")
    for file in (cache / "index").iterdir():
        file.write_bytes(file.read_bytes()[:-80])
    assert open_split(data, "train").paths == first.paths


def test_archives_are_read_by_threads_forked_processes_and_after_pickling(
    folder: Path, data: Path
) -> None:
    index, other = open_split(data, "train"), index_folder(folder / "train")
    expected = [other.read(position) for position in range(9)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(index.read, [*range(9)] * 20)) == expected * 20
    copy = pickle.loads(pickle.dumps(index.archive))
    assert [copy.read(row) for row in range(9)] == expected
    with multiprocessing.get_context("fork").Pool(2) as processes:
        assert processes.map(index.archive.read, range(9)) == expected


def test_only_so_many_files_are_open_at_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_MOST_OPEN", 1)
    index = open_split(shards, "train")

    def opened() -> int:
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum(os.path.islink(f) and os.readlink(f).startswith(str(shards)) for f in links)

    for position in (0, 8, 1, 7):
        index.read(position)
        assert opened() == 1
    del index
    assert opened() == 0


def test_a_shard_that_changed_after_it_was_indexed_is_an_error_and_then_a_new_index(
    backend: str, shards: Path
) -> None:
    loader = train_loader(shards, (32,), 2, backend=backend, workers=0)
    file = shards / "train" / "train-00001-of-00002.tar"
    os.utime(file, ns=(1, 1))
    with pytest.raises(
        RuntimeError,
        match=f"cannot (read|decode) {re.escape(str(file))}/.*"
        "has changed since it was indexed: start again.*; to leave it out: ",
    ):
        list(loader)
    assert len(batches(train_loader, shards, backend)) == 3
    write_tar(file, [("cat/new.jpg", JPEG), ("cat/new.cls", b"0")])
    assert len(open_split(shards, "train")) == 5 - 1 + 1


def test_a_shard_cut_behind_the_back_of_the_index_ends_early(shards: Path) -> None:
    index = open_split(shards, "train")
    file = Path(index.path(0)).parent.parent
    assert file.suffix == ".tar"
    contents = index.archive._contents
    contents.offsets[0] = os.path.getsize(file) - 5
    with pytest.raises(OSError, match="ends [0-9]+ bytes before the end of an image"):
        index.read(0)


# Each: members of the shard, and what is said.
REFUSED: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no_label": ([("a.jpg", JPEG)], r"label of a.jpg in shard .* must lie beside it.*found none"),
    "label_in_words": (
        [("a.jpg", JPEG), ("a.cls", b"cat")],
        "label of a.jpg .* must be a class number from 0, got 'cat'",
    ),
    "negative_label": ([("a.jpg", JPEG), ("a.cls", b"-1")], "a class number from 0, got '-1'"),
    "broken_json": ([("a.jpg", JPEG), ("a.json", b"{")], "must be JSON in the .json beside it"),
    "two_labels": (
        [("a.jpg", JPEG), ("a.cls", b"1"), ("a.json", b'{"label": 0}')],
        r"must be the same in .cls and .json, got \[1, 0\]",
    ),
    "same_key_twice": (
        [("a.jpg", JPEG), ("a.cls", b"0"), ("a.jpg", PNG)],
        "must have one image and one label per key, got another one: a.jpg",
    ),
    "same_label_twice": (
        [("a.jpg", JPEG), ("a.cls", b"0"), ("a.cls", b"0")],
        "must have one image and one label per key, got another one: a.cls",
    ),
    "two_images": (
        [("a.jpg", JPEG), ("a.png", PNG), ("a.cls", b"0")],
        "must have one image and one label per key, got another one: a.png",
    ),
    "dotted_key": (
        [("b.c/a.0023.jpg", JPEG), ("b.c/a.0023.cls", b"0")],
        "splits b.c/a.0023.jpg at its first dot, into the key 'b.c/a' and the field '0023.jpg'",
    ),
    "no_image": ([("a.txt", b"a cat")], "archives of .* must hold at least one image, found none"),
    "gap": (
        [("a.jpg", JPEG), ("a.cls", b"1"), ("b.jpg", JPEG), ("b.cls", b"2")],
        "numbers from 0 without a gap, found no image of 0; .* name all classes in .*classes.txt",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_shard_that_does_not_say_what_it_holds_is_refused(name: str, tmp_path: Path) -> None:
    members, message = REFUSED[name]
    write_tar(tmp_path / "data" / "train" / "a.tar", members)
    with pytest.raises(ValueError, match=message) as caught:
        open_split(tmp_path / "data", "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", ["cat\n", "cat\ndog\n"])
def test_a_label_without_a_class_name_is_refused(shards: Path, names: str) -> None:
    (shards / "train" / "classes.txt").write_text(names)
    count = len(names.split())
    with pytest.raises(ValueError, match=rf"must be in \[0, {count}\).*, got {count}$"):
        open_split(shards, "train")


@pytest.mark.parametrize("names", ["cat\ncat\neel\n", "cat\n\neel\n"], ids=["twice", "empty"])
def test_class_names_that_are_none_are_refused(shards: Path, names: str) -> None:
    (shards / "train" / "classes.txt").write_text(names)
    with pytest.raises(ValueError, match="classes.txt must name each class once, one per line"):
        open_split(shards, "train")


def test_a_shard_cut_anywhere_is_refused(shards: Path) -> None:
    file = shards / "train" / "train-00000-of-00002.tar"
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1]
        used = end.offset_data + 512
    for length in (0, 1, 511, 512, 700, used // 2, used - 600, used - 512, used - 1, used):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"shard {re.escape(str(file))} is (cut off|damaged)"):
            open_split(shards, "train")
    file.write_bytes(whole[: used + 512])  # one block of zeros is an end
    assert len(open_split(shards, "train")) == 9


def test_a_header_that_is_damaged_in_the_middle_is_not_the_end(shards: Path) -> None:
    file = shards / "train" / "train-00000-of-00002.tar"
    with tarfile.open(file) as tar:
        at = tar.getmembers()[3].offset
    content = bytearray(file.read_bytes())
    content[at : at + 8] = b"\xff" * 8
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"is damaged at byte {at} of .*, behind 2 samples"):
        open_split(shards, "train")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gzip", "bzip2"])
def test_compressed_shards_are_refused_whatever_they_are_called(
    pack: Callable[[bytes], bytes], shards: Path
) -> None:
    file = shards / "train" / "train-00000-of-00002.tar"
    file.write_bytes(pack(file.read_bytes()))
    with pytest.raises(ValueError, match="must be a plain tar file.*unpack it: (gunzip|bunzip2) "):
        open_split(shards, "train")
    for tar in (shards / "train").glob("*.tar"):
        tar.rename(tar.with_suffix(".tar.gz"))
    (shards / "train" / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"must hold plain tar files.*train-00000.*\.tar\.gz"):
        open_split(shards, "train")
    with pytest.raises(ValueError, match=r"must be plain tar files.*\.tar\.gz; unpack it"):
        open_split(str(shards / "train" / "*.tar.gz"), "train")


def test_links_in_a_shard_are_refused(shards: Path) -> None:
    file = shards / "train" / "train-00000-of-00002.tar"
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("cat/9.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "cat/0000.jpg"
        tar.addfile(link)
    with pytest.raises(ValueError, match="must hold plain files only, got the link .*cat/9.jpg"):
        open_split(shards, "train")


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_long_names_and_foreign_members_do_not_shift_the_images(kind: int, tmp_path: Path) -> None:
    name = "/".join(["n" * 90] * 3) + "/é"
    members = [
        (f"{name}.jpg", JPEG),
        ("._x.jpg", b"not an image"),
        (f"{name}.cls", b"0\n"),
        ("b.txt", b"a picture of b"),
        ("c.WEBP", PNG),
        ("c.json", b'{"label": 1, "width": 3}'),
    ]
    write_tar(tmp_path / "data" / "train" / "a.tar", members, format=kind)
    index = open_split(tmp_path / "data", "train")
    assert index.paths == (f"a.tar/{name}.jpg", "a.tar/c.WEBP")
    assert [index.read(0), index.read(1)] == [JPEG, PNG]
    assert index.labels.tolist() == [0, 1]
    assert index.class_names == ("0", "1")


def test_class_names_are_numbers_in_the_order_of_numbers(tmp_path: Path) -> None:
    members = [
        member
        for label in range(11)
        for member in ((f"{label}.png", PNG), (f"{label}.cls", str(label).encode()))
    ]
    write_tar(tmp_path / "data" / "train" / "a.tar", members)
    assert open_split(tmp_path / "data", "train").class_names == tuple(map(str, range(11)))


def test_class_names_come_from_the_json_of_the_samples(tmp_path: Path) -> None:
    members = []
    for label, name in ((1, "n02"), (0, "n09"), (1, "n02")):
        key = f"{len(members)}"
        about = {"label": label, "filename": f"{name}/{name}_10026.JPEG"}
        members += [(f"{key}.jpg", JPEG), (f"{key}.json", json.dumps(about).encode())]
    write_tar(tmp_path / "data" / "train" / "a.tar", members)
    assert open_split(tmp_path / "data", "train").class_names == ("n09", "n02")


@pytest.mark.parametrize("inside", ["", "data"], ids=["flat", "in_data"])
def test_a_folder_with_the_archives_of_both_splits_is_a_data_set(
    data: Path, inside: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "val").rename(data / "validation")
    assert len(open_split(data, "val")) == 6
    place = data / inside
    place.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        for file in sorted((data / split).iterdir()):
            file.rename(place / file.name.replace("val-", "imagenet-validation-"))
        (data / split).rmdir()
    train, val = open_split(data, "train"), open_split(data, "val")
    assert (len(train), len(val)) == (9, 6)
    assert val.read(5) == index_folder(folder / "val").read(5)
    assert [split.name for split in find_splits(data)] == ["train", "val"]
    assert main(["check", str(data)]) == 0
    assert main(["exclude", str(data), val.path(0)]) == 0
    assert (len(open_split(data, "train")), len(open_split(data, "val"))) == (9, 5)


def test_patterns_with_braces_ranges_and_globs_name_archives(shards: Path) -> None:
    first = str(shards / "train" / "train-00000-of-00002.tar")
    for pattern, count in (
        ("train/train-{00000..00001}-of-00002.tar", 9),
        ("train/train-0000{0,1}-of-0000{2..2}.tar", 9),
        ("{train,val}/*.tar", 15),
        ("train/*-0000[0]-*.tar", 4),
    ):
        index = open_split(str(shards / pattern), "train")
        assert len(index) == count, pattern
        assert index.path(0) == f"{first}/cat/0000.jpg"
    assert len(open_split(first, "val")) == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train/none-*.tar", "must name files that exist, found no .*none-"),
        ("train/train-{00000..00002}-of-00002.tar", "found no .*train-00002-of-00002.tar$"),
        ("train/train-{2..1}.tar", "must have ranges from low to high"),
        ("train/{a,{b,c}}.tar", "must have braces in pairs, not nested"),
        ("train/*.t*", r"must name .tar or .parquet files, all of one kind, got .tar, .txt"),
        ("https://host/a.tar", "must name files of this machine"),
        ("pipe:cat a.tar", "must name files of this machine"),
        ("{0..9}{0..999999}.tar", "must name at most 1000000 files"),
    ],
)
def test_patterns_that_name_no_archives_are_refused(
    pattern: str, message: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards)
    (shards / "train" / "x.txt").touch()
    with pytest.raises(ValueError, match=message):
        open_split(pattern, "train")


def test_a_list_of_shards_with_one_missing_is_refused(data: Path) -> None:
    (file,) = (data / "train").glob("*-00001-of-*")
    file.rename(data / file.name)
    with pytest.raises(ValueError, match="must be all 2, found no .*train-00001-of-00002"):
        open_split(data, "train")


def test_a_folder_with_two_kinds_of_content_is_refused(shards: Path) -> None:
    (shards / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match="must hold class folders or archives, got both: cat and"):
        open_split(shards, "train")
    (shards / "train" / "cat").rmdir()
    (shards / "train" / "x.parquet").touch()
    with pytest.raises(ValueError, match="must hold tar files or Parquet files, got both"):
        open_split(shards, "train")


def with_broken_images(folder: Path) -> Path:
    """One image is cut off, one no image at all."""
    cut(folder / "train" / "cat" / "0001.jpg")
    (folder / "train" / "dog" / "0002.jpg").write_bytes(b"no image")
    return folder


def test_a_check_finds_broken_images_in_archives_and_training_leaves_them_out(
    folder: Path, tmp_path: Path, form: str, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = archived_with_broken(folder, tmp_path, form)
    assert len(open_split(data, "train")) == 8  # the one without a header
    with pytest.raises(
        RuntimeError, match="cannot decode .*my archives/train/train-00000"
    ) as error:
        batches(train_loader, data, backend, crop_area=(1.0, 1.0))
    assert main(["check", str(data)]) == 1
    out = capsys.readouterr().out
    assert re.search("bad       train/train-00000-of-00002.*/.*0001.jpg  .*truncated", out)
    assert re.search("bad       train/train-00001-of-00002.*/.*0002.jpg  no image", out)
    assert len(open_split(data, "train")) == 7
    batches(train_loader, data, backend, crop_area=(1.0, 1.0))
    with pytest.raises(ValueError, match="must hold no bad image when strict, found 2"):
        open_split(data, "train", strict=True)
    (train, _) = find_splits(data)
    assert check_split(train).decoded == 0
    assert "; to leave it out: python -m rsfast.data exclude '" in str(error.value)


def archived_with_broken(folder: Path, tmp_path: Path, form: str) -> Path:
    """Archives of a data set that is sound for its index, and broken in two images."""
    index_folder(folder / "train")
    index_folder(folder / "val")
    return archived(with_broken_images(folder), tmp_path / "my archives", form)


def test_the_printed_command_leaves_an_image_out_and_can_be_undone(
    folder: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = archived_with_broken(folder, tmp_path, form)
    pattern = str(data / "train" / "*.*[rt]")
    if form == "shards":
        (data / "train" / "classes.txt").rename(data / "classes.txt")
    for root in (data, pattern):
        with pytest.raises(RuntimeError, match="cannot decode") as caught:
            batches(train_loader, root, "pil")
        command = shlex.split(re.search("; to leave it out: (.*)$", str(caught.value))[1])[3:]
        assert main(command) == 0
        assert capsys.readouterr().out.endswith("files left out by hand: 1\n")
        batches(train_loader, root, "pil")
        assert main([*command, "--undo"]) == 0
    assert main(["exclude", str(data), "train/none.jpg"]) == 2
    assert "must be an image of the data set, got train/none" in capsys.readouterr().err


def test_a_run_on_archives_that_were_never_checked_says_how_to_check_them(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pattern = str(shards / "train" / "*.tar")
    train_loader(pattern, (32,), 2, backend="pil")
    assert f"python -m rsfast.data check '{pattern}'" in caplog.text
    assert main(["check", pattern]) == 0


def test_compressed_parquet_warns_that_random_reads_cost_row_groups(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    data = archived(folder, tmp_path / "packed", "compressed_parquet")
    index = open_split(data, "train")
    assert (index.archive._contents.offsets < 0).all()
    assert "9 of 9 images in" in caplog.text
    assert "each read in random order costs a whole row group" in caplog.text
    assert "rsfast.data convert" in caplog.text
    caplog.clear()
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "rsfast.data.parquet", raising=False)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.parquet").touch()
    with pytest.raises(ImportError, match=r"Parquet files need pyarrow: pip install .*parquet"):
        open_split(tmp_path, "train")
