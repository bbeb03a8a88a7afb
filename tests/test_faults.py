"""Runs that are killed, stopped, starved of disk or fed broken data, as processes of their own."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import environment, make_image_folder, torchrun
from rsfast import train
from rsfast.files.unpickle import load_dict
from run_helpers import assert_same_run, log_of

FAULTS = str(Path(__file__).with_name("faults.py"))
STOPPED = 75
STEPS, EPOCHS = 10, 3  # 60 images in steps of 6
LARGE = "--arch mobilenetv2 --resolutions 64 48 --epochs 6".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=30, val=8)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As `environment` says to other processes: sums in another order would differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(folder: Path, output: Path, *more: str, batch: int = 6) -> list[str]:
    text = f"""--arch tiny:network --resolutions 32 24 --batch-size {batch} --lr 0.01 --seed 3
        --log-every 3 --loader pil --workers 0 --epochs {EPOCHS} --checkpoint-every 4
        --resume auto"""
    return [*text.split(), "--data", str(folder), "--output", str(output), *more]


def alone(faults: dict[str, Any], arguments: list[str], expect: int = 0) -> str:
    """Runs a process of its own; returns what it says on stderr."""
    done = subprocess.run(
        [sys.executable, FAULTS, json.dumps(faults), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


def images_of(log: Path) -> dict[tuple[int, int], list[int]]:
    """(rank, step) -> the images of the last process that took this step."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {(line["rank"], line["step"]): line["images"] for line in lines}


@pytest.mark.slow
def test_twenty_kills_of_two_ranks_leave_the_run_as_it_would_have_been(
    folder: Path, tmp_path: Path
) -> None:
    logs = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    outputs = tmp_path / "whole", tmp_path / "killed"
    arguments = flags(folder, outputs[0], *LARGE, batch=3)
    torchrun(FAULTS, json.dumps({"log": str(logs[0])}), *arguments, folder=tmp_path)

    rng = random.Random(5)
    at = [[step, rng.randrange(2)] for step in sorted(rng.sample(range(STEPS * 6), 20))]
    (tmp_path / "kills").mkdir()
    faults = {"kills": {"at": at, "folder": str(tmp_path / "kills")}, "log": str(logs[1])}
    arguments = flags(folder, outputs[1], *LARGE, batch=3)
    said = torchrun(FAULTS, json.dumps(faults), *arguments, folder=tmp_path, restarts=20)
    assert len(list((tmp_path / "kills").iterdir())) == 20
    assert said.count("resumed after epoch") >= 15, "the first may come before a checkpoint"

    assert_same_run(outputs[1], outputs[0])
    trained = images_of(logs[1])
    assert trained == images_of(logs[0])
    for epoch in range(6):
        steps = range(epoch * STEPS, (epoch + 1) * STEPS)
        images = [image for step in steps for rank in (0, 1) for image in trained[rank, step]]
        assert sorted(images) == list(range(60)), "each image once"


RESTART = """
import os, sys
from rsfast.runtime import distributed
rank = distributed.join("cpu")
first = not os.path.exists("failed")
print("joined", rank.index, distributed.same_everywhere(rank, 1), flush=True)
if rank.index == 1 and first:
    open("failed", "w").close()
    os._exit(3)
total = distributed.sum_over_ranks(__import__("torch").ones(1))
print("sum", float(total), flush=True)
distributed.leave()
"""


