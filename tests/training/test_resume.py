"""Continuing a run: exactly, at any step, or from the start of an epoch when asked to."""

from __future__ import annotations

import logging
import shutil
import signal
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import make_image_folder
from rsfast import train
from rsfast.files.unpickle import load_dict
from rsfast.training import checkpoint, resume
from rsfast.training import run as running  # where a run's clock starts
from rsfast.training.run import Run
from run_helpers import assert_equal, assert_same_run, log_of, stop_when

SMALL = """--arch tiny:network --resolutions 32 24 --batch-size 4 --lr 0.01 --log-every 2 --seed 3
    --epochs 2 --workers 0""".split()
STEPS = 5  # of an epoch: ceil(18 / 4)
SIZED = ["--arch", "mobilenetv2"]  # whose checkpoints take some space


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=9, val=5)


def start(folder: Path, output: Path, *flags: str, loader: str = "pil") -> int:
    data = ["--data", str(folder), "--loader", loader, "--output", str(output)]
    return train.main([*SMALL, *data, *flags])


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert start(folder, output) == 0
    return output


@pytest.mark.parametrize("stop_at", range(1, 2 * STEPS + 1))
def test_a_run_stopped_after_any_step_continues_bit_for_bit(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == stop_at)
        assert start(folder, output) == 75
    assert load_dict(output / "last.pt")["step"] == (stop_at - 1) % STEPS + 1
    assert start(folder, output, "--resume", "auto") == 0
    assert_same_run(output, whole)


@pytest.mark.parametrize(
    ("flags", "loader"),
    [
        (["--ema-decay", "0.9", "--precision", "fp16"], "pil"),
        (["--arch", "mobilenetv2"], "pil"),
        (["--crop", "multi", "--flip", "independent"], "dali"),
        (["--levels", "nearest", "--lighting", "0.5", "--copies", "2"], "pil"),
    ],
    ids=["ema-fp16", "mobilenetv2", "dali", "picked-and-lit"],
)
def test_so_does_one_with_averaged_weights_that_is_large_on_dali_or_picked_and_lit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], loader: str
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    outputs = tmp_path / "whole", tmp_path / "parts"
    assert start(folder, outputs[0], *flags, loader=loader) == 0
    for _ in range(4):  # stops after steps 3, 6 and 9
        with monkeypatch.context() as patch:
            begun = resume.checkpoint.newest(outputs[1]) if outputs[1].exists() else None
            done = load_dict(begun) if begun else {"epoch": 0, "step": 0}
            target = done["epoch"] * STEPS + done["step"] + 3
            stop_when(patch, lambda run, target=target: run.steps_done == target)
            code = start(folder, outputs[1], *flags, "--resume", "auto", loader=loader)
    assert code == 0
    assert_same_run(outputs[1], outputs[0])


