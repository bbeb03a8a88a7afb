"""Whole runs of segmentation: training, continuing, evaluating, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import make_image_folder, torchrun
from mask_helpers import ARCH, CLASSES, IGNORED, PIL, SMALL, make_mask_folder
from rsfast import RSNet, analyze, create_model, evaluate, train
from rsfast.data import val_loader
from rsfast.export.__main__ import main as export
from rsfast.files.tables import read_rows
from rsfast.files.unpickle import load_dict
from rsfast.models.deploy import multiply_adds
from rsfast.tasks.segmentation import Scores, figures_of
from rsfast.training import checkpoint
from rsfast.training.run import Run
from run_helpers import assert_equal, assert_same_run, log_of, stop_when

STEPS = 2  # of an epoch: 6 images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mask_folder(tmp_path_factory.mktemp("masks"))


def start(folder: Path, output: Path, *flags: str) -> int:
    return train.main([*SMALL, *PIL, "--data", str(folder), "--output", str(output), *flags])


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert start(folder, output, "--ema-decay", "0.9") == 0
    return output


def model_of(path: Path) -> RSNet:
    return checkpoint.load_model(path, arch=ARCH[1])[0]


def test_a_run_writes_scores_of_every_resolution(whole: Path) -> None:
    rows = read_rows(whole / "summary.csv")
    names = [f"{kind}_{at}" for at in (48, 32, "ensemble") for kind in ("miou", "pixel", "mean")]
    assert [name for name in rows[0] if name in names] == names
    assert f"plain_{names[0]}" in rows[0], "of the weights without averaging"
    assert all(0.0 <= float(row[name]) <= 100.0 for row in rows for name in names)
    assert (whole / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    content = load_dict(whole / "last.pt")
    assert (content["settings"]["task"], content["ignore_label"]) == ("segmentation", IGNORED)
    assert content["class_names"] == CLASSES
    for name in ("last.pt", "model_best.pt", "model_best.safetensors"):
        model = model_of(whole / name)
        assert (model.task, model.ignore_label, model.num_classes) == ("segmentation", 255, 3)
        assert model.at(40)(torch.zeros(1, 3, 40, 40)).shape == (1, 3, 10, 10)


def test_the_decoder_has_ten_times_the_rate_in_every_step(whole: Path) -> None:
    groups = load_dict(whole / "last.pt")["optimizer"]["param_groups"]
    assert [group.get("lr_factor", 1.0) for group in groups] == [1.0, 10.0]
    assert groups[1]["lr"] == pytest.approx(10 * groups[0]["lr"])
    last = log_of(whole)[-1]["lr"]
    assert last == pytest.approx(0.05 * (1 - 3 / 4) ** 0.9)
    assert groups[0]["lr"] == pytest.approx(last)
    assert len(groups[1]["params"]) == 2, "weight and bias of the classifier"


@pytest.mark.parametrize("stop_at", [1, STEPS, STEPS + 1])
def test_a_run_stopped_after_a_step_continues_bit_for_bit(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == stop_at)
        assert start(folder, output, "--ema-decay", "0.9") == 75
    assert start(folder, output, "--ema-decay", "0.9", "--resume", "auto") == 0
    assert_same_run(output, whole)


def test_a_run_does_not_go_on_with_other_masks(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, data)
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == 1)
        assert start(data, output) == 75
    file = next((data / "trainannot").iterdir())
    Image.fromarray(np.asarray(Image.open(file))[::-1]).save(file)
    assert start(data, output, "--resume", "auto") == 2
    assert f"it was trained on other images or masks than those of {data}" in (
        capsys.readouterr().err
    )
    assert start(data, output, "--resume", "auto", "--restart-epoch") == 0
    with open(output / "log.jsonl") as file:
        begun = [json.loads(line) for line in file if '"start"' in line]
    assert [one["val_set"] == begun[0]["val_set"] for one in begun] == [True, True]
    assert begun[1]["train_set"] != begun[0]["train_set"]


def test_a_longer_run_continues_an_ended_one_with_the_momentum_of_each_parameter(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    momenta = []

    def note(run: Run, _: object) -> None:
        names = {param: name for name, param in run.model.named_parameters()}
        found = {
            names.get(p, "alpha"): s["momentum_buffer"] for p, s in run.optimizer.state.items()
        }
        momenta.append(found)
        assert run.log
        run.log.close()

    monkeypatch.setattr(train, "train_epochs", note)
    for factor in ("10", "1"):  # two groups of the optimiser, and one
        flags = ["--continue-from", str(whole), "--epochs", "4", "--decoder-lr", factor]
        assert start(folder, tmp_path / factor, *flags, "--ema-decay", "0.9") == 0
    assert len(momenta[0]) == 9
    assert_equal(momenta[1], momenta[0], "momentum")
    saved = load_dict(whole / "last.pt")["optimizer"]["state"]
    found = {tuple(m.shape): m for m in momenta[0].values() if m.dim() == 4}
    for state in saved.values():
        if state["momentum_buffer"].dim() == 4:
            assert torch.equal(
                found[tuple(state["momentum_buffer"].shape)], state["momentum_buffer"]
            )


def test_evaluation_scores_trained_and_other_resolutions_at_the_images_sizes(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(whole / "model_best.pt"), *ARCH, *PIL, "--data", str(folder)]
    command += ["--resolutions", "40", "--predictions", "2", "--per-image"]
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "002_of_an_earlier_evaluation.png").touch()
    assert evaluate.main([*command, "--output", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "accuracy.csv")
    assert [row["resolution"] for row in rows] == ["48", "40", "32", "ensemble"]
    assert rows[1]["batch_norm"] == "0.50 x 48 + 0.50 x 32"
    model = model_of(whole / "model_best.pt")
    for row in rows[:-1]:
        resolution = int(row["resolution"])
        net = model.at(resolution)
        assert int(row["multiply_adds"]) == multiply_adds(net, resolution)
        expected = by_hand(net, folder, resolution)
        for name, value in zip(("pixel", "mean", "iou"), figures_of(expected), strict=True):
            assert float(row[name]) == pytest.approx(value)
    best = max(read_rows(whole / "summary.csv"), key=lambda row: round(float(row["miou_48"]), 1))
    assert float(rows[0]["iou"]) == pytest.approx(float(best["miou_48"]))
    classes = read_rows(tmp_path / "per_class.csv")
    assert [row["class"] for row in classes] == list(CLASSES)
    counted = sum(int((mask != IGNORED).sum()) for mask in masks_of(folder))
    assert sum(int(row["pixels"]) for row in classes) == counted
    assert {f"iou_{row['resolution']}" for row in rows} < set(classes[0])
    images = read_rows(tmp_path / "per_image.csv")
    assert list(images[0]) == ["image", "resolution", "class", "pixels", "predicted", "right"]
    assert {row["image"] for row in images} == {f"000{number}.jpg" for number in range(5)}
    for row in rows:
        own = [image for image in images if image["resolution"] == row["resolution"]]
        right, pixels = (sum(int(image[name]) for image in own) for name in ("right", "pixels"))
        assert (pixels, 100 * right / pixels) == (counted, pytest.approx(float(row["pixel"])))
    pictures = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert pictures == ["000_0000.png", "001_0004.png"]
    with Image.open(tmp_path / "predictions" / pictures[0]) as picture:
        assert picture.width > 2 * picture.height, "five panels side by side"
    assert "mean IoU" in capsys.readouterr().out


def masks_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((folder / "valannot").iterdir())]


def by_hand(net: torch.nn.Module, folder: Path, resolution: int) -> torch.Tensor:
    """The confusion matrix of a plain network, of the files."""
    matrix = torch.zeros(3, 3, dtype=torch.int64)
    loader = val_loader(folder, (resolution,), 2, task="segmentation", backend="pil", workers=0)
    with torch.no_grad():
        logits = torch.cat([net(batch.images.level(0)) for batch in loader])
    for maps, mask in zip(logits, masks_of(folder), strict=True):
        resized = torch.nn.functional.interpolate(maps[None], size=mask.shape, mode="bilinear")
        predicted = resized[0].argmax(0).numpy()
        for label in range(3):
            for guess in range(3):
                matrix[label, guess] += int(((mask == label) & (predicted == guess)).sum())
    return matrix


def test_statistics_between_resolutions_may_be_calibrated(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    command = [str(whole / "last.pt"), *ARCH, *PIL, "--data", str(folder), "--predictions", "0"]
    command += ["--resolutions", "40", "--between", "calibrate", "--calibration-batches", "1"]
    assert evaluate.main([*command, "--output", str(tmp_path)]) == 0
    assert read_rows(tmp_path / "accuracy.csv")[1]["batch_norm"] == "calibrated"
    assert not (tmp_path / "predictions").exists()


def test_weights_of_a_file_are_trained_from_and_their_statistics_estimated_anew(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    flags = ["--pretrained", str(whole / "last.pt"), "--calibrate-first", "2", "--epochs", "1"]
    assert start(folder, tmp_path / "run", *flags) == 0
    origin = load_dict(tmp_path / "run" / "last.pt")["origin"]
    assert origin["pretrained_classifier"] == "its classifier of 3 classes was taken over"


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_end_with_the_network_and_scores_of_one(
    tmp_path: Path,
) -> None:
    """Kill and resume, the sums over ranks, and evaluation by one process of what two have."""
    make_mask_folder(tmp_path / "masks")
    faults = str(Path(__file__).with_name("faults.py"))
    outputs = tmp_path / "whole", tmp_path / "killed"
    (tmp_path / "kills").mkdir()
    kills = {"kills": {"at": [[STEPS - 1, 1]], "folder": str(tmp_path / "kills")}}
    for output, happens in zip(outputs, ({}, kills), strict=True):
        arguments = [*SMALL, *PIL, "--data", "masks", "--sync-bn", "--output", output.name]
        arguments += "--batch-size 2 --checkpoint-every 1 --resume auto".split()
        said = torchrun(faults, json.dumps(happens), *arguments, folder=tmp_path, restarts=1)
        assert ("resumed after epoch" in said) == bool(happens)
    assert_same_run(outputs[1], outputs[0])
    lines = (outputs[0] / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["world_size"] == 2
    one, other = (state["rng"] for state in load_dict(outputs[0] / "last.pt")["ranks"])
    assert not torch.equal(one, other), "ranks drop the same units"
    common = [*ARCH, *PIL, "--per-image"]
    alone = [str(outputs[0] / "last.pt"), *common, "--data", str(tmp_path / "masks")]
    assert evaluate.main([*alone, "--output", str(tmp_path / "one")]) == 0
    both = ["-m", "rsfast.evaluate", "whole/last.pt", *common, "--data", "masks"]
    torchrun(*both, "--output", "two", folder=tmp_path)
    for file in ("accuracy.csv", "per_class.csv", "per_image.csv"):
        assert (tmp_path / "two" / file).read_text() == (tmp_path / "one" / file).read_text()
    last = read_rows(outputs[0] / "summary.csv")[-1]
    for row in read_rows(tmp_path / "one" / "accuracy.csv"):
        for name, figure in (("miou", "iou"), ("pixel", "pixel"), ("mean", "mean")):
            assert float(row[figure]) == float(last[f"{name}_{row['resolution']}"])


@pytest.mark.slow
def test_the_built_in_set_is_learnt_at_every_size(tmp_path: Path) -> None:
    flags = "--arch refinenet18 --epochs 3 --workers 1".split()
    assert train.main([*flags, "--output", str(tmp_path / "run")]) == 0
    last = read_rows(tmp_path / "run" / "summary.csv")[-1]
    constant = 11.1  # bench/results/2026-12-01_segmentation_cpu/builtin/floors.csv
    for resolution in ("96", "72", "48", "ensemble"):
        assert float(last[f"miou_{resolution}"]) > 2 * constant


def test_the_documented_loop_trains_and_scores(folder: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "segmentation.md").read_text()
    code = text.split("## From Python")[1].split("```python")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(
        code.replace("/data/street", str(folder)).replace("num_classes=11", "num_classes=3"), found
    )
    assert [len(figures) for figures in found["accuracy"].levels] == [3, 3]
    assert found["accuracy"].num_images == 5


def test_data_that_do_not_fit_are_named(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_image_folder(tmp_path / "plain", train=1, val=1)
    assert start(plain, tmp_path / "run") == 2
    assert "segmentation needs it with a mask for each image" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "classes.txt").write_text("a\nb\nc\n")
    command = [str(whole / "last.pt"), *ARCH, *PIL, "--data", str(other)]
    assert evaluate.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "must have the 3 classes of the checkpoint (ground" in capsys.readouterr().err


def test_commands_for_classification_say_so(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(whole / "last.pt")
    assert export([path, *ARCH, "--output", str(tmp_path / "out")]) == 2
    assert "export writes networks of classification only" in capsys.readouterr().err
    assert analyze.main([str(whole), *ARCH, *PIL, "--feature-images", "3"]) == 2
    error = capsys.readouterr().err
    assert "--feature-images means nothing for a network of segmentation" in error
    for flag in ("--val-crop none", "--val-list a", "--train-data a"):
        assert evaluate.main([path, *ARCH, "--data", str(folder), *flag.split()]) == 2
        error = capsys.readouterr().err
        assert f"{flag.split()[0]} means nothing for a network of segmentation" in error


def test_a_run_is_analysed_on_its_own_images(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(whole), *ARCH, *PIL, "--resolutions", "28:52:8", "--output", str(tmp_path)]
    assert analyze.main(command) == 0
    said = capsys.readouterr().out
    assert "features are what a classifier sees" in said
    assert "is of segmentation: no features.csv" in said
    files = {path.name for path in tmp_path.iterdir()}
    tables = {"alpha", "batch_norm", "dense", "shares"}
    pictures = {f"{name}.png" for name in (*tables, "multiply_adds")}
    assert files == {f"{name}.csv" for name in tables} | pictures
    dense = read_rows(tmp_path / "dense.csv")
    for between, tested in (("interpolate", "52 48 44 36 32 28"), ("nearest", "48 44 36 32")):
        part = [row for row in dense if row["between"] == between]
        assert [row["resolution"] for row in part] == tested.split()
    figures = {row["resolution"]: row for row in dense if row["between"] == "interpolate"}
    last = read_rows(whole / "summary.csv")[-1]
    assert float(figures["48"]["iou"]) == pytest.approx(float(last["miou_48"]))
    matrix = figures_of(by_hand(model_of(whole / "last.pt").at(44), folder, 44))
    assert [float(figures["44"][name]) for name in ("pixel", "mean", "iou")] == pytest.approx(
        matrix
    )
    # What is wrong at one and right at another differs by as much as the two are right.
    shares = {row["wrong_at"]: float(row["share"]) for row in read_rows(tmp_path / "shares.csv")}
    difference = float(figures["48"]["pixel"]) - float(figures["32"]["pixel"])
    assert shares["32"] - shares["48"] == pytest.approx(difference)
    assert max(shares.values()) > 0
    assert len(read_rows(tmp_path / "batch_norm.csv")) == 2 * 2
    assert len(read_rows(tmp_path / "alpha.csv")) == 2 * 2


def test_weights_without_a_run_are_analysed_on_the_built_in_set_of_their_task(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(analyze, "builtin_root", lambda **which: asked.append(which) or tmp_path)
    command = [str(whole / "model_best.safetensors"), *ARCH, *PIL, "--output", str(tmp_path / "o")]
    assert analyze.main(command) == 2  # there are no images there
    assert str(tmp_path) in capsys.readouterr().err
    assert asked == [{"task": "segmentation"}]


def test_evaluating_classification_has_no_flags_of_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model("tiny:network", (48, 32), 2)
    checkpoint.save_weights(model, torch.ones(2), tmp_path / "a.safetensors")
    for flags in (["--ignore-label", "0"], ["--predictions", "3"]):
        command = [str(tmp_path / "a.safetensors"), "--arch", "tiny:network", *flags]
        assert evaluate.main(command) == 2
        assert "means nothing for a network of classification" in capsys.readouterr().err


def test_other_pixels_are_ignored_where_evaluation_says_so(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for path in (other / "valannot").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[mask == IGNORED] = 200
        Image.fromarray(mask).save(path)
    found = []
    for data, flags in ((folder, []), (other, ["--ignore-label", "200"])):
        command = [str(whole / "last.pt"), *ARCH, *PIL, "--data", str(data), *flags]
        output = tmp_path / str(len(found))
        assert evaluate.main([*command, "--predictions", "0", "--output", str(output)]) == 0
        with open(output / "per_class.csv", newline="") as file:
            found.append(list(csv.DictReader(file)))
    assert found[0] == found[1]


def test_scores_are_read_from_batches_of_the_loader(folder: Path) -> None:
    loader = val_loader(folder, (48, 32), 2, task="segmentation", backend="pil", workers=0)
    scores = Scores(1, 3, IGNORED, torch.device("cpu"))
    for batch in loader:
        scores.add([torch.zeros(len(batch.indices), 3, 2, 2)], batch)
    found = scores.read()
    assert found.num_images == 5
    shares = [int((mask == 0).sum()) for mask in masks_of(folder)]
    assert found.matrices[0, 0, 0] == sum(shares), "everything is taken for the first class"
