"""Runs with picked levels and colour noise: what they leave is used as they were validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import make_image_folder
from rsfast import analyze, evaluate, train
from rsfast.deploy.manifest import Manifest
from rsfast.export.__main__ import main as export
from rsfast.files.tables import read_rows
from rsfast.training import checkpoint, scoring, start

PIL = ["--loader", "pil", "--workers", "0"]
ARCH = ["--arch", "tiny:network"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=6, val=20)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    flags = "--resolutions 48 32 20 --batch-size 4 --epochs 1 --lr 0.01 --levels nearest"
    flags += f" --lighting 0.1 --data {data} --output {output}"
    assert train.main([*ARCH, *flags.split(), *PIL]) == 0
    return output


def test_a_run_is_evaluated_as_it_was_validated(run: Path, tmp_path: Path) -> None:
    model, _ = checkpoint.load_model(run / "last.pt", arch="tiny:network")
    assert model.levels == "nearest"
    data = ["--data", _data_of(run), "--output", str(tmp_path), "--precision", "fp32"]
    assert evaluate.main([str(run / "last.pt"), *ARCH, *PIL, *data]) == 0
    found = {row["resolution"]: float(row["top1"]) for row in read_rows(tmp_path / "accuracy.csv")}
    (epoch,) = read_rows(run / "summary.csv")
    for resolution in ("48", "32", "20", "ensemble"):
        assert found[resolution] == pytest.approx(float(epoch[f"top1_{resolution}"]))


def test_a_run_is_analysed_as_it_was_trained(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = spied(monkeypatch, analyze)
    flags = ["--resolutions", "40", "--output", str(tmp_path / "out")]
    assert analyze.main([str(run), *ARCH, *PIL, *flags]) == 0
    assert told == [("nearest", 48)] * 6


def test_an_export_says_how_its_pictures_are_made(run: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--output", str(tmp_path / "out"), "--data", str(data), "--max-loss", "100"]
    assert export([str(run / "last.pt"), *ARCH, *flags]) == 0
    assert Manifest.read(tmp_path / "out").levels == "nearest"
    # Measured on pictures of `rsfast.deploy`, which are then those of validation.
    card = (tmp_path / "out" / "README.md").read_text()
    (epoch,) = read_rows(run / "summary.csv")
    for resolution in (48, 32, 20):
        assert f"| {resolution} | {float(epoch[f'top1_{resolution}']):.2f} |" in card


def spied(patch: pytest.MonkeyPatch, module: Any) -> list[tuple[str, int | None]]:
    """What the loaders that a module makes are told."""
    told: list[tuple[str, int | None]] = []
    for name in ("train_loader", "val_loader"):
        make = getattr(module, name)

        def record(*arguments, make=make, **options):
            told.append((options["levels"], options["picked_from"]))
            return make(*arguments, **options)

        patch.setattr(module, name, record)
    return told


def test_a_single_resolution_is_picked_from_a_larger_one_wherever_it_is_used(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {module: spied(monkeypatch, module) for module in (start, scoring, analyze)}
    run = tmp_path / "run"
    flags = "--resolutions 20 --batch-size 4 --epochs 1 --lr 0.01 --levels nearest"
    flags += f" --picked-from 48 --data {data} --output {run}"
    assert train.main([*ARCH, *flags.split(), *PIL]) == 0
    assert told.pop(start) == [("nearest", 48)] * 2
    (epoch,) = read_rows(run / "summary.csv")
    top1 = float(epoch["top1_20"])

    common = [*ARCH, *PIL, "--precision", "fp32", "--resolutions", "24"]
    given = ["--data", str(data), "--output", str(tmp_path / "evaluated")]
    calibrate = ["--between", "calibrate", "--calibration-batches", "2"]
    assert evaluate.main([str(run / "last.pt"), *common, *given, *calibrate]) == 0
    found = read_rows(tmp_path / "evaluated" / "accuracy.csv")
    (row,) = (row for row in found if row["resolution"] == "20")
    assert float(row["top1"]) == pytest.approx(top1)
    assert analyze.main([str(run), *common, "--output", str(tmp_path / "analysed")]) == 0
    assert all(set(options) == {("nearest", 48)} for options in told.values())

    flags = ["--output", str(tmp_path / "out"), "--data", str(data)]
    assert export([str(run / "last.pt"), *ARCH, *flags]) == 0
    assert Manifest.read(tmp_path / "out").picked_from == 48
    card = (tmp_path / "out" / "README.md").read_text()
    assert "below 48, r x r is picked from that of r = 48" in card
    assert f"| 20 | {top1:.2f} |" in card


def test_a_run_is_not_resumed_with_other_levels_or_light(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ["--config", str(run / "config.toml"), "--resume", "auto"]
    for flags, setting in (
        (["--levels", "resize"], "levels = 'nearest', this run has 'resize'"),
        (["--lighting", "0"], "lighting = 0.1, this run has 0.0"),
    ):
        assert train.main([*same, *flags]) == 2
        assert setting in capsys.readouterr().err


def test_levels_that_do_not_go_with_the_rest_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--data", str(data), "--levels", "nearest", "--crop", "multi"])
    assert "levels nearest makes all levels from one picture" in capsys.readouterr().err


def _data_of(run: Path) -> str:
    return str(checkpoint.load_state(run / "last.pt")["config"]["data"])