def test_a_run_stopped_in_its_validation_validates_again(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    stoppable = train._stoppable

    def with_signal(run: Run, interrupt: Any) -> Any:
        for number, batch in enumerate(stoppable(run, interrupt)):
            interrupt.requested = number == 1
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(train, "_stoppable", with_signal)
        assert start(folder, output) == 75
    content = load_dict(output / "last.pt")
    assert (content["epoch"], content["step"], content["validating"]) == (0, STEPS, True)
    assert start(folder, output, "--resume", "auto") == 0
    assert_same_run(output, whole)


def test_checkpoints_come_every_so_many_steps_and_the_last_ones_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = resume.save

    def noting(run: Run, **best: bool) -> None:
        saved.append(run.steps_done)
        save(run, **best)

    monkeypatch.setattr(train, "save", noting)
    flags = ["--checkpoint-every", "2", "--keep", "3"]
    assert start(folder, tmp_path / "run", *flags) == 0
    assert saved == [2, 4, 5, 6, 8, 10]
    contents = [load_dict(tmp_path / "run" / f"last{n}.pt") for n in ("", "-1", "-2")]
    assert [(c["epoch"], c["step"]) for c in contents] == [(2, 0), (1, 3), (1, 1)]
    assert not (tmp_path / "run" / "last-3.pt").exists()


def test_checkpoints_come_every_so_many_minutes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    saved: list[int] = []
    save = resume.save

    def noting(run: Run, **best: bool) -> None:
        saved.append(run.steps_done)
        save(run, **best)

    def passing() -> float:
        nonlocal clock
        clock += 25.0
        return clock

    clocks = types.SimpleNamespace(monotonic=passing, perf_counter=time.perf_counter)
    monkeypatch.setattr(train, "save", noting)
    monkeypatch.setattr(train, "time", clocks)
    monkeypatch.setattr(running, "time", clocks)
    monkeypatch.setattr(resume, "time", clocks)
    assert start(folder, tmp_path / "run", "--checkpoint-every", "1m") == 0
    assert saved == [3, 5, 8, 10]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    folder: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    assert start(folder, output, "--checkpoint-every", "3") == 0
    data = bytearray((output / "last.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (output / "last.pt").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert start(folder, output, "--checkpoint-every", "3", "--resume", "auto") == 0
    assert "CONTINUING FROM AN OLDER CHECKPOINT" in caplog.text
    assert "last.pt is damaged: its checksum does not match" in caplog.text
    assert (output / "last.pt.damaged").read_bytes() == data
    assert [line["step"] for line in log_of(output) if line["event"] == "step"][-1] == 10
    found, expected = (load_dict(path / "last.pt") for path in (output, whole))
    assert_equal(found["model"], expected["model"], "model")


def test_another_number_of_images_is_refused_or_starts_the_epoch_again(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    more = make_image_folder(tmp_path / "more", train=11, val=5)
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == STEPS + 2)
        assert start(folder, output) == 75
    assert start(more, output, "--resume", "auto") == 2
    assert "was trained on other images than" in capsys.readouterr().err
    assert start(folder, output, "--resume", "auto", "--batch-size", "3") == 2
    error = capsys.readouterr().err
    assert "was trained with batch_size = 4, this run has 3" in error
    assert "continue from the start of the epoch with --restart-epoch" in error
    assert start(folder, output, "--resume", "auto", loader="dali") == 2
    assert "was trained with loader = 'pil', this run has 'dali'" in capsys.readouterr().err
    with caplog.at_level(logging.WARNING):
        flags = ["--resume", "auto", "--restart-epoch", "--batch-size", "3", "--log-every", "1"]
        assert start(more, output, *flags) == 0
    assert "epoch 2 starts again, 2 of its steps were done" in caplog.text
    # 22 images in batches of 3: 8 steps in each epoch, of which the second was trained.
    steps = [line["step"] for line in log_of(output) if line["event"] == "step"]
    assert steps == [2, 4, 5, *range(9, 17)]
    assert [line["epoch"] for line in log_of(output) if line["event"] == "epoch"] == [1, 2]
    # The command again, unchanged: there is no reason any more to start an epoch again.
    caplog.clear()
    assert start(more, output, *flags) == 0
    assert "starts again" not in caplog.text


def test_restarting_an_epoch_needs_a_run_to_continue(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        start(folder, tmp_path / "run", "--restart-epoch")
    assert "restart_epoch needs a run to continue: add --resume auto" in capsys.readouterr().err


def test_other_versions_are_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    assert start(folder, output) == 0
    content = load_dict(output / "last.pt")
    content.pop("format")
    content["versions"]["torch"] = "2.0.0"
    checkpoint.save(content, output / "last.pt")
    with caplog.at_level(logging.WARNING):
        assert start(folder, output, "--resume", "auto") == 0
    assert f"resumed with torch {torch.__version__} instead of 2.0.0" in caplog.text


def test_what_a_killed_writer_left_is_removed(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    for name in (".last.pt.123", ".last.pt.coming.9", "..last.pt.coming.9.9", ".model_best.pt.7"):
        (output / name).write_bytes(b"half")
    assert start(folder, output) == 0
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_refused_before_the_first_step(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = type("Usage", (), {"free": 10 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert start(folder, tmp_path / "run", *SIZED) == 2
    error = capsys.readouterr().err
    assert "must have room for 5 checkpoints, 0.09 GiB more, 0.01 are free" in error
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_run_whose_checkpoints_fill_the_disk_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    flags = [*SIZED, "--epochs", "1", "--keep", "3", "--checkpoint-every", "2"]
    assert start(folder, output, *flags) == 0
    usage = type("Usage", (), {"free": 50 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert start(folder, output, *flags, "--resume", "auto") == 0


def test_a_log_with_other_things_in_it_is_read(folder: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    with open(output / "log.jsonl", "ab") as file:
        file.write(b'[1, 2]\n\x00\x00\x00\n{"event": "st')
    assert start(folder, output, "--resume", "auto") == 0
    assert log_of(output) == log_of(whole)


def test_random_numbers_of_every_kind_continue(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    import numpy as np

    drawn: dict[str, list[Any]] = {}
    lr = Run.lr

    def drawing(run: Run, step: int) -> float:
        numbers = random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()
        drawn.setdefault(str(run.folder), []).append(numbers)
        return lr(run, step)

    monkeypatch.setattr(Run, "lr", drawing)
    assert start(folder, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == 7)
        assert start(folder, tmp_path / "parts") == 75
    random.seed(99)
    np.random.seed(99)
    assert start(folder, tmp_path / "parts", "--resume", "auto") == 0
    assert drawn[str(tmp_path / "parts")] == drawn[str(tmp_path / "whole")]


def test_handlers_are_put_back(folder: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert start(folder, tmp_path / "run", "--epochs", "1") == 0
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
