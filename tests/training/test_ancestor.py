"""Runs that go on where another one has ended."""

from __future__ import annotations

import dataclasses
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import make_image_folder
from rsfast import train
from rsfast.files.unpickle import load_dict
from rsfast.training.ancestor import FIXED
from rsfast.training.run import Run
from run_helpers import assert_equal, assert_same_run, log_of, stop_when

SMALL = """--arch tiny:network --resolutions 32 24 --batch-size 4 --lr 0.01 --log-every 2 --seed 3
    --workers 0 --loader pil""".split()
AVERAGED = ["--ema-decay", "0.9"]
ENDED = 2  # epochs
OF_ITS_OWN = ("config", "config_hash", "origin", "best")  # of a continued run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=9, val=5)


@pytest.fixture(scope="module")
def ended(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ended") / "run"
    assert start(folder, output, "--epochs", str(ENDED), *AVERAGED) == 0
    return output


def start(folder: Path, output: Path, *flags: str) -> int:
    return train.main([*SMALL, "--data", str(folder), "--output", str(output), *flags])


def assert_same_end(ours: Path, whole: Path) -> None:
    """All that is defined: the state after the last epoch, and the log of its own epochs."""
    found, expected = (load_dict(output / "last.pt") for output in (ours, whole))
    for content in (found, expected):
        for name in OF_ITS_OWN:
            content.pop(name)
    assert_equal(found, expected, "last.pt")
    begun = log_of(ours)[0]["epoch"]
    assert log_of(ours) == [line for line in log_of(whole) if line["epoch"] >= begun]
    rows = (whole / "summary.csv").read_text().splitlines()
    own = (ours / "summary.csv").read_text().splitlines()
    assert own == [rows[0], *rows[begun:]]


@pytest.mark.parametrize("flags", [[], ["--lr", "0.02", "--weight-decay", "0.1"]], ids=str)
def test_a_continued_run_is_the_end_of_a_longer_one_with_its_schedule_bit_for_bit(
    folder: Path, ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    output = tmp_path / "run"
    longer = ["--epochs", "4", *AVERAGED, *flags]
    assert start(folder, output, "--continue-from", str(ended), *longer) == 0
    own_rate, take = Run.lr, train.train_epoch

    def rate(run: Run, step: int) -> float:
        """The ancestor's schedule as long as it lasted."""
        if step >= ENDED * run.steps_per_epoch:
            return own_rate(run, step)
        cfg = dataclasses.replace(run.cfg, epochs=ENDED, lr=0.01)
        parts = types.SimpleNamespace(cfg=cfg, steps_per_epoch=run.steps_per_epoch, rank=run.rank)
        return own_rate(parts, step)

    def epoch(run: Run, interrupt: Any) -> None:
        for group in run.optimizer.param_groups:
            group["weight_decay"] = 1e-4 if run.at.epoch < ENDED else run.cfg.weight_decay
        take(run, interrupt)

    monkeypatch.setattr(Run, "lr", rate)
    monkeypatch.setattr(train, "train_epoch", epoch)
    assert start(folder, tmp_path / "whole", *longer) == 0
    assert_same_end(output, tmp_path / "whole")


def test_with_the_same_settings_it_is_the_run_itself(
    folder: Path, ended: Path, tmp_path: Path
) -> None:
    flags = ["--continue-from", str(ended / "last-1.pt"), "--epochs", str(ENDED), *AVERAGED]
    assert start(folder, tmp_path / "run", *flags) == 0
    assert_same_end(tmp_path / "run", ended)


def test_it_says_where_it_comes_from_and_is_resumed_without_its_ancestor(
    folder: Path, ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "ancestor"
    copy.mkdir()
    (copy / "last.pt").write_bytes((ended / "last.pt").read_bytes())
    flags = ["--continue-from", str(copy), "--epochs", "4", "--batch-size", "6", *AVERAGED]
    assert start(folder, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == ENDED * 3 + 2)
        assert start(folder, tmp_path / "parts", *flags) == 75
    (copy / "last.pt").unlink()
    assert start(folder, tmp_path / "parts", *flags, "--resume", "auto") == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    content = load_dict(tmp_path / "parts" / "last.pt")
    origin = content["origin"]
    assert origin["continued_from"] == str(copy / "last.pt")
    assert origin["continued_from_config_hash"] == load_dict(ended / "last.pt")["config_hash"]
    assert origin["continued_from_epoch"] == ENDED
    assert origin["changed"] == {"batch_size": (4, 6), "epochs": (ENDED, 4)}
    for run in ("whole", "parts"):
        line = json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[0])
        assert line["continued_from_epoch"] == ENDED
        assert line["continued_from"] == str(copy / "last.pt")
    assert (tmp_path / "whole" / "model_best.pt").exists(), "its own best epoch"


@pytest.mark.parametrize(
    "flags",
    [
        ["--decay", "weights"],
        ["--freeze", "stem", "bn2"],
        ["--decay", "weights", "--freeze", "backbone", "--precision", "bf16", "--sync-bn"],
        ["--momentum", "0.5"],
    ],
    ids=" ".join,
)
def test_momentum_follows_its_parameter_whatever_is_decayed_or_frozen(
    folder: Path,
    ended: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
) -> None:
    runs: list[Run] = []

    def epochs(run: Run, interrupt: Any) -> None:
        runs.append(run)
        run.log.close()

    monkeypatch.setattr(train, "train_epochs", epochs)
    started = ["--continue-from", str(ended), "--epochs", "3", *flags]
    assert start(folder, tmp_path / "run", *started) == 0
    (run,) = runs
    content = load_dict(ended / "last.pt")
    named = [*run.model.named_parameters(), *run.loss.named_parameters()]
    # The ancestor decayed everything: its optimiser has the parameters in their own order.
    for place, (name, param) in enumerate(named):
        theirs = content["optimizer"]["state"][place]["momentum_buffer"]
        assert theirs.abs().max() > 0
        if param.requires_grad:
            assert torch.equal(run.optimizer.state[param]["momentum_buffer"], theirs), name
        else:
            assert param not in run.optimizer.state, name
    assert run.at.epoch == ENDED
    assert run.ema is None


def test_without_momentum_and_with_averages_of_its_own_it_starts_those_afresh(
    folder: Path, ended: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    start_flags = ["--continue-from", str(ended), "--epochs", "3", "--momentum", "0"]
    assert start(folder, plain, *start_flags) == 0
    assert "ema" not in load_dict(plain / "last.pt")
    flags = ["--continue-from", str(plain), "--epochs", "4", *AVERAGED]
    assert start(folder, tmp_path / "run", *flags) == 0
    assert load_dict(tmp_path / "run" / "last.pt")["ema_updates"] == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "mobilenetv2"], "was trained with arch = 'tiny:network', this run has"),
        (["--resolutions", "32"], r"was trained with resolutions = \(32, 24\)"),
        (["--bn", "shared"], "was trained with bn = 'private'.*--pretrained takes its weights"),
        (["--copies", "2"], "was trained with copies = 1"),
        (["--epochs", "2"], r"epochs must be more than the 2 that .*last.pt has done, got 2"),
    ],
    ids=" ".join,
)
def test_what_an_ancestor_has_no_place_for_is_refused(
    folder: Path,
    ended: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    started = ["--continue-from", str(ended), "--epochs", "4", *flags]
    assert start(folder, tmp_path / "run", *started) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    go_with_arch = {"weight_bits", "activation_bits", "task"}
    assert set(FIXED) == {"arch", "resolutions", "bn", "copies", *go_with_arch}


def test_weights_to_begin_with_are_the_ancestors_or_refused(
    folder: Path, ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(ended / "model_best.pt")
    flags = ["--epochs", "3", "--pretrained", weights, "--continue-from"]
    assert start(folder, tmp_path / "run", *flags, str(ended)) == 2
    assert f"pretrained {weights} must be left out, or be what" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    begun = tmp_path / "begun"
    assert start(folder, begun, "--epochs", "1", "--pretrained", weights) == 0
    assert start(folder, tmp_path / "run", *flags, str(begun)) == 0
    assert load_dict(tmp_path / "run" / "last.pt")["origin"]["continued_from_epoch"] == 1
    assert start(folder, tmp_path / "run", *flags, str(begun), "--resume", "auto") == 0


def test_other_classes_a_part_of_an_epoch_and_no_run_at_all_are_refused(
    folder: Path,
    ended: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = make_image_folder(tmp_path / "others", ("one", "two"), train=9, val=5)
    flags = ["--epochs", "4", "--continue-from"]
    assert start(others, tmp_path / "run", *flags, str(ended)) == 2
    assert f"was trained on other classes than those of {others}: --p" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("rsfast.training.start.builtin_root", lambda: others)
        without = [*SMALL, "--output", str(tmp_path / "run"), *flags, str(ended)]
        assert train.main(without) == 2
        error = capsys.readouterr().err
        assert "than those of the built-in set: name its images by --data DIR or --conf" in error
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == 2)
        assert start(folder, tmp_path / "stopped", "--epochs", "2") == 75
    capsys.readouterr()
    assert start(folder, tmp_path / "run", *flags, str(tmp_path / "stopped")) == 2
    assert "was written within epoch 1: finish that run" in capsys.readouterr().err
    assert start(folder, tmp_path / "run", *flags, str(tmp_path)) == 2
    assert "last.pt does not exist" in capsys.readouterr().err
    assert start(folder, ended, *flags, str(ended)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
