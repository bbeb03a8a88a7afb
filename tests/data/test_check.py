"""The check of a data set: what it names, what training then leaves out, and the commands."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import make_image_folder, smooth_image
from rsfast.data import check, folder, index_folder, train_loader, val_loader
from rsfast.data.__main__ import main
from rsfast.data.cache import cache_root
from rsfast.data.check import Report, check_split

# Python 3.12 says so of every fork beside a thread; the workers of the check only decode.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


PICTURE = smooth_image(60, 80, np.random.default_rng(7))
JPEG, PNG = encoded(PICTURE, "JPEG"), encoded(PICTURE, "PNG")
WEBP, BMP = encoded(PICTURE, "WEBP"), encoded(PICTURE, "BMP")
TABLE = JPEG.index(b"\xff\xdb")  # a segment before the picture
DATA = PNG.index(b"IDAT")  # its name, with the length before it
CHECKSUM = DATA + 4 + int.from_bytes(PNG[DATA - 4 : DATA], "big")

# File name to its content, and kind and reason that the check should give it.
SPECIMENS: dict[str, tuple[bytes, str, str]] = {
    "empty.jpg": (b"", "bad", "empty file"),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "bad", "truncated"),
    "without_end.jpg": (JPEG[:-2], "bad", "truncated"),
    "junk.jpg": (bytes(range(1, 200)), "bad", "no image"),
    "header_only.jpg": (b"\xff\xd8\xff\xe0", "bad", "header"),
    "text.jpg": (b"a cat, in words\n", "bad", "no image"),
    "gif.jpg": (encoded(PICTURE, "GIF"), "bad", "GIF image, which the loaders do not decode"),
    "truncated.png": (PNG[: len(PNG) // 2], "bad", "truncated"),
    "damaged.png": (PNG.replace(PNG[DATA + 99 : DATA + 109], bytes(10)), "bad", "decoded"),
    "truncated.webp": (WEBP[:-50], "bad", "decoded"),
    "truncated.bmp": (BMP[:-50], "bad", "truncated"),
    "png.jpg": (PNG, "odd", r"PNG image under the extension \.jpg"),
    "jpeg.png": (JPEG, "odd", r"JPEG image under the extension \.png"),
    "cmyk.jpg": (encoded(PICTURE.convert("CMYK"), "JPEG"), "odd", "CMYK"),
    "pixel.jpg": (encoded(PICTURE.resize((1, 1)), "JPEG"), "odd", "tiny image of 1 x 1 pixels"),
    "low.png": (encoded(PICTURE.resize((40, 7)), "PNG"), "odd", "tiny image of 40 x 7 pixels"),
    "jpeg.txt": (JPEG, "unused", "JPEG image under another extension"),
    "gif.gif": (encoded(PICTURE, "GIF"), "unused", "GIF image under another extension"),
}
# Files that Pillow decodes and DALI refuses.
FOR_DALI: dict[str, tuple[bytes, str]] = {
    "stray_bytes.jpg": (JPEG[:TABLE] + b"\0" + JPEG[TABLE:], "stray bytes"),
    "without_end.png": (PNG[:-12], "truncated"),
    "without_checksum.png": (PNG[:-1], "truncated"),
    "long_end.png": (PNG[:-9] + b"\1" + PNG[-8:], "last chunk"),
    "wrong_checksum.png": (PNG[:CHECKSUM] + bytes(4) + PNG[CHECKSUM + 4 :], "checksum in b'IDAT'"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set whose path must be quoted: 6 training and 4 validation images of two classes."""
    return make_image_folder(tmp_path / "my set", train=3, val=2)


@pytest.fixture
def specimens(root: Path) -> Path:
    """The data set with one file of each kind in train/cat."""
    for name, (content, *_) in {**SPECIMENS, **FOR_DALI}.items():
        (root / "train" / "cat" / name).write_bytes(content)
    return root


def told(report: Report) -> dict[str, tuple[str, str]]:
    """File or class folder to kind and reason."""
    findings = {path: (kind, reason) for kind, path, reason in report.findings}
    assert len(findings) == len(report.findings)
    return findings


