"""Faults of an int8 file are found, too, and a loss of accuracy is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

from helpers import make_image_folder
from lifelike import lifelike
from rsfast.data.convert import convert
from rsfast.deploy.manifest import INT8_FILE
from rsfast.deploy.reference import Reference
from rsfast.export import check
from rsfast.export.__main__ import main
from rsfast.training.checkpoint import save_weights

CLASSES = [f"class_{k}" for k in range(10)]
EQUALS = [f"onnxruntime {mode} int8 equals a file of each resolution" for mode in ("fast", "small")]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("photographs"), CLASSES, train=4, val=2)


@pytest.fixture(scope="module")
def exported(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    model = lifelike("lifelike:Residual", (64, 48, 32))
    save_weights(model, torch.ones(3), folder / "weights.safetensors")
    flags = ["--output", str(folder / "out"), "--arch", "lifelike:Residual", "--int8"]
    flags += ["--data", str(photographs), "--max-loss", "100"]  # it was not trained
    assert main([str(folder / "weights.safetensors"), *flags]) == 0
    return folder / "out"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


def failures(folder: Path) -> list[str]:
    return [line.name for line in check.check(folder).lines if line.passed is False]


def test_a_good_export_passes(exported: Path) -> None:
    assert not failures(exported)


def test_a_table_in_the_wrong_place_is_found(folder: Path) -> None:
    graph = onnx.load(folder / INT8_FILE)
    for entry in graph.graph.initializer:
        if entry.name.endswith(".table"):
            values = numpy_helper.to_array(entry)[[0, 2, 1]]
            entry.CopyFrom(numpy_helper.from_array(values, entry.name))
    onnx.save(graph, folder / INT8_FILE)
    assert failures(folder) == EQUALS


def test_biases_that_are_left_out_are_found(folder: Path) -> None:
    graph = onnx.load(folder / INT8_FILE)
    (biases,) = (e for e in graph.graph.initializer if e.name == "rsfast.int32.table")
    values = numpy_helper.to_array(biases)
    biases.CopyFrom(numpy_helper.from_array(0 * values, biases.name))
    onnx.save(graph, folder / INT8_FILE)
    assert failures(folder) == EQUALS


def test_a_missing_int8_file_is_found(folder: Path) -> None:
    (folder / INT8_FILE).unlink()
    assert "model.int8.onnx is valid ONNX" in failures(folder)


def test_nothing_to_compare_with_is_a_failure(folder: Path) -> None:
    replace(Reference.read(folder), int8={}).write(folder)
    assert failures(folder) == EQUALS


def test_a_loss_of_accuracy_is_refused(
    exported: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["check", str(exported), "--data", str(photographs), "--val-images", "10"]
    assert main([*flags, "--max-loss", "-101"]) == 1
    assert "FAILED  int8 accuracy at 32 px" in capsys.readouterr().out
    before = check.check(exported).top1
    assert main([*flags, "--max-loss", "100"]) == 0
    assert "on 10 images" in capsys.readouterr().out
    assert check.check(exported).top1 == before, "which was measured on 20"
    assert main([*flags[:-1], "0"]) == 2
    assert "--val-images must be at least 1, got 0" in capsys.readouterr().err


def test_a_flat_folder_with_a_list_and_archives_are_measured_alike(
    exported: Path, folder: Path, photographs: Path, tmp_path: Path
) -> None:
    wanted = json.loads((exported / "validation.json").read_text())
    flat, lines = shutil.copytree(photographs, tmp_path / "flat"), []
    for path in sorted((flat / "val").glob("*/*.jpg")):
        name = f"{path.parent.name}_{path.name}"
        path.rename(flat / "val" / name)
        lines.append(f"{name} {path.parent.name}\n")
    for path in (flat / "val").glob("class_?"):
        path.rmdir()
    (tmp_path / "list.txt").write_text("".join(lines))
    convert(photographs, tmp_path / "shards", images_per_shard=16)
    listed = ["--data", str(flat), "--val-list", str(tmp_path / "list.txt")]
    for flags in (listed, ["--val-data", str(tmp_path / "shards" / "val" / "*.tar")]):
        (folder / "validation.json").unlink()
        assert check.main([str(folder), *flags, "--max-loss", "100"]) == 0
        found = json.loads((folder / "validation.json").read_text())
        assert (found["top1"], found["images"]) == (wanted["top1"], 20)


def test_an_export_calibrates_and_measures_on_archives(
    exported: Path, photographs: Path, tmp_path: Path
) -> None:
    convert(photographs, tmp_path / "shards", images_per_shard=16)
    flags = ["--output", str(tmp_path / "out"), "--arch", "lifelike:Residual", "--int8"]
    for split in ("train", "val"):
        flags += [f"--{split}-data", str(tmp_path / "shards" / split / "*.tar")]
    weights = exported.parent / "weights.safetensors"
    assert main([str(weights), *flags, "--max-loss", "100"]) == 0
    found, wanted = (
        json.loads((path / "validation.json").read_text())["top1"]
        for path in (tmp_path / "out", exported)
    )
    assert found == wanted
