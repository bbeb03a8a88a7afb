"""`python -m rsfast.export`: the files, the refusals, and what is left when it fails."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import rsfast
from deploy_helpers import unlike_banks
from rsfast.deploy.manifest import FP32_FILE, METADATA_KEY, Manifest
from rsfast.deploy.reference import Reference
from rsfast.export import check
from rsfast.export.__main__ import main
from rsfast.export.package import write_card
from rsfast.models import official
from rsfast.training import checkpoint as checkpoint_files
from run_helpers import network_payload


def export(checkpoint: Path, output: Path, *flags: str) -> int:
    return main([str(checkpoint), "--output", str(output), "--arch", "tiny:network", *flags])


def test_the_folder_holds_what_it_says(exported: Path, checkpoint: Path) -> None:
    manifest = Manifest.read(exported)
    assert (manifest.arch, manifest.resolutions) == ("tiny:network", (64, 48, 32))
    assert manifest.checkpoint == checkpoint.name
    assert (exported / "labels.txt").read_text().split() == ["0", "1", "2", "3", "4"]
    graph = onnx.load(exported / FP32_FILE)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata[METADATA_KEY]) == json.loads((exported / "rsfast.json").read_text())
    card = (exported / "README.md").read_text()
    for name in ("model.onnx", "labels.txt", "reference.npz", "64, 48, 32 pixels"):
        assert name in card
    assert "int8" not in card
    assert "| bits | weights and activations in full precision |" in card
    assert {path.name for path in exported.iterdir()} == {
        *("model.onnx", "rsfast.json", "labels.txt", "README.md"),
        *("reference.npz", "validation.json"),
    }


def test_an_authors_checkpoint_is_exported(tmp_path: Path) -> None:
    model = unlike_banks(rsfast.create_model("resnet18", (64, 32), num_classes=4))
    official.save(model, tmp_path / "theirs.pth.tar")
    flags = ["--trained-resolutions", "64", "32", "--output", str(tmp_path / "out")]
    assert main([str(tmp_path / "theirs.pth.tar"), *flags]) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert (manifest.arch, manifest.mean) == ("resnet18", (0.0, 0.0, 0.0))


def test_either_weights_of_a_run_with_averages_are_exported(tmp_path: Path) -> None:
    content = network_payload()
    content["ema"] = {name: tensor.clone() for name, tensor in content["model"].items()}
    content["ema"]["network.fc.bias"] += 1
    path = tmp_path / "last.pt"
    checkpoint_files.save(content, path)
    found = {}
    for weights in ("averaged", "plain"):
        flags = ["--weights", weights, "--output", str(tmp_path / weights)]
        assert main([str(path), *flags]) == 0
        found[weights] = Reference.read(tmp_path / weights).logits
    for resolution, logits in found["plain"].items():
        np.testing.assert_allclose(found["averaged"][resolution], logits + 1, atol=1e-4)


def test_triton_gets_a_model_with_a_warm_up_for_each_resolution(
    checkpoint: Path, tmp_path: Path
) -> None:
    assert export(checkpoint, tmp_path / "out", "--triton", "--preprocess") == 0
    model = tmp_path / "out" / "triton" / "tiny_network"
    text = (model / "config.pbtxt").read_text()
    assert text.count("{") == text.count("}")
    assert 'name: "images" data_type: TYPE_UINT8 dims: [ 3, -1, -1 ]' in text
    assert [f"dims: [ 3, {r}, {r} ]" in text for r in (64, 48, 32)] == [True] * 3
    assert (model / "1" / "model.onnx").samefile(tmp_path / "out" / FP32_FILE)
    assert Manifest.read(tmp_path / "out").input_dtype == "uint8"


def test_the_accuracy_goes_onto_the_card(checkpoint: Path, tmp_path: Path) -> None:
    columns = "resolution,trained,batch_norm,multiply_adds,parameters,top1,top5"
    (tmp_path / "accuracy.csv").write_text(f"{columns}\n64,True,own,2000000,9,71.5,90\n")
    flags = ["--accuracy", str(tmp_path / "accuracy.csv")]
    assert export(checkpoint, tmp_path / "out", *flags) == 0
    assert "| 64 | 71.50 | 90.00 | 2.0 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_what_was_measured_of_the_files(exported: Path, tmp_path: Path) -> None:
    assert "Not stated" in (exported / "README.md").read_text()
    manifest = replace(Manifest.read(exported), calibration_images=512)
    top1 = {"fp32": {"64": 54.75, "48": 50.0}, "int8": {"64": 54.875, "48": 49.5}}
    (tmp_path / "validation.json").write_text(json.dumps({"top1": top1}))
    write_card(manifest, tmp_path, None)
    card = (tmp_path / "README.md").read_text()
    assert "| resolution | fp32 | int8 |\n|---|---|---|\n| 64 | 54.75 | 54.88 |" in card
    assert 'deploy.load(".", precision="int8")' in card
    assert "ONNX Runtime before 1.31.1" in card
    assert "model.onnx" not in card, "files that are not there are not listed"


def test_the_card_says_where_picked_levels_come_from(exported: Path, tmp_path: Path) -> None:
    assert "picked" not in (exported / "README.md").read_text()
    (tmp_path / "validation.json").write_text('{"top1": {}}')
    write_card(replace(Manifest.read(exported), levels="nearest"), tmp_path, None)
    (line,) = (x for x in (tmp_path / "README.md").read_text().splitlines() if "geometry" in x)
    assert "; below 64, r x r is picked from that of r = 64, whose pixels floor(i * 64 / r)" in line
    assert line.endswith("EXIF's orientation is not applied |")


def test_an_earlier_export_is_replaced_whole(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "out", "--triton") == 0
    assert export(checkpoint, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "triton").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_things_is_left_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert export(checkpoint, tmp_path) == 2
    assert "it holds thesis.txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_notes_beside_an_earlier_export_are_not_removed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, tmp_path / "out") == 0
    (tmp_path / "out" / "latency.csv").write_text("of the files that are replaced")
    assert export(checkpoint, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "latency.csv").exists()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert export(checkpoint, tmp_path / "out") == 2
    assert "it holds notes.txt" in capsys.readouterr().err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_what_was_there_comes_back_if_the_new_one_cannot_be_put_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export(checkpoint, tmp_path / "out") == 0
    before = (tmp_path / "out" / "rsfast.json").stat().st_ino
    rename = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    assert export(checkpoint, tmp_path / "out") == 1
    assert (tmp_path / "out" / "rsfast.json").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert export(checkpoint, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "rsfast.json").exists()


def test_what_fails_its_check_is_not_written(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(checkpoint, tmp_path / "out") == 0
    before = (tmp_path / "out" / FP32_FILE).read_bytes()
    forward = torch.nn.Linear.forward
    with monkeypatch.context() as patch:  # the graph of another network than the reference's
        export_graph = torch.export.export

        def differently(network: torch.nn.Module, *args: object, **options: object) -> object:
            patch.setattr(torch.nn.Linear, "forward", lambda self, x: 1.1 * forward(self, x))
            return export_graph(network, *args, **options)

        patch.setattr(torch.export, "export", differently)
        assert export(checkpoint, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "is not written" in captured.err
    assert (tmp_path / "out" / FP32_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--int8"], "--int8 needs --data"),
        (["--int8", "--val-data", "v.tar"], "train_data and val_data must be given together"),
        (["--val-list", "list.txt"], "val_list holds the labels of data/val, so it needs data"),
        (["--weights", "plain"], "weights can be chosen of a .pt file"),
        (["--calibration-images", "0"], "must be at least 1, got 0"),
        (["--arch", "resnet18"], "is of tiny:network, got --arch resnet18"),
        (["--accuracy", "nowhere.csv"], "nowhere.csv"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert export(checkpoint, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "no.pt"), "--output", str(tmp_path / "out")]) == 2
    assert "no.pt" in capsys.readouterr().err


def test_logits_without_a_number_fail(exported: Path) -> None:
    nan = np.full((1, 5), np.nan, np.float32)
    assert check._error(nan, np.ones((1, 5), np.float32)) == np.inf
