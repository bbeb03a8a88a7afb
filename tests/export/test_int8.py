"""The int8 file: what it computes at every size, against float32 and against a file per size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
pytest.importorskip("onnxscript", reason="needs the exporter's onnxscript")

import onnx

from int8_helpers import SIZES, Int8, in_openvino, logits, quantized, rms
from lifelike import NETWORKS, calibration, images, lifelike, manifest
from rsfast.deploy.manifest import METADATA_KEY, Manifest
from rsfast.deploy.qdq import pinned_qdq
from rsfast.export.graph import to_onnx
from rsfast.export.quantize import quantize, quantize_at

LARGEST_NOISE = 0.08  # rms of int8 against float32, relative; 0.006 to 0.06 were measured


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Int8:
    return quantized(tmp_path_factory.mktemp(request.param), lifelike(request.param, SIZES))


@pytest.mark.parametrize("resolution", SIZES)
def test_int8_is_close_to_float32_with_each_resolutions_own_batch_norms(
    network: Int8, resolution: int
) -> None:
    batch = images(64, resolution, seed=3)
    found = logits(network.int8, batch.numpy())
    with torch.no_grad():
        own = network.model.at(resolution)(batch).numpy()
        others = [network.model.at(r)(batch).numpy() for r in SIZES if r != resolution]
    assert rms(found, own) < LARGEST_NOISE
    assert np.mean(found.argmax(1) == own.argmax(1)) > 0.8
    for other in others:  # a wrong table would be this far away
        assert rms(found, other) > 5 * LARGEST_NOISE


@pytest.mark.parametrize("resolution", SIZES)
def test_the_shared_file_is_as_exact_as_a_file_of_one_resolution(
    network: Int8, resolution: int
) -> None:
    batch = images(64, resolution, seed=3)
    alone = quantize_at(network.fp32, resolution, calibration(resolution)).model.SerializeToString()
    exact = logits(network.fp32, batch.numpy())
    shared, single = (logits(model, batch.numpy()) for model in (network.int8, alone))
    assert rms(shared, single) < 0.02
    assert rms(shared, exact) < 1.2 * rms(single, exact) + 0.001


@pytest.mark.parametrize("resolution", [*SIZES, 40, 28, 26, 64, 20])
def test_a_pinned_session_computes_what_the_dynamic_one_does(
    network: Int8, resolution: int
) -> None:
    batch = images(2, resolution, seed=4).numpy()
    dynamic = logits(network.int8, batch)
    pinned = logits(network.int8, batch, batch=2, size=resolution)
    np.testing.assert_allclose(pinned, dynamic, rtol=1e-5, atol=1e-5 * np.abs(dynamic).max())


@pytest.mark.parametrize(("between", "nearest"), [(40, 48), (39, 32), (28, 32), (27, 24), (99, 48)])
def test_a_size_in_between_takes_the_nearest_table_and_the_larger_of_two(
    network: Int8, between: int, nearest: int
) -> None:
    batch = images(32, between, seed=5)
    found = logits(network.int8, batch.numpy())
    with torch.no_grad():
        distances = {r: rms(found, network.model.at(r)(batch).numpy()) for r in SIZES}
    assert min(distances, key=distances.__getitem__) == nearest, distances


@pytest.mark.parametrize("resolution", [*SIZES, 40])
def test_openvino_computes_what_onnx_runtime_does(network: Int8, resolution: int) -> None:
    batch = images(64, resolution, seed=6).numpy()
    expected = logits(network.int8, batch)
    model = pinned_qdq(network.int8, 64, resolution)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    assert rms(logits(model, batch), expected) < 0.02
    found = in_openvino(network.int8, batch)
    assert rms(found, expected) < 0.03  # OpenVINO joins operators, and rounds less often
    assert np.mean(found.argmax(1) == expected.argmax(1)) > 0.9


def test_weights_are_stored_once(network: Int8) -> None:
    graph = onnx.load(network.int8).graph
    weights = [onnx.numpy_helper.to_array(i) for i in graph.initializer if len(i.dims) > 1]
    int8 = [w for w in weights if w.dtype == np.int8]
    wanted = [p for p in network.model.parameters() if p.dim() > 1]
    wanted = [p for p in wanted if p.shape[0] != len(SIZES)]  # but the tables of batch norms
    assert sum(w.size for w in int8) == sum(p.numel() for p in wanted)
    assert {w.dtype for w in weights if w.shape[0] != len(SIZES)} == {np.dtype(np.int8)}
    assert len({w.tobytes() for w in weights}) == len(weights)


def test_the_choice_of_tables_costs_few_operators(network: Int8) -> None:
    kinds = [node.op_type for node in onnx.load(network.int8).graph.node]
    assert kinds.count("Gather") == kinds.count("Split") <= 3
    assert kinds.count("ArgMin") == 1


def test_the_file_says_what_it_is(network: Int8) -> None:
    model = onnx.load(network.int8)
    (entry,) = model.metadata_props
    assert entry.key == METADATA_KEY
    assert Manifest.parse(entry.value, "metadata") == manifest(network.model)
    dims = [value.type.tensor_type.shape.dim for value in (*model.graph.input, *model.graph.output)]
    assert [d.dim_param or d.dim_value for d in dims[0]] == ["batch", 3, "size", "size"]
    assert [d.dim_param or d.dim_value for d in dims[1]] == ["batch", 10]


@pytest.mark.parametrize("sizes", [SIZES, (32,)], ids=["three", "one"])
def test_a_network_of_one_bank_is_quantised_too(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    shared = quantized(tmp_path, lifelike("residual", sizes, bn="shared"))
    for resolution in sizes:
        batch = images(64, resolution, seed=3)
        with torch.no_grad():
            expected = shared.model.at(resolution)(batch).numpy()
        found = logits(shared.int8, batch.numpy())
        assert rms(found, expected) < LARGEST_NOISE
        assert rms(in_openvino(shared.int8, batch.numpy()), found) < 0.03


def test_pixels_as_they_are_stored_are_normalised_in_float(tmp_path: Path) -> None:
    model = lifelike("residual", SIZES)
    model.input_mean, model.input_std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    fp32, int8 = tmp_path / "model.onnx", tmp_path / "model.int8.onnx"
    onnx.save(to_onnx(model, preprocess=True), fp32)

    def pixels(resolution: int, seed: int) -> np.ndarray:
        return (images(32, resolution, seed) * 50 + 128).clamp(0, 255).to(torch.uint8).numpy()

    stored = replace(manifest(model), input_dtype="uint8")
    quantize(fp32, int8, stored, lambda r: [pixels(r, seed) for seed in (1, 2)])
    for resolution in SIZES:
        batch = pixels(resolution, 3)
        found = logits(int8, batch)
        assert rms(found, logits(fp32, batch)) < LARGEST_NOISE
        assert rms(in_openvino(int8, batch), found) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2"])
def test_whole_networks_are_as_exact_as_a_file_of_one_resolution(tmp_path: Path, arch: str) -> None:
    sizes = (64, 48, 32)
    network = quantized(tmp_path, lifelike(arch, sizes))
    for resolution in sizes:
        batch = images(32, resolution, seed=3).numpy()
        alone = quantize_at(
            network.fp32, resolution, calibration(resolution)
        ).model.SerializeToString()
        exact = logits(network.fp32, batch)
        found, single = logits(network.int8, batch), logits(alone, batch)
        assert rms(found, exact) < 1.2 * rms(single, exact) + 0.001
        assert network.int8.stat().st_size < 1.3 * len(alone)
        assert rms(in_openvino(network.int8, batch), exact) < 1.2 * rms(single, exact) + 0.001
