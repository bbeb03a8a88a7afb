"""What runtimes are known to do with such graphs, and what the exported ones must therefore be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import rsfast
from deploy_helpers import pixels, small_network, unlike_banks
from int8_helpers import quantized
from lifelike import lifelike
from rsfast.export.graph import to_onnx
from rsfast.export.structure import loose_nodes


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return to_onnx(small_network())


def simplified(graph: onnx.ModelProto, folder: Path, **pins: int) -> onnx.GraphProto:
    """What ONNX Runtime makes of it where these dimensions are known."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "simplified.onnx")
    for name, value in pins.items():
        options.add_free_dimension_override_by_name(name, value)
    onnxruntime.InferenceSession(graph.SerializeToString(), options)
    return onnx.load(folder / "simplified.onnx").graph


def test_the_choice_of_a_bank_has_no_abs(graph: onnx.ModelProto) -> None:
    """OpenVINO leaves it out where it is of a vector that follows from a shape."""
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert not kinds["Abs"]
    assert kinds["Min"]
    assert kinds["Clip"]


def test_weights_in_channels_last_leave_nothing_in_the_graph(graph: onnx.ModelProto) -> None:
    """The exporter writes such strides as operators that gather elements one by one."""
    model = small_network()
    for param in model.parameters():
        if param.dim() == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    assert any(not param.is_contiguous() for param in model.parameters())
    found = to_onnx(model)
    assert [n.op_type for n in found.graph.node] == [n.op_type for n in graph.graph.node]
    own = {entry.name: entry.raw_data for entry in graph.graph.initializer}
    assert {entry.name: entry.raw_data for entry in found.graph.initializer} == own


def test_the_graph_is_of_the_oldest_opset_that_the_exporter_writes(graph: onnx.ModelProto) -> None:
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]


def test_the_batch_is_not_fixed_by_the_export(graph: onnx.ModelProto) -> None:
    """A graph that is traced with one image takes one for ever."""
    shapes = [value.type.tensor_type.shape for value in (*graph.graph.input, *graph.graph.output)]
    assert [shape.dim[0].dim_param for shape in shapes] == ["batch", "batch"]
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    images = pixels(5, 48)
    (all_at_once,) = session.run(["logits"], {"images": images})
    for n, image in enumerate(images):
        (alone,) = session.run(["logits"], {"images": image[None]})
        np.testing.assert_allclose(alone[0], all_at_once[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pins", [{}, {"size": 48}, {"batch": 1}], ids=str)
def test_shapes_are_folded_only_if_the_batch_is_known_too(
    pins: dict[str, int], graph: onnx.ModelProto, tmp_path: Path
) -> None:
    """Why `fast` has a session for each batch size; where this fails it need not have."""
    assert "Shape" in loose_nodes(simplified(graph, tmp_path, **pins))
    assert not loose_nodes(simplified(graph, tmp_path, batch=1, size=48))


def test_no_gamma_of_zero_divides(tmp_path: Path) -> None:
    """The scale of a batch norm may be 0, and its variance next to it."""
    model = unlike_banks(rsfast.create_model("tiny:network", (64, 32), num_classes=5))
    with torch.no_grad():
        for norm in model.batch_norms():
            norm.weight[:, ::2] = 0.0
            norm.running_var[:, 1::4] = 0.0
    session = onnxruntime.InferenceSession(to_onnx(model).SerializeToString())
    for size in (64, 48, 32):
        images = pixels(2, size)
        (logits,) = session.run(["logits"], {"images": images})
        with torch.no_grad():
            wanted = model.at(size)(torch.from_numpy(images)).numpy()
        assert np.abs(logits - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_biases_of_int8_are_constants_where_the_shape_is_pinned(tmp_path: Path) -> None:
    """ONNX Runtime lays out the weights of a convolution for its fastest kernel only then."""
    int8 = onnx.load(quantized(tmp_path, lifelike("residual", (48, 32, 24))).int8)

    def constant(graph: onnx.GraphProto) -> set[bool]:
        names = {entry.name for entry in graph.initializer}
        convolutions = [node for node in graph.node if node.op_type == "QLinearConv"]
        return {node.input[8] in names for node in convolutions}

    assert constant(simplified(int8, tmp_path)) == {False}
    for size in (48, 32, 24):
        assert constant(simplified(int8, tmp_path, batch=1, size=size)) == {True}
