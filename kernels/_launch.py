"""Where a Triton kernel runs."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

__all__ = ["on_device_of"]


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes the GPU of `x` the current one; on a CPU only Triton's interpreter can launch.

    Raises:
        ValueError: if `x` is on a CPU and kernels are compiled.
    """
    if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("backend 'triton' needs tensors on a GPU, got them on the CPU")
    return torch.cuda.device_of(x)
