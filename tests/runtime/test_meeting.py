"""Processes that should meet and do not: who is awaited is said, and signals are heard."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import environment

# The words come early, and all the patience is a few seconds.
START = """
import sys
from rsfast.runtime import distributed
distributed._FIRST_WORD_S, distributed._NEXT_WORD_S, distributed._PATIENCE_S = 0.5, 1.0, {patience}
from rsfast import {command}
sys.exit({command}.main(sys.argv[1:]))
"""
COMMANDS = {
    "train": "--arch tiny:network --resolutions 32 24 --loader synthetic --output run".split(),
    "evaluate": ["nothing.pt"],
}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        number = free.getsockname()[1]
    return number


@contextmanager
def started(
    command: str, rank: int, port: int, folder: Path, patience: int = 1800
) -> Iterator[subprocess.Popen[str]]:
    """One process of two."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", START.format(command=command, patience=patience)),
            *(*COMMANDS[command], "--device", "cpu"),
        ],
        cwd=folder,
        env={**environment(), **place, "WORLD_SIZE": "2", "RANK": str(rank)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("command", "rank", "number", "code"),
    [
        ("train", 0, signal.SIGINT, 130),
        ("train", 1, signal.SIGTERM, 75),
        ("evaluate", 1, signal.SIGINT, 130),
        ("evaluate", 0, signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_a_process_that_waits_for_another_says_so_and_ends_by_a_signal(
    command: str, rank: int, number: signal.Signals, code: int, port: int, tmp_path: Path
) -> None:
    with started(command, rank, port, tmp_path) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line == f"waiting for 1 of 2 processes at localhost:{port}: rank {1 - rank}\n"
        begin = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
        assert time.monotonic() - begin < 6
        assert process.returncode == code, said
        assert "Traceback" not in said


def test_a_process_that_nobody_joins_gives_up_with_a_sentence(port: int, tmp_path: Path) -> None:
    with started("train", 0, port, tmp_path, patience=2) as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert f"error: 1 of 2 processes at localhost:{port} did not start within" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_port_that_is_taken_is_named(command: str, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with started(command, 0, port, tmp_path) as process:
            said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert f"rsfast.{command}: error: process 0 finds no place to meet at localhost:{port}" in said
    assert "address already in use): give MASTER_ADDR" in said
    assert "Traceback" not in said
    assert said.count("\n") == 1


def test_a_place_to_meet_that_is_not_given_is_named(tmp_path: Path) -> None:
    place = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    done = subprocess.run(
        [sys.executable, "-m", "rsfast.train", *COMMANDS["train"], "--device", "cpu"],
        cwd=tmp_path,
        env={**environment(), **place},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "start them with torchrun, which sets all of them" in done.stderr
    assert os.listdir(tmp_path) == []
