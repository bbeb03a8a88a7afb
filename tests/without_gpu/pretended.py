"""A CUDA device that does nothing, for tensors without content.

PyTorch asks a device's guard for the current device and stream of every operation. Where CUDA has
none, because this PyTorch is built without it, that of the meta device serves for it, too.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.cuda.amp import common as amp_common

__all__ = ["pretended_gpu"]

_CUDA, _META = 1, 14  # of c10::DeviceType
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Lets tensors of a fake mode lie on "cuda" within the block."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, _REGISTRY)
    before = guards[_CUDA]
    guards[_CUDA] = guards[_META]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amp_common, "amp_definitely_not_available", lambda: False)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
            yield
    finally:
        guards[_CUDA] = before
