"""The training command end to end: the run folder, resuming, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import make_image_folder
from rsfast import train
from rsfast.data import Loader
from rsfast.data.builtin import builtin_root
from rsfast.files.unpickle import load_dict
from rsfast.training import checkpoint, start

SMALL = """--arch resnet18 --resolutions 48 32 --batch-size 4 --lr 0.01 --log-every 1
    --seed 3""".split()
TINY = ("--arch", "tiny:network")  # where the network does not matter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=5, val=3)


def run(folder: Path | None, output: Path, *flags: str) -> int:
    data = ["--data", str(folder)] if folder else []
    loader = [] if "--loader" in flags else ["--loader", "pil", "--workers", "0"]
    return train.main([*SMALL, *data, *loader, "--output", str(output), *flags])


def log_lines(output: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def summary(output: Path) -> list[dict[str, str]]:
    with open(output / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_speed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def test_a_run_leaves_everything_the_readme_promises(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run(folder, output, "--epochs", "2") == 0
    names = {file.name for file in output.iterdir()}
    files = ["config.toml", "log.jsonl", "summary.csv", "last.pt", "model_best.pt", "accuracy.png"]
    assert names >= set(files)
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.startswith(".") for name in names), "temporary files are left"

    config = tomllib.loads((output / "config.toml").read_text())
    assert (config["resolutions"], config["precision"]) == ([48, 32], "fp32")
    (start,) = log_lines(output, "start")
    assert (start["train_images"], start["val_images"], start["classes"]) == (10, 6, 2)
    assert start["parameters_batch_norm"] == 2 * 9600
    steps = log_lines(output, "step")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]  # ceil(10 / 4) per epoch
    assert all(math.isfinite(line["loss"]) and line["images_per_s"] > 0 for line in steps)
    assert all(
        line["loss"] == pytest.approx(line["ce"] + line["ensemble"] + line["distill"])
        for line in steps
    )
    assert steps[0]["lr"] == 0.01
    assert steps[3]["lr"] == pytest.approx(0.005)

    rows = summary(output)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    scores = [f"top{k}_{r}" for r in (48, 32, "ensemble") for k in (1, 5)]
    assert set(rows[0]) >= {"lr", "loss", "ce", "ensemble", "distill", "alpha_48", *scores}
    assert float(rows[0]["alpha_48"]) + float(rows[0]["alpha_32"]) == pytest.approx(1.0)
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    model, _ = checkpoint.load_model(output / "model_best.pt")
    assert model.class_names == ("cat", "dog")
    assert model.input_mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    "flags", [(), (*TINY, "--ema-decay", "0.9", "--precision", "fp16")], ids=["plain", "ema fp16"]
)
def test_an_interrupted_run_continues_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(folder, whole, "--epochs", "3", *flags) == 0

    def stop_in_the_second_epoch(run: train.Run, step: int, *rest: Any) -> None:
        report(run, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    report = train.report
    with monkeypatch.context() as patch:
        patch.setattr(train, "report", stop_in_the_second_epoch)
        assert run(folder, parts, "--epochs", "3", *flags, "--resume", "auto") == 130
    assert load_dict(parts / "last.pt")["epoch"] == 1
    assert len(log_lines(parts, "step")) == 5
    assert run(folder, parts, "--epochs", "3", *flags, "--resume", "auto") == 0

    expected, found = (load_dict(output / "last.pt") for output in (whole, parts))
    for part in ("model", "loss", "ema"):
        for key, tensor in expected.get(part, {}).items():
            assert torch.equal(tensor, found[part][key]), f"{part} {key}"
    assert expected["best"] == found["best"]
    for event in ("step", "epoch"):
        assert without_speed(log_lines(whole, event)) == without_speed(log_lines(parts, event))
    assert summary(whole) == summary(parts)


def test_every_option_of_the_recipes_trains(folder: Path, tmp_path: Path) -> None:
    options = "--label-smoothing 0.1 --warmup-epochs 0.5 --ema-decay 0.5 --nesterov --decay weights"
    options += " --crop multi --flip independent --normalize none --val-crop none --bn shared"
    options += " --distill vanilla --precision bf16 --crop-area 0.3 1.0 --steps-per-epoch 2"
    output = tmp_path / "run"
    assert run(folder, output, "--epochs", "1", *options.split()) == 0
    assert [line["lr"] for line in log_lines(output, "step")] == [0.0, 0.01]
    model, _ = checkpoint.load_model(output / "last.pt")
    assert (model.bn, model.input_std) == ("shared", (1.0, 1.0, 1.0))


def test_a_rate_that_falls_in_steps_is_kept_by_a_run_that_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--epochs", "2", "--schedule", "step", "--gamma", "0.5", "--milestones"]
    assert run(folder, tmp_path / "run", *flags, "1") == 0
    rates = [line["lr"] for line in log_lines(tmp_path / "run", "step")]
    assert rates == [0.01] * 3 + [0.005] * 3
    again = ["--resume", "auto"]
    assert run(folder, tmp_path / "run", *TINY, "--epochs", "2", *again) == 2
    error = capsys.readouterr().err
    assert "was trained with gamma = 0.5, this run has 0.1" in error
    assert "(--gamma 0.5)" in error
    assert run(folder, tmp_path / "run", *flags, "1", *again) == 0, "nothing left to do"


def test_without_data_the_builtin_set_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = builtin_root(tmp_path / "cache", num_train=20, num_val=10)
    monkeypatch.setattr("rsfast.training.start.builtin_root", lambda: root)
    caplog.set_level("INFO")
    assert run(None, tmp_path / "run", "--epochs", "1", "--steps-per-epoch", "2") == 0
    assert "using the built-in generated set" in caplog.text
    assert log_lines(tmp_path / "run", "start")[0]["classes"] == 10


@pytest.mark.parametrize("loader", ["dali", "synthetic"])
def test_the_other_loaders_train(folder: Path, tmp_path: Path, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    flags = ["--loader", loader, "--epochs", "2", "--steps-per-epoch", "2"]
    assert run(folder, tmp_path / "run", *flags) == 0
    assert len(log_lines(tmp_path / "run", "step")) == 4


def test_both_loaders_are_told_how_to_decode(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for name in ("train_loader", "val_loader"):
        make = getattr(start, name)

        def record(*arguments: Any, make: Any = make, **options: Any) -> Loader:
            told.append([options[part] for part in ("workers", "hw_decoder_load", "dont_use_mmap")])
            return make(*arguments, **options)

        monkeypatch.setattr(start, name, record)
    monkeypatch.setattr(start, "default_workers", lambda: 3)
    flags = [*TINY, "--epochs", "1", "--loader", "synthetic", "--steps-per-epoch", "1"]
    assert run(folder, tmp_path / "usual", *flags) == 0
    given = ["--workers", "5", "--hw-decoder-load", "0.25", "--dont-use-mmap"]
    assert run(folder, tmp_path / "given", *flags, *given) == 0
    assert told == [[None, None, False]] * 2 + [[5, 0.25, True]] * 2
    started = [log_lines(tmp_path / name, "start")[0]["workers"] for name in ("usual", "given")]
    assert started == [3, 5]


def test_a_loss_that_explodes_stops_the_run_with_a_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--epochs", "2", "--lr", "1e30", "--max-skipped", "3"]
    assert run(folder, tmp_path / "run", *flags) == 1
    error = capsys.readouterr().err
    assert "not finite at 3 steps in a row up to step 4; the last good checkpoint is" in error
    assert "run/last.pt; a lower --lr" in error
    assert "Traceback" not in error
    lines = log_lines(tmp_path / "run", "step")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1]
    assert lines[0]["loss"] > 0
    assert lines[1]["loss"] is None
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_finished_or_foreign_run_folder_is_not_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert run(folder, output, *TINY, "--epochs", "1") == 0
    before = (output / "last.pt").read_bytes()
    cases = {
        (): "holds a run already: continue it with --resume auto",
        ("--resume", "auto", "--lr", "0.5"): "was trained with lr = 0.01, this run has 0.5",
        ("--resume", "auto", "--epochs", "9"): "was trained with epochs = 1, this run has 9",
        ("--resume", str(tmp_path / "none.pt")): "none.pt does not exist",
    }
    for flags, message in cases.items():
        extra = flags if "--epochs" in flags else (*flags, "--epochs", "1")
        assert run(folder, output, *TINY, *extra) == 2
        assert message in capsys.readouterr().err
    assert (output / "last.pt").read_bytes() == before
    assert run(folder, output, *TINY, "--epochs", "1", "--resume", "auto") == 0, (
        "nothing left to do"
    )


def test_damaged_and_foreign_checkpoints_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert run(folder, output, *TINY, "--epochs", "1") == 0
    content = load_dict(output / "last.pt")
    other = make_image_folder(tmp_path / "other", classes=("ant", "bee"))
    assert run(other, output, *TINY, "--epochs", "1", "--resume", "auto") == 2
    assert "was trained on other classes" in capsys.readouterr().err
    content = {**content, "ranks": content["ranks"] * 8}
    checkpoint.save(content, output / "last.pt")
    assert run(folder, output, *TINY, "--epochs", "1", "--resume", "auto") == 2
    assert "was trained by 8 processes, this run has 1" in capsys.readouterr().err
    (output / "last.pt").write_bytes((output / "last.pt").read_bytes()[:1000])
    assert run(folder, output, *TINY, "--epochs", "1", "--resume", "auto") == 2
    assert "last.pt is damaged" in capsys.readouterr().err


def test_bad_data_and_folders_exit_with_two_and_a_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = make_image_folder(tmp_path / "odd", val=1)
    (odd / "val" / "cat").rename(odd / "val" / "cow")
    no_val = tmp_path / "no_val"
    (no_val / "train").mkdir(parents=True)
    (no_val / "train" / "cat").symlink_to(folder / "train" / "cat")
    (tmp_path / "file").write_text("not a folder")
    cases = [
        (tmp_path / "missing", tmp_path / "a", "missing/train does not exist"),
        (no_val, tmp_path / "a", "no_val/val does not exist"),
        (odd, tmp_path / "a", "must have the same classes"),
        (folder, tmp_path / "file" / "run", "file/run cannot be written"),
    ]
    for data, output, message in cases:
        assert run(data, output, "--epochs", "1") == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_a_missing_dali_is_named_with_the_install_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali.fn", None)
    monkeypatch.delitem(__import__("sys").modules, "rsfast.data.dali", raising=False)
    assert run(folder, tmp_path / "run", "--epochs", "1", "--loader", "dali") == 2
    assert "pip install -e '.[dali-cuda13]'" in capsys.readouterr().err


def test_copies_train_one_network_at_one_resolution(folder: Path, tmp_path: Path) -> None:
    flags = ["--resolutions", "32", "--copies", "3", "--crop", "multi", "--bn", "shared"]
    assert run(folder, tmp_path, *flags, "--epochs", "1") == 0
    (row,) = summary(tmp_path)
    assert row["alpha_32"] == "1.0"
    assert row["top1_ensemble"] == row["top1_32"]
    assert float(row["distill"]) > 0.0  # the copies see other windows, and answer differently
    for name in ("last.pt", "model_best.safetensors"):
        model, scores = checkpoint.load_model(tmp_path / name)
        assert model.resolutions == (32,)
        assert scores.shape == (1,)
    state = load_dict(tmp_path / "last.pt")
    tracked = state["model"]["network.bn1.num_batches_tracked"]
    steps = int(log_lines(tmp_path, "start")[0]["steps_per_epoch"])
    assert tracked.tolist() == [3 * steps]
