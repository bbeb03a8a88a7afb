"""The runtimes that an exported file runs in, behind one function; nothing else imports them.

Runtimes fold the arithmetic of shapes, and with it the choice of batch norm, into constants only
if all dimensions of the input are known. A session is therefore either pinned to one batch and
size, or takes any.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from rsfast.deploy.versions import check_onnxruntime

__all__ = [
    "MODES",
    "PRECISIONS",
    "RUNTIMES",
    "Pin",
    "Session",
    "library",
    "open_session",
    "openvino_core",
    "refuse",
    "save_optimized",
]

RUNTIMES = {"onnxruntime": "export", "openvino": "openvino"}  # package, rsfast's extra
MODES = ("fast", "small")
PRECISIONS = ("fp32", "int8", "bf16")
_OPENVINO_TYPES = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}  # of what is not int8 already

Session = Callable[[np.ndarray], np.ndarray]  # images [N, 3, r, r] -> logits [N, K] float32


class Pin(NamedTuple):
    """The one shape [batch, 3, size, size] that a session takes."""

    batch: int
    size: int


def refuse(runtime: str, mode: str, precision: str) -> None:
    """Raises ValueError if there is no such combination."""
    for name, value, known in (
        ("runtime", runtime, tuple(RUNTIMES)),
        ("mode", mode, MODES),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if precision == "bf16" and runtime != "openvino":
        raise ValueError(f"precision bf16 needs runtime openvino, got {runtime}")
    if (runtime, precision, mode) == ("openvino", "int8", "small"):
        raise ValueError(
            "runtime openvino takes the int8 file only with all dimensions pinned: mode must be "
            "fast, got small"
        )


def library(runtime: str) -> ModuleType:
    """The package of a runtime.

    Raises:
        ImportError: if it is absent or too old, with the command that installs it.
    """
    try:
        package = importlib.import_module(runtime)
    except ImportError as error:
        raise ImportError(
            f"runtime {runtime} is not installed: pip install 'rsfast[{RUNTIMES[runtime]}]'"
        ) from error
    if runtime == "onnxruntime":
        check_onnxruntime(package.__version__)
    return package


def open_session(
    path: Path, runtime: str, pin: Pin | None, *, threads: int, precision: str
) -> Session:
    """Opens a file.

    Args:
        path: of the ONNX file, in that precision or, for "bf16", in fp32.
        runtime: a key of RUNTIMES.
        pin: the only shape to take; None for any.
        threads: to compute with.
        precision: of PRECISIONS.

    Returns:
        What computes logits; not to be called from several threads at once.

    Raises:
        ImportError: if the runtime is absent or too old.
        ValueError: if this CPU has no such arithmetic, or the file is damaged.
    """
    package = library(runtime)
    try:
        if runtime == "onnxruntime":
            return _open_onnxruntime(package, path, pin, threads)
        return _open_openvino(path, pin, threads, precision)
    except (ValueError, ImportError):
        raise
    except Exception as error:  # of the runtimes' C++ code and of protobuf
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot be opened by {runtime}: {reason}") from error


def _open_onnxruntime(package: ModuleType, path: Path, pin: Pin | None, threads: int) -> Session:
    options = package.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # Threads that wait by spinning take the cores from the session of the next size.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if pin is None:
        # Both keep memory for every shape that was seen: of a ResNet-18 that had run at 23 sizes
        # 94 MiB instead of 47, for no time at batch 1 and 3 to 8 % at batch 8 (one thread of an
        # EPYC, November 2026).
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = False
    else:
        for name, value in pin._asdict().items():
            options.add_free_dimension_override_by_name(name, value)
    session = package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _open_openvino(path: Path, pin: Pin | None, threads: int, precision: str) -> Session:
    core = openvino_core()
    if precision == "bf16":
        found = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in found:
            raise ValueError(
                f"precision bf16 needs a CPU that computes in it, OpenVINO finds {found} here"
            )
    if precision == "int8":
        assert pin is not None
        from rsfast.deploy.qdq import pinned_qdq  # needs another package, which fp32 does without

        model = core.read_model(pinned_qdq(path, pin.batch, pin.size))
    else:
        model = core.read_model(path)
    if pin is not None:
        model.reshape([pin.batch, 3, pin.size, pin.size])
    settings = {
        "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # By default on Linux threads, also the caller's, are bound to the first cores, and with
        # them those of every other process that does so.
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(model, "CPU", settings)
    return lambda images: compiled(images)[0]


@functools.cache
def openvino_core() -> Any:
    """The one Core of this process, which is never freed.

    Loading its CPU plugin gives the thread a signal stack, which the plugin takes away with it:
    of two plugins the second puts back what was the first one's, and the next signal that Python
    handles, if only that of a child that ends, kills the process (OpenVINO 2026.4.1).
    """
    return library("openvino").Core()


def save_optimized(path: Path, pin: Pin | None, output: Path) -> None:
    """Writes an ONNX file as ONNX Runtime simplifies it, with standard operators.

    Args:
        path: of the file.
        pin: the one shape to simplify it for; None for those that its input has.
        output: the file to write, with its weights inside.

    Raises:
        ImportError: if the runtime is absent or too old.
    """
    package = library("onnxruntime")
    options = package.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = package.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(output)
    for name, value in (pin._asdict() if pin else {}).items():
        options.add_free_dimension_override_by_name(name, value)
    package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
