"""Where and how the tests of the Triton kernels run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = [
    "CPU_OR_GPU",
    "GPU_ONLY",
    "PLACES",
    "assert_close",
    "capture_without_host_sync",
    "gpu",
    "host_must_not_wait",
    "max_error",
    "on_another_stream",
    "run_python",
    "skip_unless_it_runs_on",
    "to_float64",
]

gpu = pytest.mark.gpu
# For the fixtures `place` and `device` of tests/conftest.py.
PLACES = [
    pytest.param(("cpu", torch.float32), id="cpu-float32"),
    pytest.param(("cpu", torch.float16), id="cpu-float16"),
    # The interpreter truncates bfloat16 stores: on a GPU only.
    pytest.param(("cuda", torch.float32), id="cuda-float32", marks=gpu),
    pytest.param(("cuda", torch.float16), id="cuda-float16", marks=gpu),
    pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=gpu),
]
GPU_ONLY = [pytest.param("cuda", marks=gpu)]
CPU_OR_GPU = ["cpu", *GPU_ONLY]


def skip_unless_it_runs_on(device: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off where a CUDA device is there")


def max_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()


def to_float64(tensors: dict[str, Any]) -> dict[str, Any]:
    """Those with a point; None stays None."""
    return {
        name: t.double() if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }


def assert_close(
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    operands: dict[str, float] | None = None,
) -> None:
    """Each at most twice as far off as PyTorch in the same type, plus one rounding.

    `operands` are the sizes of what float32 sums up, rounding it once.
    """
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        assert ours[name].dtype == eager[name].dtype, name
        step = torch.finfo(ours[name].dtype).eps * want.abs().max().item()
        step += torch.finfo(torch.float32).eps * (operands or {}).get(name, 0.0)
        assert max_error(ours[name], want) <= 2 * max_error(eager[name], want) + step, name


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def on_another_stream(function: Callable[[], Any]) -> Any:
    """The result of `function` on a stream of its own, once it is there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function()
    stream.synchronize()
    return result


@contextlib.contextmanager
def host_must_not_wait() -> Iterator[None]:
    """Makes every synchronisation of the host with the device an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture_without_host_sync(function: Callable[[], Any]) -> Any:
    """The result of `function` from a CUDA graph, after a run in which the host must not wait."""
    on_another_stream(function)  # compiles
    with host_must_not_wait():
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    graph.replay()
    torch.cuda.synchronize()
    return captured
