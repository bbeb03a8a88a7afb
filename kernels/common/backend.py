"""Which implementation of an operation runs, and how it is loaded."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

__all__ = [
    "BACKENDS",
    "check_backend",
    "choose_backend",
    "load_extension",
    "load_kernels",
]

BACKENDS = ("torch", "triton", "cuda")
_OLDEST_TRITON = (3, 6)


def choose_backend(choice: str, device: torch.device) -> str:
    """The backend of a run: `choice`, or for "auto" Triton on a GPU and PyTorch elsewhere.

    "cuda" is Triton with training batch norm in CUDA C++.

    Raises:
        ValueError: if the choice is neither "auto" nor a backend, or cannot run there.
        ImportError: if Triton, or the extension, is chosen and absent.
    """
    if choice == "auto":
        choice = "triton" if device.type == "cuda" else "torch"
    if check_backend(choice) != "torch":
        missing = load_kernels("common.launch").missing_on(device)
        if missing:
            raise ValueError(f"kernels {choice} needs {missing}: choose torch")
    if choice == "cuda":
        load_extension()
    return choice


def check_backend(backend: str, *, extension: bool = False) -> str:
    """The backend that computes where `backend` is asked for.

    "cuda" is "triton", except for an operation that is in the extension.

    Args:
        backend: one of BACKENDS.
        extension: whether the operation is in the extension.

    Raises:
        ValueError: if there is no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return "triton" if backend == "cuda" and not extension else backend


def load_kernels(name: str) -> ModuleType:
    """The module `rsfast.kernels.<name>`, imported only now: everything else works without Triton.

    Raises:
        ImportError: with the install command, if Triton is absent or too old.
    """
    try:
        import triton
    except ModuleNotFoundError as error:
        raise ImportError(
            "backend triton needs Triton: pip install triton, or choose torch"
        ) from error
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        raise ImportError(
            f"backend triton needs Triton {oldest} or newer, found {triton.__version__}: "
            f"pip install --upgrade triton, or choose torch"
        )
    return importlib.import_module(f"rsfast.kernels.{name}")


def load_extension() -> None:
    """Imports `rsfast._C`, which defines the operators `torch.ops.rsfast_C`.

    Raises:
        ImportError: with the install command, if the extension was not built.
    """
    try:
        importlib.import_module("rsfast._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            "backend cuda needs the extension rsfast._C: in the sources of rsfast, "
            "RSFAST_BUILD_CUDA=1 pip install --no-build-isolation -e . , or choose triton"
        ) from error
