"""Runs on archives: those of the folder they were made of, and exact when they continue."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from archives import write_parquet
from helpers import make_image_folder
from rsfast import analyze, evaluate, train
from rsfast.config import TrainConfig
from rsfast.data import index_folder
from rsfast.data.convert import convert
from rsfast.experiments.__main__ import _data_set
from rsfast.export import __main__ as export
from rsfast.files.unpickle import load_dict
from rsfast.training import start as beginning
from run_helpers import assert_equal, assert_same_run, log_of, stop_when

SMALL = """--arch tiny:network --resolutions 32 24 --batch-size 4 --lr 0.01 --log-every 2 --seed 3
    --epochs 2 --workers 0""".split()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RSFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=9, val=5)


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    convert(folder, folder.parent / "shards", images_per_shard=4)
    return folder.parent / "shards"


def start(data: list[str], output: Path, *flags: str, loader: str = "pil") -> int:
    return train.main([*SMALL, *data, "--loader", loader, "--output", str(output), *flags])


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert start(["--data", str(folder)], output) == 0
    return output


def patterns(root: Path) -> list[str]:
    train_data = str(root / "train" / "train-{00000..00004}.tar")
    return ["--train-data", train_data, "--val-data", str(root / "val" / "*.tar")]


@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_a_run_on_shards_is_that_on_the_folder_and_continues_bit_for_bit(
    shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    assert start(["--data", str(shards)], tmp_path / "whole") == 0
    for name in ("model", "optimizer"):
        found, expected = (load_dict(o / "last.pt")[name] for o in (tmp_path / "whole", whole))
        assert_equal(found, expected, name)
    assert log_of(tmp_path / "whole") == log_of(whole)
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == stop_at)
        assert start(["--data", str(shards)], output) == 75
    assert start(["--data", str(shards)], output, "--resume", "auto") == 0
    assert_same_run(output, tmp_path / "whole")


def test_a_run_begun_on_a_folder_goes_on_with_shards_from_the_start_of_an_epoch(
    folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "begun"
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == 3)
        assert start(["--data", str(folder)], begun) == 75
    renamed = shutil.copytree(folder, tmp_path / "renamed")  # other paths in the same order
    for path in sorted(renamed.rglob("*.jpg")):
        path.rename(path.with_name(f"x{path.name}"))
    weights = []
    for number, data in enumerate((["--data", str(renamed)], patterns(shards))):
        output = shutil.copytree(begun, tmp_path / str(number))
        assert start(data, output, "--resume", "auto") == 2
        assert start(data, output, "--resume", "auto", "--restart-epoch") == 0
        weights.append(load_dict(output / "last.pt")["model"])
    assert_equal(weights[1], weights[0], "model")


def test_an_evaluation_takes_patterns_and_a_list_of_labels(
    folder: Path, shards: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(folder / "train", flat / "train")
    (flat / "val").mkdir()
    lines = []
    for path in sorted((folder / "val").glob("*/*.jpg")):
        name = f"{path.parent.name}_{path.name}"
        shutil.copy(path, flat / "val" / name)
        lines.append(f"{name} {path.parent.name}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    tables = []
    for flags in (
        ["--data", str(folder)],
        ["--data", str(shards)],
        patterns(shards)[2:],
        ["--data", str(flat), "--val-list", str(tmp_path / "list.txt")],
    ):
        output = ["--output", str(tmp_path / "out"), "--loader", "pil", "--workers", "0"]
        checkpoint = [str(whole / "model_best.pt"), "--arch", "tiny:network"]
        assert evaluate.main([*checkpoint, *flags, *output]) == 0, capsys.readouterr().err
        tables.append((tmp_path / "out" / "accuracy.csv").read_text())
    assert tables[1:] == tables[:1] * 3
    calibrated = [*checkpoint, *patterns(shards)[2:], *output, "--resolutions", "28"]
    assert evaluate.main([*calibrated, "--between", "calibrate"]) == 2
    assert "train_data and val_data must be given together" in capsys.readouterr().err
    for flags, message in (
        (["--data", patterns(shards)[3]], "data must be a folder with train/ and val/, got the"),
        (patterns(shards)[:2], "train_data and val_data must be given together"),
        (["--data", "d", "--val-list", "x", *patterns(shards)[2:]], "needs data and no val_data"),
    ):
        arguments = [*checkpoint, *flags, *output, "--resolutions", "28"]
        assert evaluate.main([*arguments, "--between", "calibrate"]) == 2
        assert message in capsys.readouterr().err
    # Without training images, a pattern is those that accuracy is measured on.
    assert evaluate.main([*checkpoint, "--data", patterns(shards)[3], *output]) == 0


def test_an_analysis_refuses_one_pattern_for_both_splits(
    shards: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--arch", "tiny:network", "--data", patterns(shards)[1], "--loader", "pil"]
    assert analyze.main([str(whole), *flags]) == 2
    assert "data must be a folder with train/ and val/, got the pattern" in capsys.readouterr().err


def test_int8_is_not_calibrated_on_the_images_it_is_measured_on(
    shards: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", str(tmp_path / "out"), "--int8", "--data", str(shards / "val" / "*.tar")]
    assert export.main([str(whole / "model_best.pt"), *flags]) == 2
    assert "data must be a folder with train/ and val/, got the pattern" in capsys.readouterr().err


def test_numbered_folders_are_looked_for_where_the_training_images_are(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[object] = []
    monkeypatch.setattr(beginning, "warn_of_numbers", lambda place, names: places.append(place))
    assert start([*patterns(shards)], tmp_path / "run", "--epochs", "1") == 0
    assert places == [patterns(shards)[1]]


def test_experiments_name_the_images_of_archives(folder: Path, shards: Path) -> None:
    _, train_data, _, val_data = patterns(shards)
    one = _data_set(TrainConfig(data=str(shards)))
    other = _data_set(TrainConfig(train_data=train_data, val_data=val_data))
    assert one == other
    assert one.keys() == {"train_set", "val_set"}
    assert one != _data_set(TrainConfig(data=str(folder)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-data", "x.tar"], "train_data and val_data must be given together"),
        (
            ["--data", "/d/train-*.tar"],
            r"data must be a folder.*pattern /d/train-\*.tar.*--train-d",
        ),
        (["--train-data", "x", "--val-data", "x.tar"], "must name .tar or .parquet files.*got x;"),
        (["--val-list", "x"], "val_list holds the labels of data/val, so it needs data"),
        (["--data", "d", "--val-list", "x", "--val-data", "x.tar"], "needs data and no val_data"),
        (["--train-data", "x.tar", "--val-data", "x.tar"], "files that exist, found no x.tar"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_name_no_data_set_exit_with_two_and_a_sentence(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = start(flags, tmp_path / "run")
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_splits_with_other_classes_are_refused(
    shards: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    index = index_folder(folder / "val")
    images = [index.read(row) for row in range(len(index))]
    file = write_parquet(
        tmp_path / "val.parquet", images, index.labels.tolist(), classes=["cat", "emu"]
    )
    flags = [*patterns(shards)[:3], str(file)]
    assert start(flags, tmp_path / "run") == 2
    assert "must have the same classes, in the same order, but 2" in capsys.readouterr().err


def test_training_on_the_validation_images_is_told(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    val = str(shards / "val" / "*.tar")
    flags = ["--train-data", val, "--val-data", str(shards / "val" / "val-0000[01].tar")]
    assert start(flags, tmp_path / "run", "--epochs", "1") == 0
    assert "training and validation read the same images" in caplog.text
    assert "val-00000.tar and 1 more" in caplog.text


def test_the_synthetic_loader_says_that_it_reads_no_data(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rsfast")
    data = ["--data", str(folder)]
    short = ("--epochs", "1", "--steps-per-epoch", "1")
    assert start(data, tmp_path / "run", *short, loader="synthetic") == 0
    said = f"loader synthetic does not read {folder}: images are random, of 1000 classes"
    assert said in caplog.messages