def epoch(root: Path, backend: str, make: Callable = train_loader, workers: int = 0) -> int:
    """Loads every image whole; returns how many there were."""
    window = {"crop_area": (1.0, 1.0)} if make is train_loader else {}
    loader = make(root, (32, 16), 2, backend=backend, workers=workers, **window)
    for batch in loader:
        assert torch.isfinite(batch.images.rows).all()
    return loader.num_images


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-200])
    return file


@pytest.mark.parametrize("workers", [1, 3])
def test_every_kind_of_broken_or_odd_file_is_named(specimens: Path, workers: int) -> None:
    (specimens / "train" / "eel").mkdir()
    report = check_split(specimens / "train", workers=workers)
    expected = {f"cat/{name}": (kind, reason) for name, (_, kind, reason) in SPECIMENS.items()}
    expected |= {f"cat/{name}": ("bad", reason) for name, (_, reason) in FOR_DALI.items()}
    expected["eel"] = ("unused", "class folder without an image")
    findings = told(report)
    assert findings.keys() == expected.keys()
    for path, (kind, reason) in expected.items():
        assert findings[path][0] == kind, path
        assert re.search(reason, findings[path][1]), findings[path]
    images = 6 + len(SPECIMENS) - 2 + len(FOR_DALI)
    assert (report.images, report.decoded, report.is_good) == (images, images, False)


def test_a_sound_data_set_has_no_findings(root: Path) -> None:
    (root / "train" / "cat" / "notes.txt").write_text("three cats")
    (root / "train" / "cat" / ".jpg").write_bytes(JPEG)
    (root / "train" / "cat" / "4.JPEG").write_bytes(JPEG)
    report = check_split(root / "train")
    assert (report.findings, report.images, report.is_good) == ([], 8, True)


def test_training_runs_through_a_folder_that_was_checked(specimens: Path, backend: str) -> None:
    check_split(specimens / "train")
    odd = sum(kind == "odd" for _, kind, _ in SPECIMENS.values())
    assert epoch(specimens, backend) == 6 + odd


@pytest.mark.parametrize("name", FOR_DALI)
def test_dali_refuses_what_is_bad_only_for_its_sake(root: Path, name: str) -> None:
    pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    file = root / "train" / "dog" / name
    file.write_bytes(FOR_DALI[name][0])
    assert epoch(root, "pil") == 7
    with pytest.raises(RuntimeError, match=re.escape(f"DALI cannot decode {file}: ")):
        epoch(root, "dali")


def test_a_name_that_is_no_text_is_bad_and_printed_without_its_bytes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "train" / "cat" / os.fsdecode(b"\xff.jpg")).write_bytes(JPEG)
    (root / "train" / "cat" / "a\tb.jpg").write_bytes(b"")
    assert main(["check", str(root)]) == 1
    out = capsys.readouterr().out
    assert r"train/cat/\udcff.jpg  path is not UTF-8" in out
    assert r"train/cat/a\tb.jpg  empty file" in out
    assert len(index_folder(root / "train")) == 6


