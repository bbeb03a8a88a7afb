"""Archives of any form: batches, indexes, checks and exclusions are those of class folders."""

from __future__ import annotations

import dataclasses
import errno
import gc
import multiprocessing
import os
import pickle
import re
import shlex
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from archives import archived, write_tar
from helpers import JPEG, cut, make_image_folder
from rsfast.data import archive, index_folder, open_split, reading, train_loader, val_loader
from rsfast.data.__main__ import main
from rsfast.data.check import check_split
from rsfast.data.splits import find_splits

# Python 3.12 says so of every fork beside a thread; the workers only decode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
    pytest.mark.usefixtures("cache"),
]
FORMS = ["shards", "parquet", "compressed_parquet"]


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


def test_a_shard_that_changed_after_it_was_indexed_is_an_error_and_then_a_new_index(
    backend: str, shards: Path
) -> None:
    loader = train_loader(shards, (32,), 2, backend=backend, workers=0)
    file = shards / "train" / "train-00001-of-00002.tar"
    os.utime(file, ns=(1, 1))
    with pytest.raises(
        RuntimeError,
        match=f"^cannot read {re.escape(str(file))}/.*"
        "has changed since it was indexed: start again to index it anew$",
    ):
        list(loader)
    assert len(batches(train_loader, shards, backend)) == 3
    write_tar(file, [("cat/new.jpg", JPEG), ("cat/new.cls", b"0")])
    assert len(open_split(shards, "train")) == 5 - 1 + 1


def test_an_archive_whose_handle_is_stale_is_opened_anew(
    data: Path, form: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PAUSES_S", (0.0, 0.0, 0.0))
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    index, other = open_split(data, "train"), index_folder(folder / "train")
    opened, refused = [], []

    def is_first() -> bool:
        refused.extend([1] * (len(opened) == 1))
        return len(opened) == 1

    if form == "compressed_parquet":
        from rsfast.data import parquet

        class Opened(parquet.parquet.ParquetFile):
            def __init__(self, *arguments, **options) -> None:
                opened.append(1)
                super().__init__(*arguments, **options)

            def read_row_group(self, *arguments, **options):
                if is_first():
                    raise stale
                return super().read_row_group(*arguments, **options)

        monkeypatch.setattr(parquet.parquet, "ParquetFile", Opened)
    else:
        pread, handle = os.pread, archive._Handle

        def failing(*arguments) -> bytes:
            if is_first():
                raise stale
            return pread(*arguments)

        monkeypatch.setattr(archive, "_Handle", lambda path: opened.append(1) or handle(path))
        monkeypatch.setattr(archive.os, "pread", failing)
    assert [index.read(row) for row in range(3)] == [other.read(row) for row in range(3)]
    assert (len(opened), len(refused)) == (2, 1)


def test_a_loop_that_ends_or_is_left_early_leaves_no_thread_that_reads(shards: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")

    def readers() -> list[str]:
        end = time.monotonic() + 10
        while (names := [t.name for t in threading.enumerate() if "rsfast-read" in t.name]) and (
            time.monotonic() < end
        ):
            time.sleep(0.02)
        return names

    gc.collect()
    gc.disable()
    try:
        loader = train_loader(shards, (32,), 2, backend="dali", workers=2)
        for _ in loader:
            break
        assert not readers()
        assert loader._decoder._idle is None
        list(loader)
        assert not readers()
    finally:
        gc.enable()


def test_the_digest_tells_other_labels_of_the_same_names(data: Path, form: str) -> None:
    before = open_split(data, "train")
    labels = before.labels.copy()
    labels[[0, -1]] = labels[[-1, 0]]
    other = dataclasses.replace(before, labels=labels)
    assert other.digest != before.digest
    assert open_split(data, "train").digest == before.digest


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


def test_a_list_of_shards_with_one_missing_is_refused(data: Path) -> None:
    (file,) = (data / "train").glob("*-00001-of-*")
    file.rename(data / file.name)
    with pytest.raises(ValueError, match="must be all 2, found no .*train-00001-of-00002"):
        open_split(data, "train")


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
