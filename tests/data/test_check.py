"""The check of a data set: what it names, what training then leaves out, and the commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import FOR_DALI, JPEG, PNG, SPECIMENS, cut, make_image_folder
from rsfast.data import check, index, index_folder, judging, train_loader, val_loader
from rsfast.data.__main__ import main
from rsfast.data.check import Report, check_split
from rsfast.data.splits import find_splits

# Python 3.12 says so of every fork beside a thread; the workers of the check only decode.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


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
    assert report.images == report.decoded == 6 + len(SPECIMENS) - 2 + len(FOR_DALI)


def test_a_sound_data_set_has_no_findings(root: Path) -> None:
    (root / "train" / "cat" / "notes.txt").write_text("three cats")
    (root / "train" / "cat" / ".DS_Store").write_bytes(b"no image")
    (root / "train" / "cat" / "4.JPEG").write_bytes(JPEG)
    report = check_split(root / "train")
    assert (report.findings, report.images, report.is_good) == ([], 7, True)


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


def test_names_are_printed_without_bytes_that_are_no_text(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (b"\xff.jpg", b"a\tb.jpg"):
        (root / "train" / "cat" / os.fsdecode(name)).write_bytes(b"")
    assert main(["check", str(root)]) == 1
    out = capsys.readouterr().out
    assert r"train/cat/\udcff.jpg  empty file" in out
    assert r"train/cat/a\tb.jpg  empty file" in out


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

    monkeypatch.setattr(judging, "open", refuse, raising=False)  # tests may run as root
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
    judge = check.judge_image

    def crash(path: str):
        if path.endswith("dog/0000.jpg"):
            os._exit(9)
        return judge(path)

    monkeypatch.setattr(check, "judge_image", crash)
    monkeypatch.setattr(check, "_CHUNK", 2)
    (root / "train" / "dog" / "empty.jpg").touch()
    report = check_split(root / "train", workers=2)
    findings = told(report)
    assert findings.keys() == {"dog/0000.jpg", "dog/empty.jpg"}
    assert findings["dog/0000.jpg"] == ("bad", "crashes its decoder, or needs too much memory")
    assert report.decoded == 7


@pytest.fixture
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str):
        raise AssertionError(f"{path} was opened")

    for name in ("check.judge_image", "check.judge_other", "folder._header_size"):
        monkeypatch.setattr(f"rsfast.data.{name}", fail)


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
    warning = re.search(r"1 of 6 files.* to list them: (.*)\): (.*)$", record.getMessage())
    command, names = warning.groups()
    assert names == "cat/0001.jpg"
    assert main(shlex.split(command.removeprefix("python -m rsfast.data "))) == 1
    assert "train/cat/0001.jpg" in capsys.readouterr().out


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
    split = (root / "train").rename(tmp_path / "it's a split")
    done = subprocess.run(
        f"{index.check_command(split)} && {index.exclude_command(split, 'cat/0000.jpg')}",
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "it's a split: 6 images, 0 bad" in done.stdout
    assert index_folder(split).paths[:2] == ("cat/0001.jpg", "cat/0002.jpg")


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
    cut(root / "val" / "eel" / "0.jpg")
    assert told(check_split(root / "val"))["eel"][0] == "unused"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    split = make_image_folder(tmp_path, classes=("train", "tram"), train=2, val=0) / "train"
    (found,) = find_splits(split)
    assert (found.root, found.is_flat) == (split, False)
    assert [s.root for s in find_splits(tmp_path)] == [tmp_path / "train", tmp_path / "val"]


@pytest.mark.parametrize("name", ["record", "excluded"])
def test_a_damaged_record_is_reported_and_made_again(
    name: str, root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut(root / "train" / "cat" / "0000.jpg")
    first = check_split(root / "train")
    assert main(["exclude", str(root), "train/dog/0000.jpg"]) == 0
    files = {"excluded" in file.name: file for file in (cache / "check").iterdir()}
    file = files[name == "excluded"]
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
