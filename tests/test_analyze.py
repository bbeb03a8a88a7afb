"""The analysis: each table by hand, and the command from a run to its pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import make_image_folder
from rsfast import analyze, create_model, train
from rsfast.files.tables import read_rows
from rsfast.pyramid import SwitchableBatchNorm2d
from rsfast.tasks.classification import Accuracy


def test_shares_of_table_1_by_hand() -> None:
    hits = {64: np.array([1, 1, 1, 0], dtype=bool), 32: np.array([1, 0, 0, 1], dtype=bool)}
    rows = analyze.wrong_and_right(hits, "net")
    assert rows == [
        {"method": "net", "wrong_at": 64, "right_at": 32, "share": 25.0},
        {"method": "net", "wrong_at": 32, "right_at": 64, "share": 50.0},
    ]
    # Their difference is that of the accuracies (spec: Table 1).
    assert rows[1]["share"] - rows[0]["share"] == 100 * (hits[64].mean() - hits[32].mean())


def test_shares_of_an_evaluation_are_those_of_its_places_without_the_ensemble() -> None:
    places = torch.tensor([[1, 1, 1, 2], [1, 3, 2, 1], [1, 1, 1, 1]])
    shares = Accuracy([(75.0, 100.0), (50.0, 100.0)], (100.0, 100.0), 4, places).shares
    hits = {64: (places[0] == 1).numpy(), 32: (places[1] == 1).numpy()}
    assert analyze.share_rows(shares, (64, 32), "net") == analyze.wrong_and_right(hits, "net")
    assert shares.tolist() == [[0.0, 25.0], [50.0, 0.0]]


def test_histogram_is_a_density_and_knows_the_zeros() -> None:
    rng = np.random.default_rng(0)
    features = {
        "train": np.abs(rng.normal(0.0, 1.0, (500, 40))).astype(np.float32),
        "test": np.zeros((500, 40), dtype=np.float32),
    }
    rows = analyze.feature_histogram(features, 96)
    for name, zeros in (("train", 0.0), ("test", 1.0)):
        part = [row for row in rows if row["preprocessing"] == name]
        total = sum(row["density"] * (row["high"] - row["low"]) for row in part)
        assert total == pytest.approx(1.0, abs=0.002)  # one in a thousand lies beyond
        assert part[0]["zeros"] == zeros
        assert part[0]["mean"] == pytest.approx(float(features[name].mean()))


@pytest.mark.parametrize(("bn", "sets"), [("private", [48, 32]), ("shared", ["all"])])
def test_batch_norm_means_are_of_every_layer_and_set(bn: str, sets: list[object]) -> None:
    model = create_model("resnet18", (48, 32), 2, bn)
    norm = model.network.bn1
    assert isinstance(norm, SwitchableBatchNorm2d)
    with torch.no_grad():
        norm.weight[-1] += torch.arange(64.0)
    rows = analyze.batch_norm_means(model)
    assert len(rows) == 20 * len(sets)
    assert [row["resolution"] for row in rows[: len(sets)]] == sets
    assert rows[len(sets) - 1]["gamma"] == pytest.approx(1.0 + 31.5)
    assert {row["running_var"] for row in rows} == {1.0}


def test_dense_resolutions_reach_beyond_the_trained_ones() -> None:
    found = analyze.dense_resolutions((224, 192, 160, 128, 96))
    assert (found[0], found[1], found[-1]) == (64, 72, 256)
    assert analyze.dense_resolutions((32,)) == list(range(21, 37))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=5, val=4)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    flags = "--arch resnet18 --resolutions 48 32 --batch-size 5 --epochs 2 --loader pil --workers 0"
    flags += f" --lr 0.01 --val-crop none --crop-area 0.5 1 --data {data} --output {output}"
    assert train.main(flags.split()) == 0
    return output


PIL = ["--loader", "pil", "--workers", "0", "--resolutions", "28:52:8"]


def test_a_run_gets_every_table_and_picture(run: Path, data: Path) -> None:
    assert analyze.main([str(run), *PIL]) == 0  # on the run's own images
    folder = run / "analysis"
    pictures = ("alpha", "batch_norm", "dense", "features", "multiply_adds", "shares")
    for name in pictures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name

    alpha = read_rows(folder / "alpha.csv")
    assert [(row["epoch"], row["resolution"]) for row in alpha] == [
        (epoch, r) for epoch in "12" for r in ("48", "32")
    ]
    assert sum(float(row["share"]) for row in alpha[:2]) == pytest.approx(1.0)

    dense = read_rows(folder / "dense.csv")
    for between, tested in (("interpolate", "52 48 44 36 32 28"), ("nearest", "48 44 36 32")):
        part = [row for row in dense if row["between"] == between]
        assert [row["resolution"] for row in part] == tested.split()
        assert [row["resolution"] for row in part if row["trained"] == "True"] == ["48", "32"]
    assert {row["preprocessing"] for row in read_rows(folder / "features.csv")} == {"train", "test"}
    assert len(read_rows(folder / "shares.csv")) == 2


def test_a_checkpoint_alone_has_no_history(run: Path, data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((run / "model_best.safetensors").read_bytes())
    output = tmp_path / "out"
    assert analyze.main([str(weights), "--data", str(data), *PIL, "--output", str(output)]) == 0
    assert (output / "dense.csv").exists()
    assert not (output / "alpha.csv").exists()
    assert not (output / "features.csv").exists()  # nor a word of how its images were prepared


@pytest.mark.parametrize(
    ("of_the_run", "flags", "expected"),
    [
        ({"data": "R"}, ["--val-data", "v.tar"], ("R", None, "v.tar", None)),
        ({"data": "R", "val_list": "l"}, ["--val-data", "v.tar"], ("R", None, "v.tar", None)),
        ({"data": "R", "val_list": "l"}, ["--train-data", "t.tar"], ("R", "t.tar", None, "l")),
        ({"data": "R", "val_list": "l"}, ["--val-list", "k"], ("R", None, None, "k")),
        ({"data": "R", "val_data": "v.tar"}, ["--val-list", "k"], ("R", None, None, "k")),
        ({"data": "R", "val_list": "l"}, ["--data", "D"], ("D", None, None, None)),
        ({"data": "R", "val_list": "l"}, [], ("R", None, None, "l")),
        (
            {"train_data": "t.tar", "val_data": "v.tar"},
            ["--val-data", "w.tar"],
            (None, "t.tar", "w.tar", None),
        ),
        ({"seed": 1}, ["--val-data", "v.tar"], ("built in", None, "v.tar", None)),
        ({"seed": 1}, [], ("built in", None, None, None)),
        ({}, [], ("built in", None, None, None)),
        ({}, ["--val-data", "v.tar"], (None, None, "v.tar", None)),
    ],
    ids=str,
)
def test_images_that_no_flag_names_are_those_of_the_run(
    of_the_run: dict[str, object],
    flags: list[str],
    expected: tuple[str | None, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(analyze, "builtin_root", lambda: "built in")
    args = analyze._parse(["RUN", *flags])
    data = analyze._data(args, of_the_run)
    assert (data, args.train_data, args.val_data, args.val_list) == expected


@pytest.mark.parametrize(("flags", "expected"), [([], True), (["--data", "D"], False)])
def test_cut_off_images_of_the_run_are_analysed_as_it_used_them(
    flags: list[str], expected: bool
) -> None:
    args = analyze._parse(["RUN", *flags])
    analyze._data(args, {"data": "R", "tolerate_truncated": True})
    assert args.tolerate_truncated is expected


WITHOUT_LINEAR = """
from torch import nn