def test_a_decompression_bomb_is_bad_and_a_huge_image_odd(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, side in (("bomb", 150), ("huge", 120)):
        Image.new("RGB", (side, side)).save(root / "train" / "cat" / f"{name}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    findings = told(check_split(root / "train"))
    assert findings.keys() == {"cat/bomb.png", "cat/huge.png"}
    assert re.match("decompression bomb: .*22500 pixels", findings["cat/bomb.png"][1])
    assert findings["cat/huge.png"] == ("odd", "huge image of 120 x 120 pixels")


def test_files_that_are_no_files_are_bad(root: Path) -> None:
    (root / "train" / "cat" / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "train" / "cat" / "pipe.jpg")
    findings = told(check_split(root / "train"))
    assert findings["cat/dangling.jpg"] == ("bad", "cannot be read: No such file or directory")
    assert findings["cat/pipe.jpg"] == ("bad", "no regular file")
    assert len(index_folder(root / "train")) == 6


def test_a_file_that_could_not_be_read_is_tried_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *arguments):
        if path.endswith("cat/0001.jpg"):
            raise PermissionError(13, "Permission denied")
        return open(path, *arguments)

    monkeypatch.setattr(check, "open", refuse, raising=False)  # tests may run as root
    reason = "cannot be read: Permission denied"
    assert told(check_split(root / "train")) == {"cat/0001.jpg": ("bad", reason)}
    assert len(index_folder(root / "train")) == 5
    monkeypatch.undo()
    monkeypatch.setenv("RSFAST_CACHE", str(root.parent / "cache"))
    report = check_split(root / "train")
    assert (report.findings, report.decoded) == ([], 1)
    assert len(index_folder(root / "train")) == 6


def test_a_file_that_kills_its_decoder_is_bad_and_the_others_are_checked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = check._judge_image

    def crash(path: str):
        if path.endswith("dog/0000.jpg"):
            os._exit(9)
        return judge(path)

    monkeypatch.setattr(check, "_judge_image", crash)
    monkeypatch.setattr(check, "_CHUNK", 2)
    (root / "train" / "dog" / "empty.jpg").touch()
    report = check_split(root / "train", workers=2)
    findings = told(report)
    assert findings.keys() == {"dog/0000.jpg", "dog/empty.jpg"}
    assert findings["dog/0000.jpg"][0] == "bad"
    assert "crashes its decoder" in findings["dog/0000.jpg"][1]
    assert report.decoded == 7


@pytest.fixture
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str):
        raise AssertionError(f"{path} was opened")

    for module, name in (
        (check, "_judge_image"),
        (check, "_judge_other"),
        (folder, "_header_size"),
    ):
        monkeypatch.setattr(module, name, fail)


def test_a_second_check_opens_no_file_and_finds_the_same(
    specimens: Path, request: pytest.FixtureRequest
) -> None:
    first = check_split(specimens / "train")
    request.getfixturevalue("nothing_is_opened")
    second = check_split(specimens / "train")
    assert second.findings == first.findings
    assert (second.images, second.decoded) == (first.images, 0)


def test_the_index_of_a_checked_folder_reads_no_header(
    specimens: Path, request: pytest.FixtureRequest
) -> None:
    check_split(specimens / "train")
    request.getfixturevalue("nothing_is_opened")
    index = index_folder(specimens / "train")
    for path, (height, width) in zip(index.paths, index.sizes.tolist(), strict=True):
        with Image.open(specimens / "train" / path) as image:
            assert image.size == (width, height)


def test_only_new_and_changed_files_are_decoded_again(specimens: Path) -> None:
    first = told(check_split(specimens / "train"))
    (specimens / "train" / "dog" / "added.png").write_bytes(PNG)
    (specimens / "train" / "dog" / "0000.jpg").unlink()
    cut(specimens / "train" / "dog" / "0001.jpg")
    os.utime(specimens / "train" / "dog" / "0002.jpg", ns=(1, 1))
    (specimens / "train" / "cat" / "junk.jpg").write_bytes(JPEG)
    report = check_split(specimens / "train")
    assert report.decoded == 4
    second = told(report)
    assert second.keys() - first.keys() == {"dog/0001.jpg"}
    assert first.keys() - second.keys() == {"cat/junk.jpg"}


