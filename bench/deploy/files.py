"""The files that compete: one for all resolutions, one for each, and a matrix product."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.deploy.implementations import MATMUL_FILE, MATMUL_SIZE, separate_file
from rsfast.deploy.manifest import INT8_FILE, Manifest
from rsfast.deploy.reference import BATCH, patterns
from rsfast.export import graph, images, package
from rsfast.export.quantize import quantize, quantize_at
from rsfast.models import RSNet

__all__ = ["export_all"]

_CALIBRATION = 512  # images, as of rsfast.export


def export_all(model: RSNet, checkpoint: Path, data: Path | None, folder: Path) -> Manifest:
    """Writes everything that is loaded later.

    Args:
        model: in eval mode.
        checkpoint: that it is from.
        data: folder with train/, which int8 is calibrated on; without it, smooth patterns are,
            which cost the same time and make a network of unknown accuracy.
        folder: to fill.
    """
    manifest = package.describe(model, checkpoint)
    count, batches = _calibration(data, manifest)
    manifest = replace(manifest, calibration_images=count)
    manifest.write(folder)
    onnx = graph.import_onnx()
    path = package.write_graph(graph.to_onnx(model), manifest, folder)
    quantize(path, folder / INT8_FILE, manifest, batches)
    for resolution in manifest.resolutions:
        alone = separate_file(folder, "fp32", resolution)
        _export_alone(model, resolution, alone)
        quantized = quantize_at(path, resolution, batches(resolution))
        onnx.save(quantized.model, separate_file(folder, "int8", resolution))
    _write_matmul(folder / MATMUL_FILE)
    return manifest


def _calibration(
    data: Path | None, manifest: Manifest
) -> tuple[int, Callable[[int], Iterable[np.ndarray]]]:
    if data is None:
        return BATCH, lambda size: [patterns(size, manifest)]
    return images.calibration(data, manifest, _CALIBRATION)


def _export_alone(model: RSNet, resolution: int, path: Path) -> None:
    """As anyone would export a network of one resolution: all dimensions fixed, weights inside."""
    net = model.at(resolution)
    for param in net.parameters():
        param.data = param.data.contiguous()  # the exporter writes other strides as operators
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            net,
            (torch.zeros(1, 3, resolution, resolution),),
            path,
            input_names=[graph.INPUT],
            output_names=[graph.OUTPUT],
            opset_version=graph.OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _write_matmul(path: Path) -> None:
    """uint8 times int8, as int8 convolutions are."""
    onnx = graph.import_onnx()
    make, kinds = onnx.helper, onnx.TensorProto
    square = [MATMUL_SIZE, MATMUL_SIZE]
    weight = np.random.default_rng(0).integers(-127, 128, square, dtype=np.int8)
    body = make.make_graph(
        [make.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "matmul",
        [make.make_tensor_value_info("a", kinds.UINT8, square)],
        [make.make_tensor_value_info("c", kinds.INT32, square)],
        [onnx.numpy_helper.from_array(weight, "b")],
    )
    opsets = [make.make_opsetid("", graph.OPSET)]
    onnx.save(make.make_model(body, opset_imports=opsets, ir_version=10), path)
