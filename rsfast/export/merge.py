"""Int8 graphs of one network at several resolutions made one graph, weights stored once.

At resolution r the weights of output channel c are W_c * s_rc, the scale of the batch norm folded
into them. Symmetric int8 weights of a channel are therefore the same at every r but for the sign
of s_rc: int8 of the r with the largest |s_rc| are kept, and its quantisation step times
s_rc / max |s_rc| is the step at r, which may be 0 or negative.

All that still differs (steps, zero points, biases, batch norms that are not folded) is one table
[R, T] per type. The height of the input chooses the row, that of the nearest trained resolution,
the larger of two as near; one Gather and one Split per type hand it to the operators.

A session for any size is slower than one that is pinned, because ONNX Runtime packs the weights of
a convolution for its fastest kernel only if its bias is constant: by 14 % (ResNet-18, all sizes)
and 15 to 26 % (ResNet-50, 224 to 96 pixels) on one AVX-512 core, November 2026, ONNX Runtime 1.32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rsfast.deploy.qdq import INDEX, RESOLUTIONS
from rsfast.export.graph import INPUT, import_onnx

__all__ = ["Quantized", "merge"]

_SUFFIX = "_quantized"  # that ONNX Runtime gives what it quantised
_STACKED = ("float32", "uint8", "int32")
_LARGEST_BIAS = 2.0**30  # half of int32's range, the other half is for the sum of products
_SMALLEST_RATIO = 2.0**-24  # of a channel's steps: next to it, a channel adds nothing that counts


class Quantized(NamedTuple):
    """The int8 graph of one resolution.

    Attributes:
        model: an `onnx.ModelProto` in ONNX Runtime's QOperator format.
        weights: what was quantised, by name: float32 weights and biases.
    """

    model: Any
    weights: dict[str, np.ndarray]


class _Kind(NamedTuple):
    """Where an operator has its weights: positions of inputs; others follow from it."""

    x_scale: int
    weight: int
    scale: int
    bias: int


_KINDS = {"QLinearConv": _Kind(1, 3, 4, 8), "QGemm": _Kind(1, 3, 4, 6)}


def merge(parts: Sequence[Quantized], resolutions: Sequence[int]) -> Any:
    """One graph that computes what each of the parts does at its own resolution.

    Args:
        parts: of one network, one per resolution.
        resolutions: in pixels, descending.

    Returns:
        The first part's model, changed in place: input "images" [batch, 3, size, size], output
        "logits" [batch, K].

    Raises:
        ValueError: if the graphs have different operators, or weights that differ in more than
            a factor per output channel.
    """
    return _Merge(parts, resolutions).run()


class _Merge:
    """The graph in the making.

    Attributes:
        kept: values that all resolutions share, by name in the merged graph.
        tables: by type, names of values with what each is at every resolution, [R, ...].
        shapes: the names of those that operators want in another shape than [T], with the shape.
    """

    def __init__(self, parts: Sequence[Quantized], resolutions: Sequence[int]) -> None:
        self.onnx = import_onnx()
        self.parts, self.resolutions = parts, resolutions
        self.graphs = [part.model.graph for part in parts]
        to_array = self.onnx.numpy_helper.to_array
        self.values = [{i.name: to_array(i) for i in graph.initializer} for graph in self.graphs]
        self.kept: dict[str, np.ndarray] = {}
        self.tables: dict[str, dict[str, np.ndarray]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.names: dict[tuple[str, ...], str] = {}
        self.shared: dict[tuple[str, ...], tuple[str, np.ndarray]] = {}

    def run(self) -> Any:
        _check_same(self.graphs, self.values, self.resolutions)
        for nodes in zip(*(graph.node for graph in self.graphs), strict=True):
            done = self._weighted(nodes) if nodes[0].op_type in _KINDS else {}
            for position, name in enumerate(nodes[0].input):
                if position in done:
                    nodes[0].input[position] = done[position]
                elif name in self.values[0]:
                    names = [node.input[position] for node in nodes]
                    name = self._value(names)
                    nodes[0].input[position] = name
                    # Standard operators take [1] as a scalar, those of ONNX Runtime's own do not.
                    if self.values[0][names[0]].ndim > 1 or nodes[0].domain:
                        self.shapes[name] = self.values[0][names[0]].shape
        return self._model()

    def _weighted(self, nodes: Sequence[Any]) -> dict[int, str]:
        """Weights, their steps and the bias of an operator: positions and merged names."""
        kind = _KINDS[nodes[0].op_type]
        axis = 0
        if nodes[0].op_type == "QGemm":
            axis = 0 if any(a.name == "transB" and a.i for a in nodes[0].attribute) else 1
        sources = tuple(node.input[kind.weight] for node in nodes)
        if sources not in self.shared:
            self.shared[sources] = self._share(nodes, kind, axis)
        weight, steps = self.shared[sources]  # steps [R, C]
        done = {kind.weight: weight}
        floor = np.abs(steps).max(0, keepdims=True) * _SMALLEST_RATIO
        floor = np.broadcast_to(floor, steps.shape)
        has_bias = len(nodes[0].input) > kind.bias and nodes[0].input[kind.bias] != ""
        if has_bias:
            bias = self._floats(nodes, kind.bias)  # [R, C]
            x_steps = self._all(nodes, kind.x_scale).reshape(-1, 1).astype(np.float64)
            floor = np.maximum(floor, np.abs(bias) / (x_steps * _LARGEST_BIAS))
        steps = np.where(np.abs(steps) < floor, np.copysign(floor, steps), steps)
        steps[steps == 0] = 1  # neither weights nor bias, at any resolution
        steps = steps.astype(np.float32)
        name = nodes[0].name or nodes[0].output[0]
        done[kind.scale] = self._put(f"{name}.scale", steps)
        if has_bias:
            whole = np.rint(bias / (x_steps * steps)).astype(np.int32)
            done[kind.bias] = self._put(f"{name}.bias", whole)
        return done

    def _share(self, nodes: Sequence[Any], kind: _Kind, axis: int) -> tuple[str, np.ndarray]:
        """Stores int8 weights once; returns their name and the steps [R, C]."""
        whole = np.moveaxis(self._all(nodes, kind.weight), axis + 1, 1)  # [R, C, ...] int8
        rows = whole.reshape(*whole.shape[:2], -1).astype(np.int32)
        exact = np.moveaxis(self._floats(nodes, kind.weight), axis + 1, 1).reshape(rows.shape)
        peaks = np.abs(exact).max(2)  # [R, C]
        largest = peaks.argmax(0)
        channels = np.arange(len(largest))
        base = rows[largest, channels]  # [C, ...]
        steps = self._all(nodes, kind.scale).astype(np.float64)  # [R, C]
        signs = np.where((rows * base).sum(2) < 0, -1, 1)
        # The quantiser widens steps where a bias would overflow; those rows need not be equal.
        plain = np.isclose(steps * 127, peaks, rtol=1e-3, atol=0)
        if np.any(np.abs(rows - signs[..., None] * base)[plain] > 1):
            raise ValueError(
                f"the weights of {nodes[0].name} must be the same at {tuple(self.resolutions)} "
                "pixels but for a factor per output channel"
            )
        ratios = peaks / np.where(peaks[largest, channels] == 0, 1, peaks[largest, channels])
        weight = np.moveaxis(base.astype(np.int8).reshape(whole.shape[1:]), 0, axis)
        name = self._put(nodes[0].input[kind.weight], np.stack([weight] * len(nodes)))
        return name, signs * ratios * steps[largest, channels]

    def _floats(self, nodes: Sequence[Any], position: int) -> np.ndarray:
        """What an int8 or int32 input of an operator was quantised from, [R, ...] float64."""
        names = [node.input[position].removesuffix(_SUFFIX) for node in nodes]
        pairs = zip(self.parts, names, strict=True)
        return np.stack([part.weights[name].astype(np.float64) for part, name in pairs])

    def _all(self, nodes: Sequence[Any], position: int) -> np.ndarray:
        """An input of an operator at every resolution, [R, ...]."""
        pairs = zip(self.values, nodes, strict=True)
        return np.stack([values[node.input[position]] for values, node in pairs])

    def _value(self, names: Sequence[str]) -> str:
        """A constant input: stored once if it is equal everywhere, else in a table."""
        key = tuple(names)
        if key not in self.names:
            arrays = [v[name] for v, name in zip(self.values, names, strict=True)]
            if len({(a.shape, a.dtype) for a in arrays}) > 1:
                shapes = [a.shape for a in arrays]
                raise ValueError(
                    f"{names[0]} must have one shape at {tuple(self.resolutions)} pixels, "
                    f"got {shapes}"
                )
            self.names[key] = self._put(names[0], np.stack(arrays))
        return self.names[key]

    def _put(self, name: str, values: np.ndarray) -> str:
        """Stores [R, ...]; returns the name of the row that the graph reads."""
        while name in self.kept or any(name in table for table in self.tables.values()):
            name += "_"
        if (values == values[:1]).all():
            self.kept[name] = values[0]
        elif values.dtype.name in _STACKED:
            self.tables.setdefault(values.dtype.name, {})[name] = values
        else:
            raise ValueError(
                f"{name} ({values.dtype}) must be the same at {tuple(self.resolutions)} pixels"
            )
        return name

    def _model(self) -> Any:
        """The first part's model with the merged values."""
        onnx, graph = self.onnx, self.graphs[0]
        head = self._choice() if self.tables else []
        for dtype, table in self.tables.items():
            head += self._row(dtype, table)
        nodes = [*head, *graph.node]
        values = [onnx.numpy_helper.from_array(array, name) for name, array in self.kept.items()]
        for field in (graph.node, graph.initializer, graph.value_info):
            del field[:]
        graph.node.extend(nodes)
        graph.initializer.extend(values)
        for dim in graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_param = "size"
        for value in (*graph.input, *graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        return self.parts[0].model

    def _choice(self) -> list[Any]:
        """The index of the trained resolution nearest to the input's height, a scalar."""
        make = self.onnx.helper.make_node
        self.kept[RESOLUTIONS] = np.array(self.resolutions, np.int64)
        return [
            make("Shape", [INPUT], ["rsfast.height"], start=2, end=3),
            make("Sub", [RESOLUTIONS, "rsfast.height"], ["rsfast.away"]),
            make("Mul", ["rsfast.away", "rsfast.away"], ["rsfast.away2"]),
            # The first of equals, and resolutions descend: the larger one.
            make("ArgMin", ["rsfast.away2"], [INDEX], axis=0, keepdims=0),
        ]

    def _row(self, dtype: str, table: dict[str, np.ndarray]) -> list[Any]:
        """Hands the chosen row of a table to the operators."""
        make = self.onnx.helper.make_node
        prefix = f"rsfast.{dtype}"
        columns = [values.reshape(len(values), -1) for values in table.values()]
        self.kept[f"{prefix}.table"] = np.concatenate(columns, axis=1)
        self.kept[f"{prefix}.widths"] = np.array([c.shape[1] for c in columns], np.int64)
        parts, shaped = [], []
        for name in table:
            shape = self.shapes.get(name)
            parts.append(name if shape is None else f"{name}.flat")
            if shape == ():
                shaped.append(make("Squeeze", parts[-1:], [name]))
            elif shape is not None:
                self.kept[f"{name}.shape"] = np.array(shape, np.int64)
                shaped.append(make("Reshape", [parts[-1], f"{name}.shape"], [name]))
        return [
            make("Gather", [f"{prefix}.table", INDEX], [f"{prefix}.row"], axis=0),
            make("Split", [f"{prefix}.row", f"{prefix}.widths"], parts, axis=0),
            *shaped,
        ]


def _check_same(
    graphs: Sequence[Any], values: Sequence[dict[str, np.ndarray]], resolutions: Sequence[int]
) -> None:
    """Raises ValueError unless all graphs are the same but for constants and names."""
    first, *others = (_structure(g, v) for g, v in zip(graphs, values, strict=True))
    for other, resolution in zip(others, resolutions[1:], strict=True):
        if other != first:
            differs = next((a for a, b in zip(first, other, strict=False) if a != b), first[-1])
            raise ValueError(
                f"the int8 graphs of {resolutions[0]} and {resolution} pixels must have the same "
                f"operators, differ at {differs[0]}"
            )


def _structure(graph: Any, values: dict[str, np.ndarray]) -> list[tuple[Any, ...]]:
    """Per operator: type, attributes, and where its inputs come from."""
    places: dict[str, Any] = dict.fromkeys(values, "constant")
    places |= {"": None} | {value.name: value.name for value in graph.input}
    rows: list[tuple[Any, ...]] = []
    for index, node in enumerate(graph.node):
        places |= {name: (index, k) for k, name in enumerate(node.output)}
        attributes = sorted(a.SerializeToString() for a in node.attribute)
        sources = tuple(places[name] for name in node.input)
        rows.append((node.op_type, node.domain, attributes, sources))
    return rows
