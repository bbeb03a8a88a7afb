"""Averaged weights of a run: both networks are validated, kept and can be evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import make_image_folder
from rsfast import evaluate, train
from rsfast.files.tables import read_rows
from rsfast.files.unpickle import load_dict
from rsfast.training import checkpoint

COMMON = ["--loader", "pil", "--workers", "0", "--batch-size", "4"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=8, val=9)


def start(images: Path, output: Path, *flags: str) -> int:
    text = "--arch tiny:network --resolutions 32 24 --lr 0.05 --epochs 5 --ema-decay 0.9999"
    return train.main(
        [*text.split(), *COMMON, "--data", str(images), "--output", str(output), *flags]
    )


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("averaged") / "run"
    assert start(images, output) == 0
    return output


def test_short_runs_average_what_they_have_learnt(run: Path, images: Path, tmp_path: Path) -> None:
    assert start(images, tmp_path / "run", "--no-ema-warmup") == 0
    moved = {}
    for name, output in (("warm", run), ("cold", tmp_path / "run")):
        content = load_dict(output / "last.pt")
        averaged, plain = (content[part]["network.fc.weight"] for part in ("ema", "model"))
        moved[name] = (averaged - plain).norm().item()
    assert moved["warm"] < moved["cold"] / 2


def test_the_accuracy_of_both_networks_is_in_the_summary_and_measured_again_by_evaluate(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = read_rows(run / "summary.csv")[-1]
    for weights, prefix in (("averaged", ""), ("plain", "plain_")):
        output = tmp_path / weights
        flags = ["--data", str(images), "--weights", weights, "--output", str(output)]
        flags += ["--arch", "tiny:network"]
        assert evaluate.main([str(run / "last.pt"), *COMMON, *flags]) == 0
        for row in read_rows(output / "accuracy.csv"):
            assert float(row["top1"]) == float(last[f"{prefix}top1_{row['resolution']}"])
    content = load_dict(run / "last.pt")
    for weights, part in (("averaged", "ema"), ("plain", "model"), (None, "ema")):
        model, _ = checkpoint.load_model(run / "last.pt", arch="tiny:network", weights=weights)
        assert torch.equal(model.network.fc.weight, content[part]["network.fc.weight"])
    capsys.readouterr()
    weights_only = [str(run / "model_best.safetensors"), *COMMON, "--weights", "plain"]
    assert evaluate.main([*weights_only, "--arch", "tiny:network"]) == 2
    assert "weights can be chosen of a .pt file" in capsys.readouterr().err


def make_older(path: Path, ema_decay: float) -> None:
    """A checkpoint as it was before the decay could grow."""
    content = load_dict(path)
    del content["format"], content["config"]["ema_warmup"]
    assert content["config"]["ema_decay"] == ema_decay
    checkpoint.save(content, path)


def test_averages_of_an_older_checkpoint_go_on_with_a_constant_decay(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert start(images, output, "--no-ema-warmup", "--epochs", "2") == 0
    make_older(output / "last.pt", 0.9999)
    again = ["--epochs", "2", "--resume", "auto"]
    assert start(images, output, *again) == 2
    error = capsys.readouterr().err
    assert "was trained with ema_warmup = False, this run has True" in error
    assert "resume with the same settings (--no-ema-warmup), or start" in error
    assert start(images, output, *again, "--no-ema-warmup") == 0
    follow = tmp_path / "follow"
    assert start(images, follow, "--continue-from", str(output), "--epochs", "3") == 0
    changed = load_dict(follow / "last.pt")["origin"]["changed"]
    assert changed == {"epochs": (2, 3), "ema_warmup": (False, True)}


def test_an_older_run_without_averages_goes_on_as_it_is(images: Path, tmp_path: Path) -> None:
    flags = ["--ema-decay", "0", "--epochs", "1"]
    assert start(images, tmp_path / "run", *flags) == 0
    make_older(tmp_path / "run" / "last.pt", 0)
    assert start(images, tmp_path / "run", *flags, "--resume", "auto") == 0


def test_a_run_without_averages_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(images, tmp_path / "run", "--ema-decay", "0", "--epochs", "1") == 0
    assert not [name for name in read_rows(tmp_path / "run" / "summary.csv")[0] if "plain" in name]
    checkpoint_flags = [str(tmp_path / "run" / "last.pt"), "--arch", "tiny:network"]
    assert evaluate.main([*checkpoint_flags, *COMMON, "--weights", "averaged"]) == 2
    assert "has no averaged weights: its run had no --ema-decay" in capsys.readouterr().err
