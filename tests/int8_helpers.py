"""What tests of the int8 file share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest

from lifelike import calibration, manifest
from rsfast.deploy.qdq import pinned_qdq
from rsfast.deploy.runtimes import openvino_core
from rsfast.export.graph import to_onnx
from rsfast.export.quantize import quantize
from rsfast.models import RSNet

__all__ = ["SIZES", "Int8", "in_openvino", "logits", "quantized", "rms"]

SIZES = (48, 32, 24)


class Int8(NamedTuple):
    """A network with its float32 and its int8 file."""

    model: RSNet
    fp32: Path
    int8: Path


def quantized(folder: Path, model: RSNet) -> Int8:
    fp32, int8 = folder / "model.onnx", folder / "model.int8.onnx"
    onnx.save(to_onnx(model), fp32)
    quantize(fp32, int8, manifest(model), calibration)
    return Int8(model, fp32, int8)


def rms(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the difference, relative to what is wanted."""
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def logits(model: Path | bytes, images: np.ndarray, **dims: int) -> np.ndarray:
    """In ONNX Runtime, in a session pinned to `dims`, of "batch" and "size"."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for name, length in dims.items():
        options.add_free_dimension_override_by_name(name, length)
    source = str(model) if isinstance(model, Path) else model
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def in_openvino(path: Path, images: np.ndarray) -> np.ndarray:
    """In OpenVINO, pinned to the shape of the images."""
    pytest.importorskip("openvino", reason="needs OpenVINO")
    core = openvino_core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = core.read_model(pinned_qdq(path, len(images), images.shape[-1]))
    return core.compile_model(model, "CPU", settings)(images)[0]
