"""Runs that begin with weights that exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import make_image_folder, torchrun
from rsfast import create_model, train
from rsfast.data import train_loader
from rsfast.files.unpickle import load_dict
from rsfast.models.deploy import calibrate
from rsfast.pyramid import Pyramid
from run_helpers import assert_same_run, stop_when

SMALL = """--arch tiny:network --resolutions 32 24 --batch-size 4 --lr 0.01 --log-every 2 --seed 3
    --epochs 2 --workers 0 --loader pil""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=9, val=5)


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network that was trained at one resolution."""
    output = tmp_path_factory.mktemp("single") / "run"
    assert start(folder, output, "--resolutions", "32", "--seed", "7") == 0
    return output / "last.pt"


def start(folder: Path, output: Path, *flags: str) -> int:
    return train.main([*SMALL, "--data", str(folder), "--output", str(output), *flags])


def started(output: Path) -> dict[str, Any]:
    return json.loads((output / "log.jsonl").read_text().splitlines()[0])


def state_before_training(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> dict[str, torch.Tensor]:
    """Of the network, when its first step is about to come."""
    with monkeypatch.context() as patch:
        found: dict[str, torch.Tensor] = {}

        def epochs(run: Any, interrupt: Any) -> None:
            found.update({k: v.clone() for k, v in run.model.network.state_dict().items()})
            run.log.close()

        patch.setattr(train, "train_epochs", epochs)
        assert start(folder, output, *flags) == 0
    return found


def test_a_run_begins_with_the_file_and_says_so(
    folder: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    state = state_before_training(folder, output, monkeypatch, "--pretrained", str(single))
    source = load_dict(single)["model"]
    for name, tensor in state.items():
        theirs = source[f"network.{name}"]
        assert torch.equal(tensor, theirs.expand_as(tensor)), name
    line = started(output)
    assert line["pretrained"] == str(single)
    assert len(line["pretrained_sha256"]) == 64
    assert line["config"]["pretrained"] == str(single)


@pytest.mark.parametrize("copies", [1, 2])
def test_statistics_are_estimated_by_resolution_before_the_first_step(
    folder: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    flags = ["--pretrained", str(single), "--calibrate-first", "3", "--copies", str(copies)]
    found = state_before_training(folder, tmp_path / "run", monkeypatch, *flags)
    model = create_model("tiny:network", (32, 24), 2)
    weights = load_dict(single)["model"]
    model.network.load_state_dict(
        {n: weights[f"network.{n}"].expand_as(t) for n, t in model.network.state_dict().items()}
    )
    loader = train_loader(folder, (32, 24), 4, backend="pil", workers=0, seed=3, copies=copies)
    loader.first_step = len(loader) - 3
    batches = [batch.images.levels()[::copies] for batch in loader]
    for bank, resolution in enumerate((32, 24)):
        net = model.at(resolution)
        calibrate(net, [levels[bank] for levels in batches])
        for name, expected in net.state_dict().items():
            own = found[name][bank] if name.startswith("bn") else found[name]
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_calibrating_leaves_momentum_and_mode_as_they_were() -> None:
    model = create_model("tiny:network", (32, 24), 2).train()
    norm = model.network.bn1
    norm.eval()
    calibrate(model, [Pyramid.pack([torch.randn(2, 3, r, r) for r in (32, 24)])] * 2)
    assert (norm.momentum, norm.training, model.network.bn2.training) == (0.1, False, True)
    assert norm.num_batches_tracked.tolist() == [2, 2]
    with pytest.raises(ValueError, match="at least one batch to calibrate on"):
        calibrate(model, [])


@pytest.mark.parametrize("freeze", [[], ["--freeze", "stem", "bn2"], ["--freeze", "backbone"]])
def test_a_stopped_run_goes_on_without_the_file_bit_for_bit(
    folder: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freeze: list[str]
) -> None:
    copy = tmp_path / "weights.pt"
    copy.write_bytes(single.read_bytes())
    flags = ["--pretrained", str(copy), "--calibrate-first", "2", *freeze, "--ema-decay", "0.9"]
    outputs = tmp_path / "whole", tmp_path / "parts"
    assert start(folder, outputs[0], *flags) == 0
    with monkeypatch.context() as patch:
        stop_when(patch, lambda run: run.steps_done == 3)
        assert start(folder, outputs[1], *flags, "--resume", "auto") == 75
    copy.unlink()
    assert start(folder, outputs[1], *flags, "--resume", "auto") == 0
    assert_same_run(outputs[1], outputs[0])
    assert started(outputs[1])["pretrained_sha256"] == started(outputs[0])["pretrained_sha256"]
    assert start(folder, outputs[1], *flags[2:], "--resume", "auto", *flags[:1], "x.pt") == 2


def test_frozen_parameters_are_those_of_the_file_at_the_end(
    folder: Path, single: Path, tmp_path: Path
) -> None:
    flags = ["--pretrained", str(single), "--freeze", "all-but-classifier"]
    assert start(folder, tmp_path / "run", *flags) == 0
    source, last = load_dict(single)["model"], load_dict(tmp_path / "run" / "last.pt")["model"]
    for name, tensor in last.items():
        same = torch.equal(tensor, source[name].expand_as(tensor))
        trained = "fc." in name or "running_" in name or "num_batches" in name
        assert same != trained, name
    assert started(tmp_path / "run")["parameters_frozen"] == 3 * 8 * 9 + 2 * 8 * 8 * 9 + 3 * 2 * 16


def test_what_cannot_be_read_or_frozen_ends_a_run_before_it_begins(
    folder: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        (["--pretrained", "none.pth"], "checkpoint none.pth does not exist"),
        (["--pretrained", str(single), "--arch", "resnet18"], "the file says that it is of tiny"),
        (["--freeze", "layer9"], "freeze must name parts of tiny:network: classifier, backbone"),
    ):
        assert start(folder, tmp_path / "run", *flags) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_ranks_begin_as_one_network_and_only_the_first_needs_the_file(
    folder: Path, single: Path, tmp_path: Path
) -> None:
    """Each process is told of the file in its own folder; one folder has none."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    (tmp_path / "0" / "weights.pt").write_bytes(single.read_bytes())
    script = tmp_path / "train.py"
    script.write_text(IN_A_FOLDER_OF_ITS_OWN)
    flags = ["--pretrained", "weights.pt", "--calibrate-first", "2", "--freeze", "backbone"]
    arguments = [*SMALL, "--data", str(folder), "--output", str(tmp_path / "run"), *flags]
    torchrun("train.py", *arguments, folder=tmp_path)
    content = load_dict(tmp_path / "run" / "last.pt")
    assert len(content["ranks"]) == 2
    source = load_dict(single)["model"]
    for name in ("network.conv2.weight", "network.bn1.weight"):
        assert torch.equal(content["model"][name], source[name].expand_as(content["model"][name]))
    states = [torch.load(tmp_path / str(rank) / "begun.pt") for rank in (0, 1)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    # Not the file's any more, and means of what both ranks have seen.
    assert not torch.equal(
        states[0]["network.bn1.running_mean"][0], source["network.bn1.running_mean"][0]
    )


IN_A_FOLDER_OF_ITS_OWN = """
import os, sys
import torch
from rsfast import train

os.chdir(os.environ["RANK"])
take = train.train_epoch

def epoch(run, interrupt):
    if not run.at.epoch:
        torch.save(run.model.state_dict(), "begun.pt")
    take(run, interrupt)

train.train_epoch = epoch
assert train.main(sys.argv[1:]) == 0
"""
