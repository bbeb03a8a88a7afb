"""Tar shards: what an index holds of them, how they are named, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from archives import archived, write_tar
from helpers import JPEG, PNG, make_image_folder
from rsfast.data import archive, open_split

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """9 training and 6 validation images of three classes, as files of their own."""
    return make_image_folder(tmp_path / "folder", ("cat", "dog", "eel"), train=3, val=2)


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """The images of the folder in shards."""
    return archived(folder, tmp_path / "my archives", "shards")


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
    whole = file.read_bytes()
    file.write_bytes(pack(whole))
    with pytest.raises(ValueError, match="must be a plain tar file.*unpack it: mv ") as caught:
        open_split(shards, "train")
    subprocess.run(str(caught.value).partition("unpack it: ")[2], shell=True, check=True)
    assert file.read_bytes() == whole
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


def test_a_folder_with_two_kinds_of_content_is_refused(shards: Path) -> None:
    (shards / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match="must hold class folders or archives, got both: cat and"):
        open_split(shards, "train")
    (shards / "train" / "cat").rmdir()
    (shards / "train" / "x.parquet").touch()
    with pytest.raises(ValueError, match="must hold tar files or Parquet files, got both"):
        open_split(shards, "train")


def test_a_shard_cut_behind_the_back_of_the_index_ends_early(shards: Path) -> None:
    index = open_split(shards, "train")
    file = Path(index.path(0)).parent.parent
    assert file.suffix == ".tar"
    contents = index.archive._contents
    contents.offsets[0] = os.path.getsize(file) - 5
    with pytest.raises(RuntimeError, match="ends [0-9]+ bytes before the end of an image"):
        index.read(0)


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
