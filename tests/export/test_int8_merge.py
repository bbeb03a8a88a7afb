"""Batch norms that are zero, tiny or negative, and networks that have no shared int8 form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
pytest.importorskip("onnxscript", reason="needs the exporter's onnxscript")

import onnx
import onnxruntime

from int8_helpers import SIZES, in_openvino, logits, quantized, rms
from lifelike import NETWORKS, calibration, images, lifelike
from rsfast.deploy.qdq import pinned_qdq
from rsfast.export.graph import to_onnx
from rsfast.export.merge import Quantized, merge
from rsfast.export.quantize import quantize_at


def parts(folder: Path, name: str = "inverted") -> list[Quantized]:
    path = folder / "model.onnx"
    onnx.save(to_onnx(lifelike(name, SIZES)), path)
    return [quantize_at(path, r, calibration(r)) for r in SIZES]


@pytest.mark.parametrize("name", NETWORKS)
def test_gammas_of_any_size_and_sign_stay_exact(tmp_path: Path, name: str) -> None:
    model = lifelike(name, SIZES)
    with torch.no_grad():
        for norm in model.batch_norms():
            for bank in range(len(SIZES)):  # other channels at each resolution
                for first, factor in enumerate((0.0, 1e-12, 1e-5, -1.0)):
                    norm.weight[bank, bank + 2 * first :: 8] *= factor
    network = quantized(tmp_path, model)
    for resolution in SIZES:
        batch = images(64, resolution, seed=3).numpy()
        exact, found = logits(network.fp32, batch), logits(network.int8, batch)
        assert rms(found, exact) < 0.08
        assert rms(logits(pinned_qdq(network.int8, 64, resolution), batch), found) < 0.02
        assert rms(in_openvino(network.int8, batch), found) < 0.04


@pytest.mark.parametrize("gamma", [0.0, 1e-12])
def test_a_channel_that_no_resolution_uses_leaves_its_bias(tmp_path: Path, gamma: float) -> None:
    model = lifelike("inverted", SIZES)
    with torch.no_grad():
        for norm in model.batch_norms():
            norm.weight[:, ::4] *= gamma
            norm.bias[:, ::4] = 0.8
    network = quantized(tmp_path, model)
    for resolution in SIZES:
        batch = images(64, resolution, seed=3).numpy()
        assert rms(logits(network.int8, batch), logits(network.fp32, batch)) < 0.08


def test_biases_leave_room_for_the_sum_of_products(tmp_path: Path) -> None:
    model = lifelike("inverted", SIZES)
    with torch.no_grad():
        for norm in model.batch_norms():
            norm.weight[0] *= 1e-12
    network = quantized(tmp_path, model)
    graph = onnx.load(network.int8).graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    biases = np.abs(values["rsfast.int32.table"].astype(np.int64))
    assert biases.max() < 2**30 * (1 + 1e-6)  # steps are float32
    assert biases[0].max() > 2**29  # without the bound they were 2**31


def test_integer_weights_are_those_of_the_resolution_that_uses_a_channel_most(
    tmp_path: Path,
) -> None:
    made = parts(tmp_path)
    peaks, rows = [], []
    for part in made:
        node = next(n for n in part.model.graph.node if n.op_type == "QLinearConv")
        values = {i.name: onnx.numpy_helper.to_array(i) for i in part.model.graph.initializer}
        rows.append(values[node.input[3]])
        peaks.append(np.abs(part.weights[node.input[3].removesuffix("_quantized")]).max((1, 2, 3)))
    most = np.argmax(peaks, axis=0)
    merged = merge(made, SIZES)
    node = next(n for n in merged.graph.node if n.op_type == "QLinearConv")
    values = {i.name: onnx.numpy_helper.to_array(i) for i in merged.graph.initializer}
    wanted = np.stack([rows[r][channel] for channel, r in enumerate(most)])
    np.testing.assert_array_equal(values[node.input[3]], wanted)
    assert len(set(most)) > 1


def test_other_operators_at_one_resolution_are_refused(tmp_path: Path) -> None:
    made = parts(tmp_path)
    node = next(n for n in made[1].model.graph.node if n.op_type == "QLinearConv")
    stride = next(a for a in node.attribute if a.name == "strides")
    stride.ints[:] = [4, 4]
    with pytest.raises(ValueError, match=r"of 48 and 32 pixels must have the same operators"):
        merge(made, SIZES)


def test_other_weights_at_one_resolution_are_refused(tmp_path: Path) -> None:
    made = parts(tmp_path)
    node = next(n for n in made[2].model.graph.node if n.op_type == "QLinearConv")
    weight = next(i for i in made[2].model.graph.initializer if i.name == node.input[3])
    other = onnx.numpy_helper.to_array(weight)[:, ::-1].copy()
    weight.CopyFrom(onnx.numpy_helper.from_array(other, weight.name))
    with pytest.raises(ValueError, match=r"must be the same at \(48, 32, 24\) pixels but for a"):
        merge(made, SIZES)


def test_a_shape_that_depends_on_the_resolution_is_refused(tmp_path: Path) -> None:
    made = parts(tmp_path, "residual")
    for part, width in zip(made, (1, 2, 1), strict=True):
        node = next(n for n in part.model.graph.node if n.op_type == "Reshape")
        shape = next(i for i in part.model.graph.initializer if i.name == node.input[1])
        shape.CopyFrom(onnx.numpy_helper.from_array(np.array([-1, width]), shape.name))
    with pytest.raises(ValueError, match=r"\(int64\) must be the same at \(48, 32, 24\) pixels"):
        merge(made, SIZES)


def test_an_operator_without_a_form_for_openvino_is_named(tmp_path: Path) -> None:
    made = merge(parts(tmp_path), SIZES)
    node = next(n for n in made.graph.node if n.op_type == "QLinearAdd")
    node.op_type, node.name = "QLinearOdd", "here"
    path = tmp_path / "odd.onnx"
    onnx.save(made, path)
    with pytest.raises(ValueError, match=r"operator QLinearOdd \(here\) of int8 has no form for"):
        pinned_qdq(path, 1, 32)


def test_an_older_onnx_runtime_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.0")
    with pytest.raises(ImportError, match=r"1\.31\.1 or later, .*got 1\.31\.0"):
        parts(tmp_path)
