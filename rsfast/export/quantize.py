"""From the fp32 graph to one int8 file for all resolutions.

The graph is pinned to one trained resolution after the other. Its batch norms become constants,
which ONNX Runtime folds into the convolutions, and its static quantiser makes an ordinary int8
graph of each: weights int8, per output channel and symmetric; activations uint8, with ranges that
calibration images span. `merge` makes one graph of them.

A convolution sums products of uint8 and int8. x86 CPUs without an instruction for that (VNNI)
saturate pairs of products at 16 bits, and lose accuracy.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsfast.deploy.manifest import METADATA_KEY, Manifest
from rsfast.deploy.reference import patterns
from rsfast.deploy.runtimes import library, save_optimized
from rsfast.export.graph import INPUT, OUTPUT, import_onnx
from rsfast.export.merge import Quantized, merge
from rsfast.files.seal import write_whole

__all__ = ["quantize", "quantize_at"]

_SPATIAL = 2  # dimensions of the input from here on are the image's height and width


def quantize(
    model_path: Path,
    output: Path,
    manifest: Manifest,
    batches: Callable[[int], Iterable[np.ndarray]],
) -> dict[int, np.ndarray]:
    """Writes the int8 file.

    Args:
        model_path: the fp32 graph, "images" [batch, 3, size, size] -> "logits" [batch, K].
        output: the file to write; its input and output are those of the fp32 graph.
        manifest: of the exported network; goes into the file's metadata.
        batches: calibration images of a resolution in pixels: arrays [N, 3, r, r] as the graph
            takes them. Only each activation's smallest and largest value is kept of them.

    Returns:
        `Reference.int8`: what the networks of the single resolutions say, which the file must
        agree with.

    Raises:
        ImportError: if onnx or onnxruntime is absent, or the latter too old.
        ValueError: if the graph differs between resolutions in more than the scale and shift of
            its batch norms.
    """
    onnx = import_onnx()
    parts = [quantize_at(model_path, r, batches(r)) for r in manifest.resolutions]
    by_bank = _by_bank(parts, manifest)
    model = merge(parts, manifest.resolutions)
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.text()})
    onnx.checker.check_model(model)
    write_whole(output, [model.SerializeToString()])
    return by_bank


def _by_bank(parts: Sequence[Quantized], manifest: Manifest) -> dict[int, np.ndarray]:
    """Trained resolution -> [R, K], the first pattern of that size in the network of each."""
    images = {r: patterns(r, manifest)[:1] for r in manifest.resolutions}
    found: dict[int, list[np.ndarray]] = {r: [] for r in images}
    for part in parts:
        for dim, name in zip(_dimensions(part.model)[_SPATIAL:], "hw", strict=True):
            dim.dim_param = name
        session = library("onnxruntime").InferenceSession(part.model.SerializeToString())
        for resolution, pattern in images.items():
            found[resolution] += session.run([OUTPUT], {INPUT: pattern})
    return {resolution: np.concatenate(logits) for resolution, logits in found.items()}


def _dimensions(model: Any) -> Any:
    """Of the input, [N, 3, H, W]."""
    return model.graph.input[0].type.tensor_type.shape.dim


def quantize_at(model_path: Path, resolution: int, images: Iterable[np.ndarray]) -> Quantized:
    """The int8 graph of one resolution, of any batch size.

    Args:
        model_path: as in :func:`quantize`.
        resolution: in pixels.
        images: calibration batches [N, 3, r, r].

    Raises:
        ImportError: if onnx or onnxruntime is absent, or the latter too old.
    """
    onnx = import_onnx()
    with tempfile.TemporaryDirectory(prefix="rsfast-int8-") as name:
        folded, quantized = Path(name, "folded.onnx"), Path(name, "quantized.onnx")
        model = _folded(onnx.load(model_path), resolution, folded)
        _averages_as_pools(model)
        onnx.save(model, folded)
        _quantize_static(model, folded, quantized, images)
        values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        model = onnx.load(quantized)
        _logits_in_float(model.graph)
        return Quantized(model, values)


def _folded(model: Any, resolution: int, path: Path) -> Any:
    """The graph at one resolution with all that is then constant computed.

    The batch stays open. Runtimes fold the shape of the input only if it is known as a whole, so
    the reads of its height and width are replaced by hand.
    """
    onnx = import_onnx()
    graph = model.graph
    for dim in _dimensions(model)[_SPATIAL:]:
        dim.dim_value = resolution
    for node in graph.node:
        if node.op_type != "Shape" or node.input[0] != graph.input[0].name:
            continue
        ends = {a.name: a.i for a in node.attribute}
        count = len(range(4)[ends.get("start", 0) : ends.get("end")])
        if ends.get("start", 0) >= _SPATIAL:
            value = onnx.numpy_helper.from_array(np.full(count, resolution, np.int64))
            constant = onnx.helper.make_node("Constant", [], node.output, node.name, value=value)
            node.CopyFrom(constant)
    del graph.value_info[:]
    whole = path.with_name("whole.onnx")
    onnx.save(model, whole)
    save_optimized(whole, None, path)
    return onnx.shape_inference.infer_shapes(onnx.load(path))


def _averages_as_pools(model: Any) -> None:
    """Makes means over an image's pixels global average pools, which the quantiser knows."""
    onnx = import_onnx()
    values = {i.name: i for i in model.graph.initializer}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in model.graph.value_info}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in values:
            continue
        axes = {int(axis) % 4 for axis in onnx.numpy_helper.to_array(values[node.input[1]])}
        if ranks.get(node.input[0]) != 4 or axes != {2, 3}:
            continue
        keeps = all(a.i == 1 for a in node.attribute if a.name == "keepdims")
        mean, out = node.output[0], node.output[0] if keeps else f"{node.output[0]}.4d"
        make = onnx.helper.make_node
        nodes[-1] = make("GlobalAveragePool", [node.input[0]], [out], node.name)
        if not keeps:
            nodes.append(make("Flatten", [out], [mean], f"{node.name}.flat", axis=1))
    nodes = [copy.deepcopy(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused(model.graph)


def _quantize_static(model: Any, path: Path, output: Path, images: Iterable[np.ndarray]) -> None:
    library("onnxruntime")
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, batches: Iterator[np.ndarray]) -> None:
            self.batches = batches

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends what was done already
    try:
        quantization.quantize_static(
            path,
            output,
            Reader(iter(images)),
            quant_format=quantization.QuantFormat.QOperator,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_to_keep_in_float(model),
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
    finally:
        logger.setLevel(level)


def _to_keep_in_float(model: Any) -> list[str]:
    """Names of nodes that the quantiser would make inexact.

    Those are products and sums with constants (a batch norm that stands before its convolution:
    one scale for all of its channels is too coarse), and activations whose argument is read by
    others, too: the quantiser drops an activation and relies on the range of what comes before.
    """
    constants = {i.name for i in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    return [
        node.name
        for node in model.graph.node
        if (node.op_type in ("Mul", "Add") and not constants.isdisjoint(node.input))
        or (node.op_type in ("Relu", "Clip") and readers[node.input[0]] > 1)
    ]


def _logits_in_float(graph: Any) -> None:
    """Lets a classifier return its sums as they are: in 256 steps classes would be equal."""
    makers = {node.output[0]: node for node in graph.node}
    last = makers[graph.output[0].name]
    if last.op_type == "DequantizeLinear" and makers[last.input[0]].op_type == "QGemm":
        gemm = makers[last.input[0]]
        del gemm.input[-2:]  # step and zero point of the output
        gemm.output[0] = last.output[0]
        graph.node.remove(last)
        _drop_unused(graph)


def _drop_unused(graph: Any) -> None:
    """ONNX Runtime warns of constants that nothing reads."""
    used = {name for node in graph.node for name in node.input}
    for value in [value for value in graph.initializer if value.name not in used]:
        graph.initializer.remove(value)
