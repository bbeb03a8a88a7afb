"""The run folder: one run at a time, and nothing of a run is overwritten. Through the command."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import environment, make_image_folder, torchrun
from rsfast import train
from rsfast.files import seal
from rsfast.files.unpickle import load_dict
from rsfast.training import checkpoint
from rsfast.training import folder as folders
from run_helpers import assert_equal, assert_same_run, log_of, stop_when

FAULTS = str(Path(__file__).parent.parent / "faults.py")
SMALL = """--arch tiny:network --resolutions 32 24 --batch-size 6 --lr 0.01 --log-every 2 --seed 3
    --epochs 2 --workers 0 --loader pil""".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=9, val=5)


def flags(images: Path, output: Path, *more: str) -> list[str]:
    return [*SMALL, "--data", str(images), "--output", str(output), *more]


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(flags(images, output)) == 0
    assert not (output / "run.lock").exists()
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_until_the_first_ends_however_it_does(
    images: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log.jsonl"
    faults = {"delay": {"step": 4, "seconds": 120}, "log": str(log)}
    arguments = flags(images, output, "--checkpoint-every", "1", "--resume", "auto")
    first = subprocess.Popen(
        [sys.executable, FAULTS, json.dumps(faults), *arguments],
        env=environment(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        while not (log.exists() and len(log.read_text().splitlines()) == 5):
            assert first.poll() is None
            time.sleep(0.1)
        before = contents(output)
        for command in (arguments, flags(images, output)):
            second = subprocess.run(
                [sys.executable, "-m", "rsfast.train", *command],
                env=environment(),
                capture_output=True,
                text=True,
            )
            assert second.returncode == 2
            holder = f"process {first.pid} on {platform.node()}"
            assert f"{output} is in use by another run ({holder}): wait" in second.stderr
            assert second.stderr.count("\n") == 1
        assert contents(output) == before
    finally:
        first.kill()
        first.wait()
    assert (output / "run.lock").exists(), "it was killed"
    assert train.main(arguments) == 0
    assert not (output / "run.lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_trained_on_with_a_warning(
    number: int,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def without(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", without)
    assert train.main(flags(images, tmp_path / "run", "--epochs", "1")) == 0
    assert caplog.text.count("has no locks") == 1
    assert "nothing keeps a second run out of it" in caplog.text


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    assert train.main(flags(tmp_path / "nothing", tmp_path / "run")) == 2
    assert not (tmp_path / "run").exists()


def test_tasks_of_slurm_that_do_not_know_of_each_other_are_warned_of(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert train.main(flags(images, tmp_path / "run", "--epochs", "1")) == 0
    assert "Slurm has 2 tasks (SLURM_NTASKS) and WORLD_SIZE is not set" in caplog.text


LOSSES = {
    "best": ("last.pt last-1.pt", "model_best.pt", "--resume {}/model_best.pt continues"),
    "weights": ("last.pt last-1.pt model_best.pt", "model_best.safetensors", "move them"),
    "log": ("last.pt last-1.pt model_best.pt model_best.safetensors", "a log of 2 epochs", "move"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_run_that_has_lost_its_last_checkpoint_is_not_overwritten(
    case: str,
    images: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    gone, named, remedy = LOSSES[case]
    for name in gone.split():
        (output / name).unlink()
    before = contents(output)
    assert train.main(flags(images, output, "--resume", "auto")) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "but no last.pt to continue from" in error
    assert remedy.format(output) in error
    assert train.main(flags(images, output)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert contents(output) == before
    if case == "best":
        best = load_dict(output / "model_best.pt")["epoch"]
        assert train.main(flags(images, output, "--resume", str(output / "model_best.pt"))) == 0
        assert best in (1, 2)
        assert load_dict(output / "last.pt")["epoch"] == 2


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(
    images: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_if_due", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(flags(images, output, "--resume", "auto"))
    assert (output / "log.jsonl").exists()
    assert train.main(flags(images, output)) == 2, "nobody has said that it may start again"
    assert "holds a run already: continue it with --resume auto" in capsys.readouterr().err
    assert train.main(flags(images, output, "--resume", "auto")) == 0
    assert_same_run(output, whole)


@pytest.mark.parametrize("written", [0, 1, 2], ids=["nothing", "weights", "best"])
def test_a_run_that_ended_while_it_saved_for_the_first_time_goes_on(
    written: int,
    images: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "run"

    class Killed(BaseException):
        pass

    write_whole, calls = checkpoint.write_whole, []

    def write(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > written:
            raise Killed
        write_whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", write)
        with pytest.raises(Killed):
            train.main(flags(images, output, "--resume", "auto"))
    assert [line["event"] for line in log_of(output)].count("epoch") == 1
    assert not (output / "last.pt").exists()
    assert train.main(flags(images, output, "--resume", "auto")) == 0
    assert_same_run(output, whole)


def test_somebody_elses_checkpoint_is_not_continued(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    assert train.main(flags(images, tmp_path / "run", "--resume", str(tmp_path / "other.pt"))) == 2
    assert "other.pt is not of rsfast: it has no 'format'" in capsys.readouterr().err


def test_a_checkpoint_from_elsewhere_must_be_of_the_run_in_the_folder(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, other = tmp_path / "run", tmp_path / "other"
    for folder in (output, other):
        assert train.main(flags(images, folder)) == 0
    before = contents(output)
    assert train.main(flags(images, output, "--resume", str(other / "last-1.pt"))) == 2
    error = capsys.readouterr().err
    assert f"{output} holds a run already" in error
    assert f"{other / 'last-1.pt'} was written in {other}: name another --output, or" in error
    assert contents(output) == before
    # An older copy of the run in the folder, from a backup, replaces what is there.
    backup = tmp_path / "backup.pt"
    shutil.copy(output / "last-1.pt", backup)
    (output / "last.pt").write_bytes(b"damaged")
    assert train.main(flags(images, output, "--resume", str(backup))) == 0
    assert load_dict(output / "last.pt")["epoch"] == 2
    # A run that was moved takes it once it lies in its folder; an empty folder takes any.
    moved = shutil.move(output, tmp_path / "moved")
    assert train.main(flags(images, moved, "--resume", str(backup))) == 2
    shutil.copy(backup, moved / "copy.pt")
    assert train.main(flags(images, moved, "--resume", str(moved / "copy.pt"))) == 0
    assert train.main(flags(images, tmp_path / "empty", "--resume", str(backup))) == 0


def test_an_unreadable_checkpoint_stops_the_run_and_is_left_as_it_is(
    images: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)

    def stale(path: Path, mode: str) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(seal, "open", stale, raising=False)
    monkeypatch.setattr(seal, "_PAUSES_S", (0.0,) * 3)
    before = contents(output)
    assert train.main(flags(images, output, "--resume", "auto")) == 1
    assert "last.pt cannot be read (Stale file handle), which does not say" in (
        capsys.readouterr().err
    )
    assert contents(output) == before


@pytest.mark.slow
def test_machines_that_do_not_share_the_run_folder_continue_from_the_first_ones(
    images: Path, tmp_path: Path
) -> None:
    """Rank 1 sees another folder under the same name: an empty one in its own place."""
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, sys\n"
        "from rsfast import train\n"
        "os.chdir(os.environ['RANK'])\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    arguments = flags(images, Path("run"), "--batch-size", "3", "--resume", "auto")
    torchrun(str(script), *arguments, folder=tmp_path)
    for name in ("last.pt", "model_best.pt", "model_best.safetensors", "summary.csv"):
        os.replace(tmp_path / "0" / "run" / name, tmp_path / name)
    os.replace(tmp_path / "0" / "run" / "last-1.pt", tmp_path / "0" / "run" / "last.pt")
    said = torchrun(str(script), *arguments, folder=tmp_path)
    assert "resumed after epoch 1 of 2" in said
    assert not (tmp_path / "1" / "run").exists()
    found, expected = load_dict(tmp_path / "0" / "run" / "last.pt"), load_dict(tmp_path / "last.pt")
    assert_equal(found["ranks"], expected["ranks"], "ranks")
    assert_equal(found["model"], expected["model"], "model")


def test_signal_handlers_and_locks_do_not_outlive_a_stopped_run(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == 2)
        assert train.main(flags(images, output)) == 75
    assert not (output / folders._LOCK).exists()
    assert train.main(flags(images, output, "--resume", "auto")) == 0
    assert_same_run(output, whole)


def test_a_batch_of_one_is_refused_where_a_map_is_one_pixel(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = flags(images, tmp_path / "run", "--arch", "resnet18", "--batch-size", "1")
    assert train.main(one) == 2
    error = capsys.readouterr().err
    assert "batch_size must be at least 2 where a map of the network is one pixel" in error
    assert "in front of network.layer4.0.downsample.1 at resolution 32" in error
    assert not (tmp_path / "run").exists()
    assert train.main([*one, "--resolutions", "64", "48", "--epochs", "1"]) == 0
