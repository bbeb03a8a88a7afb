"""Progress: a bar for a terminal, whole lines for a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import environment, make_image_folder
from rsfast import train
from rsfast.data.__main__ import main as data
from rsfast.files import progress as module
from rsfast.files.progress import progress


def test_a_file_gets_whole_lines_with_time_between_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress(range(1000), desc="counting", unit="img")) == list(range(1000))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("counting: 100%, 1000/1000 [00:00<00:00, ")
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    with progress(total=3, desc="counting", unit="img") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"counting: {n}%" for n in (33, 67, 100)]


def test_lines_come_when_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=200, desc="epoch 1/1", unit="img", lines="asked", initial=100) as bar:
        for step in range(1, 51):
            bar.update(2)
            if step % 25 == 0:
                bar.set_postfix_str(f"loss {step}")
    error = capsys.readouterr().err
    assert "\r" not in error
    assert [line.split("[")[0] for line in error.splitlines()] == [
        "epoch 1/1: 75%, 150/200 ",
        "epoch 1/1: 100%, 200/200 ",
    ]
    assert error.splitlines()[1].endswith(", loss 50]")


def test_what_is_not_to_be_shown_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2], disable=True)) == [1, 2]
    with progress(total=2, disable=True, lines="asked") as bar:
        bar.update()
        bar.set_postfix_str("loss 1")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar() -> None:
    if not hasattr(os, "openpty"):
        pytest.skip("there are no pseudo-terminals")
    ours, theirs = os.openpty()
    code = "from rsfast.files.progress import progress\nfor _ in progress(range(3)): pass"
    subprocess.run(
        [sys.executable, "-c", code], stderr=theirs, env={**environment(), "TERM": "xterm"}
    )
    os.close(theirs)
    assert b"\r" in os.read(ours, 10_000)
    os.close(ours)


def test_the_commands_write_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_image_folder(tmp_path / "images", train=6, val=2)
    flags = "--arch tiny:network --resolutions 32 24 --batch-size 2 --epochs 2 --loader pil"
    flags += f" --workers 0 --log-every 3 --data {images} --output {tmp_path / 'run'}"
    assert train.main(flags.split()) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert [line.split(" [")[0] for line in lines] == [
        f"epoch {epoch}/2: {done}"
        for epoch in (1, 2)
        for done in ("50%, 6.00/12.0", "100%, 12.0/12.0")
    ]
    assert all("loss " in line for line in lines)
    assert data(["check", str(images), "--workers", "1"]) == 0
    error = capsys.readouterr().err
    assert "checking train: 100%, 12/12 [" in error
    assert "\r" not in error
