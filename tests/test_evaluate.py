"""The evaluation command: rows, files, foreign checkpoints, and what it refuses."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import make_image_folder
from rsfast import RSNet, create_model, evaluate
from rsfast.config.flags import parse_resolutions
from rsfast.data import Loader, train_loader, val_loader
from rsfast.data.__main__ import main as check_data
from rsfast.data.loader import NORMALIZATIONS
from rsfast.files.tables import read_columns
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import official
from rsfast.models.deploy import calibrate
from rsfast.training import checkpoint, scoring

PIL = ["--loader", "pil", "--workers", "0", "--batch-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=5, val=5)


def make_network(num_classes: int = 2) -> RSNet:
    torch.manual_seed(0)
    model = create_model("resnet18", (48, 32), num_classes)
    for norm in model.batch_norms():
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_network()
    model.class_names = ("cat", "dog")
    model.input_mean, model.input_std = NORMALIZATIONS["imagenet"]  # as loaders do by themselves
    loss = MultiResolutionDistillation(2)
    path = tmp_path_factory.mktemp("run") / "model_best.pt"
    checkpoint.save({**checkpoint.model_payload(model), "loss": loss.state_dict()}, path)
    return path


def rows_of(output: Path) -> list[dict[str, str]]:
    with open(output / "accuracy.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_hold_accuracy_cost_and_origin(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--resolutions", "28:64:12", "--output", str(tmp_path / "out")]
    assert evaluate.main([str(trained), "--data", str(folder), *PIL, *extra]) == 0
    rows = rows_of(tmp_path / "out")
    assert [row["resolution"] for row in rows] == ["64", "52", "48", "40", "32", "28", "ensemble"]
    assert [row["batch_norm"] for row in rows] == [
        "bank of 48",
        "bank of 48",
        "own bank",
        "0.50 x 48 + 0.50 x 32",
        "own bank",
        "bank of 32",
        "all banks",
    ]
    trained_ones = [row["resolution"] for row in rows if row["trained"] == "True"]
    assert trained_ones == ["48", "32", "ensemble"]
    costs = [int(row["multiply_adds"]) for row in rows[:-1]]
    assert costs == sorted(costs, reverse=True)
    assert int(rows[-1]["multiply_adds"]) == costs[2] + costs[4]
    single = create_model("resnet18", (48,), 2)
    assert int(rows[0]["parameters"]) == sum(p.numel() for p in single.parameters())
    screen = capsys.readouterr().out
    assert "0.50 x 48 + 0.50 x 32" in screen
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_per_image_places_add_up_to_the_accuracies(
    trained: Path, folder: Path, tmp_path: Path
) -> None:
    arguments = [str(trained), "--data", str(folder), *PIL, "--resolutions", "40", "--per-image"]
    assert evaluate.main([*arguments, "--output", str(tmp_path)]) == 0
    columns = read_columns(tmp_path / "per_image.csv")
    assert list(columns) == ["image", "label", "48", "40", "32", "ensemble"]
    assert columns["image"][0] == "cat/0000.jpg"
    assert columns["label"] == ["0"] * 5 + ["1"] * 5
    for row in rows_of(tmp_path):
        right = columns[row["resolution"]].count("1")
        assert float(row["top1"]) == 10 * right
    model, _ = checkpoint.load_model(trained)
    net = model.at(40)
    with torch.no_grad():
        batches = val_loader(folder, (40,), 5, backend="pil", workers=0)
        right = [net(b.images.level(0)).argmax(1) == b.labels for b in batches]
    assert [place == "1" for place in columns["40"]] == torch.cat(right).tolist()


def test_figures_are_those_of_the_plain_networks(
    trained: Path, folder: Path, tmp_path: Path
) -> None:
    arguments = [str(trained), "--data", str(folder), *PIL, "--resolutions", "40"]
    assert evaluate.main([*arguments, "--output", str(tmp_path)]) == 0
    model, _ = checkpoint.load_model(trained)
    for row in rows_of(tmp_path)[:-1]:
        resolution = int(row["resolution"])
        loader = val_loader(folder, (resolution,), 5, backend="pil", workers=0)
        net, hits = model.at(resolution), 0
        with torch.no_grad():
            for batch in loader:
                hits += (net(batch.images.level(0)).argmax(1) == batch.labels).sum().item()
        assert float(row["top1"]) == 100 * hits / 10
        assert float(row["top5"]) == 100.0


def picked(level: torch.Tensor, r: int) -> torch.Tensor:
    """[N, 3, r, r] of [N, 3, R, R], by nearest neighbour."""
    places = [i * level.shape[-1] // r for i in range(r)]
    return level[:, :, places][:, :, :, places]


@pytest.mark.parametrize("between", ["interpolate", "calibrate"])
def test_a_network_of_picked_levels_is_evaluated_on_such(
    folder: Path, tmp_path: Path, between: str
) -> None:
    model = make_network()
    model.class_names, model.levels = ("cat", "dog"), "nearest"
    loss = MultiResolutionDistillation(2)
    path = tmp_path / "last.pt"
    checkpoint.save({**checkpoint.model_payload(model), "loss": loss.state_dict()}, path)
    command = [str(path), "--data", str(folder), *PIL, "--resolutions", "28:64:12", "--per-image"]
    assert evaluate.main([*command, "--between", between, "--calibration-batches", "2"]) == 0
    columns = read_columns(tmp_path / "evaluation" / "per_image.csv")
    options = {"backend": "pil", "workers": 0, "normalize": "none"}
    model.eval()
    for resolution in (64, 52, 48, 40, 32, 28):
        # The largest trained resolution is what others are picked from, where they are smaller.
        largest = max(resolution, 48)
        net = model.at(resolution)
        if between == "calibrate" and resolution not in model.resolutions:
            training = train_loader(folder, (largest,), 4, max_steps=2, **options)
            calibrate(net, [picked(batch.images.level(0), resolution) for batch in training])
        logits = [
            net(picked(batch.images.level(0), resolution))
            for batch in val_loader(folder, (largest,), 4, **options)
        ]
        ranks = torch.cat(logits).argsort(descending=True).tolist()
        places = [1 + order.index(int(k)) for order, k in zip(ranks, columns["label"], strict=True)]
        assert list(map(int, columns[str(resolution)])) == places


def test_levels_can_be_made_otherwise_than_in_training(
    trained: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def spy(*arguments: Any, **options: Any) -> Loader:
        told.append((options["levels"], options["picked_from"]))
        return val_loader(*arguments, **options)

    monkeypatch.setattr(scoring, "val_loader", spy)
    for flags in ([], ["--levels", "nearest"]):
        where = ["--data", str(folder), "--output", str(tmp_path)]
        assert evaluate.main([str(trained), *where, *PIL, *flags]) == 0
    assert told == [("resize", 48), ("nearest", 48)]


@pytest.mark.parametrize("between", ["nearest", "calibrate"])
def test_the_other_ways_between_resolutions(
    trained: Path, folder: Path, tmp_path: Path, between: str
) -> None:
    arguments = ["--resolutions", "44", "--between", between, "--calibration-batches", "2"]
    arguments += ["--output", str(tmp_path)]
    assert evaluate.main([str(trained), "--data", str(folder), *PIL, *arguments]) == 0
    origin = {"nearest": "bank of 48", "calibrate": "calibrated"}[between]
    assert rows_of(tmp_path)[1]["batch_norm"] == origin


def test_every_loader_is_told_how_to_decode(
    trained: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for name in ("train_loader", "val_loader"):
        make = getattr(scoring, name)

        def record(*arguments: Any, make: Any = make, **options: Any) -> Loader:
            told.append([options[part] for part in ("workers", "hw_decoder_load", "dont_use_mmap")])
            return make(*arguments, **options)

        monkeypatch.setattr(scoring, name, record)
    flags = "--hw-decoder-load 0.25 --dont-use-mmap --resolutions 40 --between calibrate"
    where = ["--data", str(folder), "--output", str(tmp_path)]
    assert evaluate.main([str(trained), *where, *PIL, *flags.split()]) == 0
    assert told == [[0, 0.25, True]] * 3  # trained resolutions, calibration, other resolutions


def test_images_that_are_cut_off_are_used_if_asked_for(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_image_folder(tmp_path / "images", train=1, val=3)
    file = data / "val" / "dog" / "0001.jpg"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    assert check_data(["check", str(data)]) == 1
    for flags, count in (([], 5), (["--tolerate-truncated"], 6)):
        where = ["--data", str(data), "--output", str(tmp_path / "out"), "--per-image"]
        assert evaluate.main([str(trained), *where, *PIL, *flags]) == 0
        assert len(read_columns(tmp_path / "out" / "per_image.csv")["image"]) == count


def test_an_authors_checkpoint_is_fed_unnormalised_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official.save(make_network(), tmp_path / "checkpoint.pth.tar", torch.tensor([2.0, 0.0]))
    seen = []

    def spy(*arguments: object, **options: object) -> object:
        seen.append(options["normalize"])
        return val_loader(*arguments, **options)

    monkeypatch.setattr(scoring, "val_loader", spy)
    arguments = [str(tmp_path / "checkpoint.pth.tar"), "--data", str(folder), *PIL]
    assert evaluate.main([*arguments, "--trained-resolutions", "48", "32"]) == 0
    assert seen == [((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))]
    rows = rows_of(tmp_path / "evaluation")
    assert [row["resolution"] for row in rows] == ["48", "32", "ensemble"]


def test_a_network_of_ones_own_is_evaluated_where_it_is_named(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    model = create_model("tiny:network", (48, 32), 2)
    model.class_names = ("cat", "dog")
    loss = MultiResolutionDistillation(2)
    path = tmp_path / "last.pt"
    checkpoint.save({**checkpoint.model_payload(model), "loss": loss.state_dict()}, path)
    command = [str(path), "--data", str(folder), *PIL, "--resolutions", "28:64:12"]
    monkeypatch.delitem(sys.modules, "tiny")
    assert evaluate.main(command) == 2
    assert "add --arch tiny:network if you trust that code" in capsys.readouterr().err
    assert "tiny" not in sys.modules
    assert evaluate.main([*command, "--arch", "tiny:network"]) == 0
    rows = rows_of(tmp_path / "evaluation")
    assert [row["resolution"] for row in rows] == ["64", "52", "48", "40", "32", "28", "ensemble"]
    assert "tiny:network, trained at 48, 32" in capsys.readouterr().out
    convolutions = 9 * 8 * (3 * 24 * 24 + 8 * 12 * 12 + 8 * 12 * 12)
    assert int(rows[2]["multiply_adds"]) == convolutions + 8 * 2


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("160", [160]), ("64:96:16", [64, 80, 96]), ("64:95:16", [64, 80]), ("3:5", [3, 4, 5])],
)
def test_resolution_ranges_include_both_ends(text: str, numbers: list[int]) -> None:
    assert parse_resolutions(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "64:", "96:64:16", "0", "64:96:0", "1:2:3:4", "-5"])
def test_bad_resolutions_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="resolutions must"):
        parse_resolutions(text)


def test_bad_input_exits_with_two_and_a_sentence(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = make_image_folder(tmp_path / "three", classes=("a", "b", "c"), train=1, val=1)
    named = make_image_folder(tmp_path / "named", classes=("ant", "bee"), train=1, val=1)
    (tmp_path / "bad.pt").write_bytes(b"junk")
    (tmp_path / "file").touch()
    cases = [
        ([str(tmp_path / "none.pt")], "none.pt does not exist"),
        ([str(tmp_path / "bad.pt")], "bad.pt is damaged"),
        (
            [str(trained), "--data", str(three)],
            "classes of the checkpoint (cat, dog, ...), got 3 (a, b, c, ...)",
        ),
        ([str(trained), "--data", str(named)], "must have the 2 classes of the checkpoint"),
        ([str(trained), "--data", str(tmp_path / "none")], "none/val does not exist"),
        ([str(trained), "--data", str(folder), "--resolutions", "x"], "resolutions must look like"),
        (
            [str(trained), "--data", str(folder), "--output", str(tmp_path / "file" / "x")],
            "written",
        ),
    ]
    for arguments, message in cases:
        assert evaluate.main([*arguments, *PIL]) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
