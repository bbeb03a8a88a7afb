"""What every operation asks of its arguments."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "MAX_LEVELS",
    "check_backend",
    "check_companion",
    "check_kernel_dtype",
    "check_levels",
    "choose_backend",
    "check_rows",
    "load_extension",
    "load_kernels",
    "rows_of_levels",
    "without_extension",
]

BACKENDS = ("torch", "triton")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST_TRITON = (3, 6)
MAX_LEVELS = 8  # each program looks for its level among all


def choose_backend(choice: str, device: torch.device) -> str:
    """The backend of a run: `choice`, or for "auto" Triton on a GPU and PyTorch elsewhere.

    "cuda" is Triton with training batch norm in CUDA C++.

    Raises:
        ValueError: if the choice is neither "auto" nor a backend, or cannot run there.
        ImportError: if Triton, or the extension, is chosen and absent.
    """
    if choice == "auto":
        choice = "triton" if device.type == "cuda" else "torch"
    if check_backend(choice, "cuda") != "torch":
        missing = load_kernels("_launch").missing_on(device)
        if missing:
            raise ValueError(f"kernels {choice} needs {missing}: choose torch")
    if choice == "cuda":
        load_extension()
    return choice


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


def check_backend(backend: str, *own: str) -> str:
    """`backend`, if it is one, or one of those that only an operation of its `own` has.

    Raises:
        ValueError: if it is not.
    """
    if backend not in (*BACKENDS, *own):
        raise ValueError(f"backend must be one of {(*BACKENDS, *own)}, got {backend!r}")
    return backend


def without_extension(backend: str) -> str:
    """The backend of operations that are not in the extension: for "cuda" that is Triton."""
    return "triton" if backend == "cuda" else backend


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


def check_kernel_dtype(name: str, tensor: Tensor) -> None:
    """Refuses what the Triton kernels do not compute in.

    Raises:
        ValueError: unless the tensor is float16, bfloat16 or float32.
    """
    if tensor.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")


def check_companion(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a tensor that a kernel cannot read beside its main argument.

    Raises:
        ValueError: unless the tensor is contiguous, of this type and on this device.
    """
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"{name} must be contiguous {dtype} on {device}, "
            f"got {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )


def check_rows(x: Tensor, level_rows: Sequence[int] | None = None) -> None:
    """Refuses what is not packed rows, or not as many as the levels have.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if x.dim() != 2 or not x.is_contiguous() or not x.is_floating_point():
        raise ValueError(
            f"x must be contiguous floating point [M, C], got {x.dtype} of shape {tuple(x.shape)}, "
            f"strides {x.stride()}"
        )
    if level_rows is not None and sum(level_rows) != x.shape[0]:
        raise ValueError(
            f"level_rows must add up to the {x.shape[0]} rows of x, got {tuple(level_rows)}"
        )


def rows_of_levels(
    heights: Sequence[int], widths: Sequence[int], num_images: int, stride: int = 1
) -> list[int]:
    """Rows of each level behind a "same" convolution or pooling of that stride."""
    pairs = zip(heights, widths, strict=True)
    return [num_images * -(-height // stride) * -(-width // stride) for height, width in pairs]


def check_levels(level_rows: Sequence[int]) -> None:
    """Refuses row counts that the Triton kernels do not find their way in.

    Raises:
        ValueError: unless there are 1 to 8 levels of at least one row.
    """
    if not 1 <= len(level_rows) <= MAX_LEVELS or min(level_rows) < 1:
        raise ValueError(
            f"level_rows must be 1 to {MAX_LEVELS} counts of at least 1, got {tuple(level_rows)}"
        )
