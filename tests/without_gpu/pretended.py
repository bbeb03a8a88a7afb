"""A CUDA device that does nothing, for tensors without content.

    python tests/without_gpu/pretended.py MODULE [ARGUMENT ...]

runs a module with it, as `python -m MODULE` would. PyTorch asks a device's guard for the current
device and stream of every operation. Where PyTorch is built without CUDA, the guard of the meta
device serves for it, too, which is enough for forwards. A backward asks for more, and only of a
build with CUDA: there the command puts pretended_gpu.cpp in the place of the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.cuda.amp import common as amp_common

__all__ = ["BACKWARDS", "FORWARDS", "pretended_gpu"]

_CUDA, _META = 1, 14  # of c10::DeviceType
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_TORCH = Path(torch.__file__).parent


def has_driver() -> bool:
    """Whether the pretended driver is loaded."""
    return hasattr(ctypes.CDLL(None), "pretended_guard")


_IS_CUDA_BUILD = torch.version.cuda is not None
_REASON = "needs a CUDA build of PyTorch with the pretended driver: make test-cuda-build"
# Marks of tests that run them on a pretended GPU. A CUDA build has a guard of its own, which asks
# the driver.
FORWARDS = pytest.mark.skipif(_IS_CUDA_BUILD and not has_driver(), reason=_REASON)
BACKWARDS = pytest.mark.skipif(not has_driver(), reason=_REASON)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Lets tensors of a fake mode lie on "cuda" within the block."""
    library = ctypes.CDLL(str(_TORCH / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, _REGISTRY)
    before = guards[_CUDA]
    guards[_CUDA] = _own_guard() if has_driver() else guards[_META]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amp_common, "amp_definitely_not_available", lambda: False)
            patch.setattr(torch.cuda, "is_available", lambda: False)  # for what looks for a GPU
            patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
            patch.setattr(torch.cuda, "current_stream", lambda *_: None)
            patch.setattr(torch.cuda, "Event", _Event)
            yield
    finally:
        guards[_CUDA] = before


class _Event:
    """Is over as soon as it is recorded."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _own_guard() -> int:
    function = ctypes.CDLL(None).pretended_guard
    function.restype = ctypes.c_void_p
    return function()


def _build(folder: str) -> str:
    """Compiles the pretended driver; returns the library."""
    library = f"{folder}/libcuda.so.1"
    source = Path(__file__).with_name("pretended_gpu.cpp")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-isystem{_TORCH / 'include'}"]
    command += [str(source), "-o", library, f"-L{_TORCH / 'lib'}", "-lc10"]
    command += ["-Wl,-soname,libcuda.so.1", f"-Wl,-rpath,{_TORCH / 'lib'}"]
    subprocess.run(command, check=True)
    return library


def main(argv: list[str]) -> int:
    """The command."""
    if not _IS_CUDA_BUILD:
        raise SystemExit(f"needs a PyTorch that is built with CUDA, {torch.__version__} is not")
    if not has_driver():
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "LD_PRELOAD": _build(folder)}
            command = [sys.executable, *sys.argv]
            return subprocess.run(command, env=environment).returncode
    sys.path[0] = os.getcwd()  # as `python -m` has it
    sys.argv = argv
    with pretended_gpu():
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
