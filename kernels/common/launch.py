"""Where a Triton kernel runs, and how it is told of the levels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

__all__ = ["OPTIONS", "can_launch_on", "level_arguments", "missing_on", "on_device_of"]

_OLDEST_GPU = (8, 0)  # compute capability; what the kernels are compiled for in the tests

# Of kernels that stream through memory. Triton 3.10 is to stop fusing multiplications with
# additions by default.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def can_launch_on(device: torch.device) -> bool:
    """Whether there are GPUs, or Triton's interpreter, behind a device."""
    return device.type != "cpu" or triton.knobs.runtime.interpret


def missing_on(device: torch.device) -> str | None:
    """What a device or machine lacks to run the kernels; None if nothing."""
    if not can_launch_on(device):
        return f"a GPU, the device is {device}"
    if device.type == "cpu":
        return None
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST_GPU:
        oldest, own = (".".join(map(str, version)) for version in (_OLDEST_GPU, found))
        return f"a GPU of compute capability {oldest} or above, {device} has {own}"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler and triton.knobs.build.impl is None:
        return "a C compiler (gcc or clang in PATH, or the environment variable CC)"
    return None


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes the GPU of `x` the current one; on a CPU only Triton's interpreter can launch.

    Raises:
        ValueError: if `x` is on a CPU and kernels are compiled.
    """
    if not can_launch_on(x.device):
        raise ValueError("backend 'triton' needs tensors on a GPU, got them on the CPU")
    return torch.cuda.device_of(x)


def level_arguments(numbers: Sequence[int]) -> tuple[int, ...]:
    """Numbers from 0 on, one per level, as run-time arguments; a kernel reads `(n >> 1) - 1`.

    Triton compiles a kernel anew for arguments that are 1 and for multiples of 16, and in a tuple
    it cannot be told not to. These are odd and at least 3, so one kernel serves all row counts.
    """
    return tuple(2 * number + 3 for number in numbers)