def test_two_machines_that_count_their_restarts_apart_find_each_other(tmp_path: Path) -> None:
    (tmp_path / "restart.py").write_text(RESTART)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = f"""-m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=3
        --rdzv-backend=c10d --rdzv-id=test --rdzv-endpoint=localhost:{port}"""
    agents = [
        subprocess.Popen(
            [sys.executable, *launcher.split(), "restart.py"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = [agent.communicate(timeout=150)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert all("sum 2.0" in text for text in said), said


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(flags(folder, output)) == 0
    return output


def test_a_kill_between_two_checkpoints_leaves_the_run_as_it_would_have_been(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    (tmp_path / "kills").mkdir()
    kills = {"at": [[14, 0]], "folder": str(tmp_path / "kills")}
    alone({"kills": kills}, flags(folder, output), expect=-signal.SIGKILL)
    content = load_dict(output / "last.pt")
    assert (content["epoch"], content["step"]) == (1, 2)
    assert train.main(flags(folder, output)) == 0
    assert_same_run(output, whole)


@pytest.mark.parametrize("at", ["start", "step", "validation", "checkpoint"])
def test_sigterm_at_any_time_is_resumable(
    folder: Path, whole: Path, tmp_path: Path, at: str
) -> None:
    output = tmp_path / "run"
    error = alone({"signal": {"at": at, "step": 13}}, flags(folder, output), expect=STOPPED)
    said = {
        "start": "stopped, SIGTERM before the first step",
        "step": "stopped, saved after step 14",
        "validation": "stopped, saved after step 10, in its validation",
        "checkpoint": "stopped, saved after step 5",  # written after step 4
    }
    last = output / "last.pt"
    saved = f"--resume auto continues from {last}" if at != "start" else "nothing is saved yet"
    assert f"rsfast.train: {said[at]}; {saved}" in error
    assert train.main(flags(folder, output)) == 0
    assert_same_run(output, whole)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(folder: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "whole", tmp_path / "stopped"
    torchrun(FAULTS, "{}", *flags(folder, outputs[0], batch=3), folder=tmp_path)
    faults = {
        "signal": {"at": "step", "step": 7, "rank": 1},
        "delay": {"step": 8, "seconds": 3, "rank": 0},
    }
    arguments = flags(folder, outputs[1], batch=3)
    said = torchrun(FAULTS, json.dumps(faults), *arguments, folder=tmp_path, expect=1)
    # The hosts count the votes of one step during the next.
    assert said.count("rsfast.train: stopped, saved after step 9") == 1, "rank 0 says it"
    assert f"exitcode  : {STOPPED}" in said
    torchrun(FAULTS, "{}", *arguments, folder=tmp_path)
    assert_same_run(outputs[1], outputs[0])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_to_torchrun_saves_the_run(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    log, output = tmp_path / "log.jsonl", tmp_path / "run"
    # torchrun passes a signal on when it comes to it.
    faults = {"delay": {"step": 5, "seconds": 50, "until_signal": True}, "log": str(log)}
    launcher = "-m torch.distributed.run --standalone --nproc-per-node=2"
    launcher += " --signals-to-handle=SIGTERM,SIGUSR1"
    arguments = [FAULTS, json.dumps(faults), *flags(folder, output, batch=3)]
    process = subprocess.Popen(
        [sys.executable, *launcher.split(), *arguments],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (log.exists() and (0, 5) in images_of(log)):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.wait()
    content = load_dict(output / "last.pt")
    assert (content["epoch"], content["step"]) == (0, 7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_the_process_at_once(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log.jsonl"
    faults = {"delay": {"step": 2, "seconds": 60}, "log": str(log)}
    command = [sys.executable, FAULTS, json.dumps(faults), *flags(folder, tmp_path / "run")]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    try:
        while not (log.exists() and len(log.read_text().splitlines()) == 3):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        process.send_signal(number)  # torchrun passes on what the scheduler has sent already
        time.sleep(2.5)
        assert process.poll() is None, "the first one waits for the step"
        process.send_signal(number)
        assert process.wait(timeout=5) == STOPPED
    finally:
        process.kill()
        process.wait()


def test_a_full_disk_ends_the_run_with_its_last_checkpoint_whole(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    # Three writes each: the archive in two parts, and its seal. This one is of the third.
    error = alone({"write": {"number": 7}}, flags(folder, output), expect=1)
    assert "rsfast.train: error: [Errno 28] No space left on device" in error
    content = load_dict(output / "last.pt")
    assert (content["epoch"], content["step"]) == (0, 8)
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    assert train.main(flags(folder, output)) == 0
    assert_same_run(output, whole)


def test_a_nan_in_one_level_of_one_step_is_skipped_and_counted(
    folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    alone({"nan": {"step": 7, "level": 1}}, flags(folder, output, "--log-every", "1"))
    lines = [line for line in log_of(output) if line["event"] == "step"]
    assert [line["step"] for line in lines if line["skipped"]] == [8]
    assert [line["step"] for line in lines if line["loss"] is None] == [8]
    assert [line["event"] for line in log_of(output)].count("epoch") == EPOCHS


def test_an_image_that_breaks_later_ends_the_run_with_its_name(
    folder: Path, tmp_path: Path
) -> None:
    error = alone({"decode": {}}, flags(folder, tmp_path / "run"), expect=1)
    assert "rsfast.train: error: cannot decode" in error
    assert ".jpg: it is broken" in error