def test_an_interrupted_check_is_continued(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_down = check._put_down

    def interrupt(record, row: int, verdict) -> None:
        if row == 4:
            raise KeyboardInterrupt
        put_down(record, row, verdict)

    monkeypatch.setattr(check, "_put_down", interrupt)
    assert main(["check", str(root / "train")]) == 130
    assert capsys.readouterr().err.rpartition("\r")[2].count("interrupted") == 1
    monkeypatch.setattr(check, "_put_down", put_down)
    assert check_split(root / "train").decoded == 2


def test_bad_files_are_left_out_with_a_warning_that_says_how_to_list_them(
    root: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(root / "train" / "cat" / "0001.jpg")
    assert len(index_folder(root / "train")) == 6
    assert caplog.records == []
    check_split(root / "train")
    assert len(index_folder(root / "train")) == 5
    (record,) = caplog.records
    message = record.getMessage()
    assert "1 of 6 files" in message
    assert "cat/0001.jpg" in message
    command = re.search(r"to list them: (.*)\): ", message)[1]
    assert main(shlex.split(command.removeprefix("python -m rsfast.data "))) == 1
    assert "train/cat/0001.jpg" in capsys.readouterr().out


def test_the_record_holds_after_the_listing_has_changed(root: Path) -> None:
    cut(root / "train" / "cat" / "0001.jpg")
    check_split(root / "train")
    (root / "train" / "cat" / "0000.jpg").unlink()
    (root / "train" / "dog" / "added.png").write_bytes(PNG)
    assert index_folder(root / "train").paths == (
        "cat/0002.jpg",
        "dog/0000.jpg",
        "dog/0001.jpg",
        "dog/0002.jpg",
        "dog/added.png",
    )


def test_the_record_is_found_under_any_spelling_of_the_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(root / "train" / "cat" / "0001.jpg")
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(root)
    check_split("train")
    for spelling in ("train", root / "train", tmp_path / "link" / "train", "val/../train"):
        assert len(index_folder(spelling)) == 5


@pytest.mark.parametrize("broken", [b"", JPEG[:-300]], ids=["empty", "truncated"])
@pytest.mark.parametrize("checked_again", [False, True])
def test_a_repaired_file_comes_back_with_its_size(
    root: Path, broken: bytes, checked_again: bool
) -> None:
    file = root / "train" / "cat" / "0001.jpg"
    file.write_bytes(broken)
    check_split(root / "train")
    assert "cat/0001.jpg" not in index_folder(root / "train").paths
    smooth_image(44, 33, np.random.default_rng(0)).save(file)
    for _ in range(2):
        index = index_folder(root / "train")
        assert index.sizes[index.paths.index("cat/0001.jpg")].tolist() == [44, 33]
        if checked_again:
            assert check_split(root / "train").findings == []


def test_a_bad_file_that_is_replaced_by_another_bad_one_stays_out(root: Path) -> None:
    file = cut(root / "train" / "cat" / "0001.jpg")
    check_split(root / "train")
    file.write_bytes(b"no image either")
    assert "cat/0001.jpg" not in index_folder(root / "train").paths


def test_strict_refuses_bad_files_and_says_how_to_list_them(root: Path) -> None:
    for make in (train_loader, val_loader):
        make(root, (32, 16), 2, backend="pil", workers=0, strict=True)
    for name in ("0001.jpg", "0002.jpg"):
        cut(root / "train" / "cat" / name)
    cut(root / "val" / "dog" / "0000.jpg")
    assert main(["check", str(root)]) == 1
    for make, count, first in (
        (train_loader, 2, "cat/0001.jpg"),
        (val_loader, 1, "dog/0000.jpg"),
    ):
        rule = f"no bad image when strict, found {count}, the first is {first}"
        command = f"python -m rsfast.data check '{root}'"
        with pytest.raises(ValueError, match=f"{rule}.*{re.escape(command)}$"):
            make(root, (32, 16), 2, backend="pil", strict=True)
        make(root, (32, 16), 2, backend="pil")
    excluded = ["train/cat/0001.jpg", "train/cat/0002.jpg", "val/dog/0000.jpg"]
    assert main(["exclude", str(root), *excluded]) == 0
    assert len(index_folder(root / "train", strict=True)) == 4


def test_strict_refuses_a_damaged_header_without_a_check(root: Path) -> None:
    (root / "val" / "dog" / "0000.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"found 1, the first is dog/0000\.jpg"):
        index_folder(root / "val", strict=True)


def test_excluded_files_are_left_out_until_it_is_undone(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root / "val")
    files = ["train/cat/0000.jpg", str(root / "train" / "dog" / "0002.jpg"), "dog/0001.jpg"]
    assert main(["exclude", str(root), *files]) == 0
    assert "train: files left out by hand: 2" in capsys.readouterr().out
    left = ("cat/0001.jpg", "cat/0002.jpg", "dog/0000.jpg", "dog/0001.jpg")
    assert index_folder(root / "train").paths == left
    assert len(index_folder(root / "val")) == 3
    (root / "train" / "cat" / "0000.jpg").write_bytes(JPEG)  # a change does not undo it
    assert index_folder(root / "train").paths == left
    assert main(["check", str(root)]) == 0
    out = capsys.readouterr().out
    assert out.count("excluded  ") == 3
    assert "excluded  train/cat/0000.jpg  by hand" in out
    assert main(["exclude", "--undo", str(root / "train"), "cat/0000.jpg"]) == 0
    assert index_folder(root / "train").paths == ("cat/0000.jpg", *left)
    assert main(["exclude", "--undo", str(root / "train"), "cat/0000.jpg"]) == 2
    assert "must be a file that is excluded, got cat/0000.jpg" in capsys.readouterr().err


def test_a_bad_file_that_is_excluded_is_settled(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(root / "val" / "dog" / "0001.jpg")
    assert main(["check", str(root)]) == 1
    assert main(["exclude", str(root), "val/dog/0001.jpg"]) == 0
    capsys.readouterr()
    assert main(["check", str(root)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"excluded  val/dog/0001.jpg  by hand; bad: .*truncated", out)


@pytest.mark.parametrize("make", [train_loader, val_loader], ids=["train", "val"])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_file_that_breaks_later_says_how_to_leave_it_out(
    backend: str, make: Callable, workers: int, root: Path
) -> None:
    assert main(["check", str(root)]) == 0
    split = "train" if make is train_loader else "val"
    broken = cut(root / split / "dog" / "0001.jpg")
    with pytest.raises(RuntimeError, match=re.escape(f"cannot decode {broken}: ")) as caught:
        epoch(root, backend, make, workers)
    message = str(caught.value)
    assert "\n" not in message
    command = re.search(r"; to leave it out: (.*)$", message)[1]
    assert command == f"python -m rsfast.data exclude '{root}' '{broken}'"
    assert main(shlex.split(command)[3:]) == 0
    assert epoch(root, backend, make, workers) == (5 if split == "train" else 3)


def test_the_printed_command_works_in_a_shell(root: Path, tmp_path: Path) -> None:
    (tmp_path / "it's a split").mkdir()
    (root / "train" / "cat").rename(tmp_path / "it's a split" / "cat")
    split = tmp_path / "it's a split"
    done = subprocess.run(
        f"{folder.check_command(split)} && {folder.exclude_command(split, 'cat/0000.jpg')}",
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "it's a split: 3 images, 0 bad" in done.stdout
    assert index_folder(split).paths == ("cat/0001.jpg", "cat/0002.jpg")


def test_the_list_names_every_finding_and_the_screen_twenty_of_a_kind(
    specimens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(25):
        (specimens / "val" / "dog" / f"{number:02d}.png").touch()
    assert main(["check", str(specimens), "--list", str(tmp_path / "all.tsv")]) == 1
    rows = [line.split("\t") for line in (tmp_path / "all.tsv").read_text().splitlines()]
    kinds = [kind for kind, _, _ in rows]
    bad = 25 + len(FOR_DALI) + sum(kind == "bad" for _, kind, _ in SPECIMENS.values())
    assert (kinds.count("bad"), kinds.count("odd"), kinds.count("unused")) == (bad, 5, 2)
    assert ["bad", "val/dog/24.png", "empty file"] in rows
    assert ["odd", "train/cat/cmyk.jpg", "CMYK image"] in rows
    out = capsys.readouterr().out
    assert out.count("bad       ") == 21
    assert f"and {bad - 20} more" in out
    assert "odd       train/cat/cmyk.jpg  CMYK image\n" in out
    assert re.search(r"val: 29 images, 25 bad, 0 odd, .*; 29 decoded at \d+ images/s", out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check", "nowhere"], "data folder .*nowhere does not exist$"),
        (["check", "val/cat"], "must have one sub-folder per class, found none$"),
        (["check", ".", "--workers", "0"], "workers must be at least 1, got 0$"),
        (["check", ".", "--workers", "two"], "argument --workers: invalid int value: 'two'$"),
        (["check", ".", "--list", "no/file"], "--list must name a file .*, got no/file$"),
        (["check"], "required: DIR$"),
        ([], "required: command$"),
        (["exclude", "."], "required: FILE$"),
        (["exclude", ".", "train/cat/9.jpg"], "image in a class folder of ., got train/cat/9.jpg$"),
        (["exclude", ".", "train/cat"], "image in a class folder of ., got train/cat$"),
        (["exclude", ".", "../notes.jpg"], r"image in a class folder of ., got \.\./notes.jpg$"),
        (["exclude", "nowhere", "0.jpg"], "data folder .*nowhere does not exist$"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_exit_with_two_and_a_sentence(
    argv: list[str],
    message: str,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(root)
    (root.parent / "notes.jpg").touch()
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match("rsfast.data(?: [a-z]+)?: error: ", last)
    assert re.search(message, last)


def test_odd_and_unused_files_alone_are_no_failure_but_an_empty_class_is(root: Path) -> None:
    (root / "train" / "cat" / "png.jpg").write_bytes(PNG)
    (root / "train" / "cat" / "jpeg.txt").write_bytes(JPEG)
    assert main(["check", str(root)]) == 0
    (root / "val" / "eel").mkdir()
    assert main(["check", str(root)]) == 1
    (root / "val" / "eel" / "0.jpg").write_bytes(JPEG)
    assert main(["check", str(root)]) == 0


def test_a_class_whose_images_are_all_bad_is_named(root: Path) -> None:
    for number in range(2):
        cut(root / "val" / "dog" / f"000{number}.jpg")
    report = check_split(root / "val")
    assert told(report)["dog"] == ("unused", "class folder without an image to use")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    split = make_image_folder(tmp_path, classes=("train", "tram"), train=2, val=0) / "train"
    assert folder.split_folders(split) == [split]
    assert folder.split_folders(tmp_path) == [tmp_path / "train", tmp_path / "val"]


def test_a_folder_that_cannot_be_read_is_an_error_not_an_empty_class(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # tests may run as root
    with pytest.raises(ValueError, match="train/cat must be readable: Permission denied$"):
        index_folder(root / "train")


def record_files() -> list[Path]:
    return sorted((cache_root() / "check").iterdir())


@pytest.mark.parametrize("name", ["record", "excluded"])
def test_a_damaged_record_is_reported_and_made_again(
    name: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut(root / "train" / "cat" / "0000.jpg")
    first = check_split(root / "train")
    assert main(["exclude", str(root), "train/dog/0000.jpg"]) == 0
    (excluded,) = (file for file in record_files() if "excluded" in file.name)
    (record,) = (file for file in record_files() if "excluded" not in file.name)
    file = excluded if name == "excluded" else record
    whole = file.read_bytes()
    damages = [b"", b"no archive", whole[: len(whole) // 2]]
    damages += [
        whole[:at] + bytes([byte ^ 0xFF]) + whole[at + 1 :] for at, byte in enumerate(whole)
    ]
    noticed = 0
    for damage in damages:
        file.write_bytes(damage)
        caplog.clear()
        left = len(index_folder(root / "train"))
        if left == 5:  # one of the two is left out, and that is said
            noticed += 1
            assert f"{file} is damaged" in caplog.text
        assert 4 <= left <= 5
    assert noticed > 3
    file.write_bytes(whole[:-100])
    if name == "record":
        again = check_split(root / "train")
        assert (again.decoded, again.findings[0]) == (6, first.findings[0])
    else:
        assert main(["exclude", str(root), "train/dog/0000.jpg"]) == 0
    assert file.read_bytes() == whole
    assert len(index_folder(root / "train")) == 4


def test_a_cache_folder_that_cannot_be_written_costs_the_record_but_not_the_report(
    root: Path, cache: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(root / "train" / "cat" / "0000.jpg")
    cache.write_text("no folder")
    assert main(["check", str(root)]) == 1
    assert "bad       train/cat/0000.jpg" in capsys.readouterr().out
    assert "record of the check not kept" in caplog.text
    assert main(["exclude", str(root), "train/cat/0000.jpg"]) == 2
    assert f"cache folder {cache} must be writable" in capsys.readouterr().err
