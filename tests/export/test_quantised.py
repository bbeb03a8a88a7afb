"""Quantised networks as ONNX and packed files, and a check that knows thresholds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import rsfast
from deploy_helpers import manifest
from lq_helpers import quantised_network, settled
from rsfast.deploy.manifest import PACKED_FILE, Manifest
from rsfast.deploy.reference import Reference
from rsfast.export import check as check_module
from rsfast.export import packed
from rsfast.export.__main__ import main
from rsfast.export.check import _equals_pytorch, _packed
from rsfast.export.graph import to_onnx
from rsfast.models import RSNet
from rsfast.training import packed as packed_module
from rsfast.training.checkpoint import load_model, save_weights

SIZES = (48, 32)


def saved(model: RSNet, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_weights(model, torch.ones(len(model.resolutions)), path)
    return path


def own_network() -> RSNet:
    """Of a module that is not rsfast's."""
    torch.manual_seed(0)
    return settled(rsfast.create_model("tiny:quantised", SIZES, 5))


@pytest.mark.slow
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(2, 32), (2, 2)])
def test_a_quantised_network_is_exported_with_its_packed_file(
    weight_bits: int, activation_bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = settled(quantised_network(weight_bits, activation_bits, resolutions=SIZES))
    folder = tmp_path / "exported"
    flags = ["--packed", "--runtime", "onnxruntime", "openvino", "--output", str(folder)]
    assert main([str(saved(model, tmp_path)), *flags]) == 0, capsys.readouterr()
    found, _ = load_model(folder / PACKED_FILE)
    assert found.settings() == model.settings()
    assert PACKED_FILE in (folder / "README.md").read_text()
    lines = json.loads((folder / "validation.json").read_text())["lines"]
    assert len([line for line in lines if line["name"].startswith(PACKED_FILE)]) == 2
    assert all(line["passed"] for line in lines)
    assert Reference.read(folder).steps == (activation_bits < 32)

    read, reference = Manifest.read(folder), Reference.read(folder)
    codes = (folder / PACKED_FILE).read_bytes()
    (folder / PACKED_FILE).write_bytes(codes[:-1] + bytes([codes[-1] ^ 1]))
    assert [line.passed for line in _packed(folder, reference, read)] == [False, None]
    (folder / PACKED_FILE).unlink()
    assert [line.passed for line in _packed(folder, reference, read)] == [False, None]


def flipped(state: dict[str, Tensor], layer: str, bit: int) -> dict[str, Tensor]:
    """A packed state with another code of the first weight of a layer."""
    codes = state[f"{layer}.codes"].clone()
    codes[0, 0] ^= 1 << bit
    return {**state, f"{layer}.codes": codes}


@pytest.mark.parametrize("bit", [None, 0, 1])
def test_a_packed_file_must_be_the_network_bit_for_bit(
    bit: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where `check` on another machine has to allow for activations at thresholds."""
    if bit is not None:
        pack = packed_module.packed_state
        monkeypatch.setattr(
            packed_module, "packed_state", lambda model: flipped(pack(model), "network.conv3", bit)
        )
    folder = tmp_path / "out"
    flags = ["--arch", "tiny:quantised", "--packed", "--output", str(folder)]
    code = main([str(saved(own_network(), tmp_path)), *flags])
    said = capsys.readouterr()
    if bit is None:
        assert code == 0, said
        line = f"not looked at  {PACKED_FILE} equals PyTorch: it is of tiny:quantised"
        assert line in said.out
        written = Manifest.read(folder)
        assert (written.weight_bits, written.activation_bits) == (2, 2)
        card = (folder / "README.md").read_text()
        assert "| bits | quantised layers have weights of 2 bits and activations of 2 bits;" in card
    else:
        assert code == 1
        assert f"{PACKED_FILE} must give the logits of weights.safetensors bit for bit" in said.err
        assert said.err.count("\n") == 1
        assert not folder.exists()


def test_without_pytorch_the_digest_alone_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / PACKED_FILE).write_bytes(b"codes")
    monkeypatch.setattr(check_module, "find_spec", lambda name: None)
    digest = check_module._digest(tmp_path / PACKED_FILE)
    read = replace(manifest(rsfast.create_model("tiny:network", SIZES, 5)), packed_sha256=digest)
    lines = list(_packed(tmp_path, Reference({}, {}, {}), read))
    assert [line.passed for line in lines] == [True, None]
    assert "needs PyTorch" in lines[1].found


@pytest.mark.slow
@torch.no_grad()
def test_the_graph_has_one_kind_of_levels_for_every_size() -> None:
    """No weight is quantised where the network runs, and every activation is."""
    model = settled(quantised_network(2, 2, resolutions=SIZES))
    graph = to_onnx(model)
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("Conv") == 20
    assert operators.count("Greater") == 3 * 16, "three thresholds for each of the quantisers"
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    images = np.random.default_rng(0).standard_normal((3, 3, 40, 40), np.float32)
    (found,) = session.run(None, {"images": images})
    expected = model.at(40)(torch.from_numpy(images)).numpy()
    errors = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    assert errors.min() < 1e-4, "an image without a value at a threshold"


def test_a_network_in_full_precision_is_not_packed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--arch", "tiny:network", "--output", str(tmp_path / "out"), "--packed"]
    assert main([str(checkpoint), *flags]) == 2
    error = capsys.readouterr().err
    assert "has no codes to be packed" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("own", [False, True], ids=["resnet18_lq", "tiny:quantised"])
def test_int8_is_not_for_quantised_activations(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "val").mkdir()
    monkeypatch.setattr(packed, "save_packed", lambda *arguments: pytest.fail("a file is written"))
    model = own_network() if own else quantised_network(2, 2, resolutions=SIZES)
    flags = ["--int8", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    flags += ["--packed", *(["--arch", "tiny:quantised"] if own else [])]
    assert main([str(saved(model, tmp_path)), *flags]) == 2
    error = capsys.readouterr().err
    assert "--int8 is for activations in full precision" in error
    assert "have 2 bits: leave it away" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def stepped() -> tuple[Reference, Manifest]:
    """Of a network with quantised activations: three images at two sizes, two banks."""
    generator = np.random.default_rng(0)
    logits = {r: generator.standard_normal((3, 50)).astype(np.float32) for r in SIZES}
    by_bank = {
        r: np.stack([logits[r][0] if r == own else generator.standard_normal(50) for own in SIZES])
        for r in SIZES
    }
    read = manifest(rsfast.create_model("tiny:network", SIZES, 5))
    return Reference(logits, by_bank, {}, steps=True), read


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ("nothing", True),
        ("some images fall", True),
        ("all images differ", False),
        ("one image differs much", False),
        ("one image is of the other bank", False),
        ("no number", False),
        ("some images fall, without steps", False),
    ],
)
def test_rounding_at_thresholds_is_told_from_faults(change: str, passed: bool) -> None:
    reference, read = stepped()
    found = {r: logits.copy() for r, logits in reference.logits.items()}
    noise = np.random.default_rng(1).standard_normal((3, 50)).astype(np.float32)
    if change.startswith("some images fall"):
        found[48] += 0.2 * noise
    elif change == "all images differ":
        for logits in found.values():
            logits += 0.001 * noise
    elif change == "one image differs much":
        found[48][1] += 1.5 * noise[1]
    elif change == "one image is of the other bank":
        found[48][0] = 0.6 * reference.by_bank[48][1] + 0.4 * found[48][0]
    elif change == "no number":
        found[48][2] = np.nan
    if change.endswith("without steps"):
        reference = replace(reference, steps=False)
    outputs = {f"3 of {r} px": (r, logits) for r, logits in found.items()}
    line = _equals_pytorch("check", outputs, reference, read)
    assert line.passed is passed, line
    assert line.found.endswith("at 48, 32 px")


def test_references_say_whether_activations_are_quantised(tmp_path: Path) -> None:
    reference, _ = stepped()
    for steps in (True, False):
        replace(reference, steps=steps).write(tmp_path)
        assert Reference.read(tmp_path).steps is steps
    with np.load(tmp_path / "reference.npz") as file:  # as older versions wrote it
        np.savez(tmp_path / "reference.npz", **{n: file[n] for n in file.files if n != "steps"})
    assert Reference.read(tmp_path).steps is False
