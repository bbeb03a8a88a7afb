"""The int8 file for OpenVINO, which takes neither its operators nor steps computed at run time.

The row of one size is looked up here, and every integer operator becomes the float one between
DequantizeLinear and QuantizeLinear, the form that OpenVINO turns into its own integer kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["INDEX", "RESOLUTIONS", "pinned_qdq"]

# Names in the int8 file: the chosen row of its tables, and the trained resolutions.
INDEX, RESOLUTIONS = "rsfast.index", "rsfast.resolutions"

# Of x, its step and zero point: the operator, and which attributes it takes over.
_UNARY = {
    "QLinearGlobalAveragePool": ("GlobalAveragePool", ()),
    "QLinearLeakyRelu": ("LeakyRelu", ("alpha",)),
    "QLinearSigmoid": ("Sigmoid", ()),
    "QLinearSoftmax": ("Softmax", ("axis",)),
    "QLinearAveragePool": (
        "AveragePool",
        ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides"),
    ),
}
_BINARY = {"QLinearAdd": "Add", "QLinearMul": "Mul"}
# What they return is on the grid of what they take.
_DIRECT = ("Flatten", "MaxPool", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze")


def pinned_qdq(path: Path, batch: int, size: int) -> bytes:
    """The int8 file for one input shape.

    Args:
        path: of the int8 file.
        batch: N.
        size: r, in pixels.

    Returns:
        A serialised ONNX model, "images" [N, 3, r, r] -> "logits" [N, K].

    Raises:
        ImportError: if onnx is absent.
        ValueError: if an operator of the file has no float form here.
    """
    onnx = _onnx()
    model = onnx.load(path)
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    if RESOLUTIONS in values:
        values[INDEX] = np.argmin(np.square(values[RESOLUTIONS] - size))
    nodes = list(_Rewriter(values).run(_without_tables(model.graph.node, values)))
    used = {name for node in nodes for name in node.input}
    graph = onnx.helper.make_graph(
        nodes,
        model.graph.name,
        model.graph.input,
        model.graph.output,
        [onnx.numpy_helper.from_array(a, name) for name, a in values.items() if name in used],
    )
    for dim, length in zip(
        graph.input[0].type.tensor_type.shape.dim, (batch, 3, size, size), strict=True
    ):
        dim.dim_value = length
    graph.output[0].type.tensor_type.shape.dim[0].dim_value = batch
    opsets = [opset for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    pinned = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    return pinned.SerializeToString()


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "the int8 file in OpenVINO needs onnx: pip install 'rsfast[export]'"
        ) from error
    return onnx


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: _onnx().helper.get_attribute_value(a) for a in node.attribute}


def _without_tables(nodes: Sequence[Any], values: dict[str, np.ndarray]) -> list[Any]:
    """Nodes but those that choose rows of tables; the rows are put to `values`."""
    left = []
    for node in nodes:
        if INDEX in node.output or any(name.startswith("rsfast.away") for name in node.output):
            continue
        if node.op_type == "Shape" and list(node.output) == ["rsfast.height"]:
            continue
        if not all(name in values for name in node.input):
            left.append(node)
        elif node.op_type == "Gather":
            values[node.output[0]] = values[node.input[0]][values[INDEX]]
        elif node.op_type == "Split":
            ends = np.cumsum(values[node.input[1]])[:-1]
            values |= zip(node.output, np.split(values[node.input[0]], ends), strict=True)
        elif node.op_type in ("Squeeze", "Reshape"):
            shape = values[node.input[1]] if len(node.input) > 1 else ()
            values[node.output[0]] = values[node.input[0]].reshape(shape)
        else:
            left.append(node)
    return left


class _Rewriter:
    """Integer operators as float ones.

    Attributes:
        values: the graph's constants; grows.
        floats: names of uint8 values with the name of their float form.
        readers: names of values with the types of the operators that read them.
    """

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values
        self.floats: dict[str, str] = {}
        self.readers: defaultdict[str, set[str]] = defaultdict(set)
        self.make = _onnx().helper.make_node

    def run(self, nodes: Sequence[Any]) -> Iterator[Any]:
        special: dict[str, Callable[[Any], Iterator[Any]]] = {
            "QuantizeLinear": self._quantize,
            "DequantizeLinear": self._dequantize,
            "QLinearConv": self._conv,
            "QGemm": self._gemm,
            "QLinearConcat": self._concat,
        }
        for node in nodes:
            for name in node.input:
                self.readers[name].add(node.op_type)
        for node in nodes:
            kind = node.op_type
            if kind in special:
                yield from special[kind](node)
            elif kind in _UNARY:
                op, taken = _UNARY[kind]
                kept = {k: v for k, v in _attributes(node).items() if k in taken}
                yield from self._op(node, op, [self._float(node.input[0])], node.input[3:], **kept)
            elif kind in _BINARY:
                inputs = [self._float(node.input[0]), self._float(node.input[3])]
                yield from self._op(node, _BINARY[kind], inputs, node.input[6:])
            elif not any(name in self.floats for name in node.input):
                yield node  # of floats already
            elif kind in _DIRECT:
                yield self._direct(node)
            else:
                raise ValueError(f"operator {kind} ({node.name}) of int8 has no form for OpenVINO")

    def _float(self, name: str) -> str:
        return self.floats[name]

    def _scalar(self, name: str) -> str:
        self.values[name] = self.values[name].reshape(())
        return name

    def _op(
        self, node: Any, kind: str, inputs: Sequence[str], grid: Sequence[str], **attributes: Any
    ) -> Iterator[Any]:
        """A float operator, its result rounded to a grid (step, zero point) if there is one."""
        out = node.output[0]
        if not grid:
            yield self.make(kind, inputs, [out], node.name, **attributes)
            return
        yield self.make(kind, inputs, [f"{out}.exact"], node.name, **attributes)
        yield from self._round(f"{out}.exact", out, grid)

    def _round(self, exact: str, out: str, grid: Sequence[str]) -> Iterator[Any]:
        step, zero = self._scalar(grid[0]), self._scalar(grid[1])
        self.floats[out] = f"{out}.float"
        yield self.make("QuantizeLinear", [exact, step, zero], [out], f"{out}.quantize")
        yield self.make("DequantizeLinear", [out, step, zero], [self.floats[out]], f"{out}.back")

    def _quantize(self, node: Any) -> Iterator[Any]:
        yield from self._round(node.input[0], node.output[0], node.input[1:])

    def _dequantize(self, node: Any) -> Iterator[Any]:
        yield self.make("Identity", [self._float(node.input[0])], node.output, node.name)

    def _direct(self, node: Any) -> Any:
        inputs = [self.floats.get(name, name) for name in node.input]
        outputs = [f"{name}.float" for name in node.output]
        self.floats |= zip(node.output, outputs, strict=True)
        return self.make(node.op_type, inputs, outputs, node.name, **_attributes(node))

    def _weights(self, node: Any, axis: int, bias: str | None) -> Iterator[Any | list[str]]:
        """The weights' node; then the inputs of the float operator."""
        weight, step = (self.values[node.input[k]] for k in (3, 4))
        step = np.broadcast_to(step.reshape(-1), weight.shape[axis])
        shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
        # Steps are negative where a batch norm changed the sign of its channel; int8 here is in
        # [-127, 127].
        signs = np.where(step < 0, -1, 1).astype(np.int8)
        name = f"{node.output[0]}.weight"
        self.values[f"{name}.int8"] = weight * signs.reshape(shape)
        self.values[f"{name}.step"] = np.abs(step)
        quantized = [f"{name}.int8", f"{name}.step"]
        yield self.make("DequantizeLinear", quantized, [name], f"{name}.back", axis=axis)
        inputs = [self._float(node.input[0]), name]
        if bias:
            whole = self.values[bias].astype(np.float64)
            exact = whole * self.values[node.input[1]].reshape(()) * step
            self.values[f"{name}.bias"] = exact.astype(np.float32)
            inputs.append(f"{name}.bias")
        yield inputs

    def _conv(self, node: Any) -> Iterator[Any]:
        bias = node.input[8] if len(node.input) > 8 else None
        weight, inputs = self._weights(node, 0, bias)
        yield weight
        yield from self._op(node, "Conv", inputs, node.input[6:8], **_attributes(node))

    def _gemm(self, node: Any) -> Iterator[Any]:
        attributes = _attributes(node)
        weight, inputs = self._weights(node, 0 if attributes.get("transB") else 1, node.input[6])
        yield weight
        yield from self._op(node, "Gemm", inputs, node.input[7:], **attributes)

    def _concat(self, node: Any) -> Iterator[Any]:
        out, axis = node.output[0], _attributes(node)["axis"]
        inputs = [self._float(name) for name in node.input[2::3]]
        if self.readers[out] == {"DequantizeLinear"}:
            # Nothing needs one grid then, and OpenVINO 2026.4 crashes where a float batch norm
            # reads a concatenation that is rounded.
            self.floats[out] = f"{out}.exact"
            yield self.make("Concat", inputs, [self.floats[out]], node.name, axis=axis)
        else:
            yield from self._op(node, "Concat", inputs, node.input[:2], axis=axis)