def network(num_classes):
    norm, end = nn.BatchNorm2d(8), nn.Conv2d(8, num_classes, 1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), norm, nn.AdaptiveAvgPool2d(1), end, nn.Flatten())
"""


@pytest.mark.parametrize(("module", "norms"), [("tiny", 3), ("without_linear", 1)])
def test_a_network_of_ones_own_is_analysed_where_it_is_named(
    module: str,
    norms: int,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "without_linear.py").write_text(WITHOUT_LINEAR)
    monkeypatch.syspath_prepend(tmp_path)
    arch = f"{module}:network"
    flags = f"--arch {arch} --resolutions 48 32 --batch-size 5 --epochs 1 --loader pil --workers 0"
    flags += f" --lr 0.01 --data {data} --output {tmp_path / 'run'}"
    assert train.main(flags.split()) == 0
    monkeypatch.delitem(sys.modules, module)
    assert analyze.main([str(tmp_path / "run"), *PIL]) == 2
    assert f"is of {arch}: add --arch {arch} if you trust that code" in capsys.readouterr().err
    assert module not in sys.modules
    assert analyze.main([str(tmp_path / "run"), *PIL, "--arch", arch]) == 0
    folder = tmp_path / "run" / "analysis"
    assert len(read_rows(folder / "batch_norm.csv")) == 2 * norms
    assert {row["method"] for row in read_rows(folder / "shares.csv")} == {arch}
    missing = f"{arch} has no linear layer to look in front of: no features.csv"
    assert (folder / "features.csv").exists() == (module == "tiny")
    assert (missing in capsys.readouterr().out) == (module != "tiny")


def test_features_are_of_the_same_images_in_both_preparations(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[int, int], list[int]] = {}
    histogram = analyze.feature_histogram

    def spy(features, resolution):
        shapes = {name: values.shape for name, values in features.items()}
        assert shapes["train"] == shapes["test"] == (10, 512)
        return histogram(features, resolution)

    pooled = analyze.pooled_features

    def spy_on_images(net, loader):
        batches = list(loader)
        indices = [int(i) for b in batches for i in b.indices][:10]
        (resolution,) = {b.images.level(0).shape[-1] for b in batches}
        seen[resolution, len(seen)] = sorted(indices)
        return pooled(net, batches)

    monkeypatch.setattr(analyze, "feature_histogram", spy)
    monkeypatch.setattr(analyze, "pooled_features", spy_on_images)
    # Four images at a time: the last batch of training is filled up with two from its beginning.
    assert analyze.main([str(run), "--data", str(data), *PIL, "--batch-size", "4"]) == 0
    assert [resolution for resolution, _ in seen] == [48, 48, 32, 32]
    assert all(indices == list(range(10)) for indices in seen.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt"], "none.pt does not exist"),
        (["RUN", "--resolutions", "x"], "resolutions must look like"),
        (["RUN", "--data", "nowhere"], "nowhere"),
        (["RUN", "--feature-images", "0"], "feature_images must be at least 1, got 0"),
    ],
)
def test_bad_input_exits_with_two_and_a_sentence(
    arguments: list[str],
    message: str,
    run: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(run) if part == "RUN" else part for part in arguments]
    assert analyze.main(["--data", str(data), "--loader", "pil", "--workers", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
