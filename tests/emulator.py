"""The CUDA kernels and operators of csrc/ on a CPU: see tests/csrc/emulated_gpu.h."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

__all__ = ["CSRC", "EmulatedGpu", "emulated_extension", "emulator_library"]

CSRC = Path(__file__).parent.parent / "csrc"
_SOURCES = Path(__file__).parent / "csrc"
_OPERATORS = ("switchable_bn_act_fwd", "switchable_bn_act_bwd")


def _cuda_headers() -> Path:
    """The folder of cuda_fp16.h; skips the test where there is none."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    for folder in (*folders, Path("/usr/local/cuda/include")):
        if (folder / "cuda_fp16.h").exists():
            return folder
    pytest.skip("the headers of the CUDA toolkit are not installed")


@functools.cache
def emulator_library() -> ctypes.CDLL:
    """csrc/ compiled for this CPU, as operators `rsfast_emulated`; skips where that cannot be."""
    if not shutil.which("g++") or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ on Linux")
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        pytest.skip("the headers of Python are not installed")
    flags = "-std=c++17 -O1 -fPIC -U_FORTIFY_SOURCE".split()
    flags += "-DRSFAST_EMULATED_GPU -DUSE_CUDA -DTORCH_TARGET_VERSION=0x20b000000000000".split()
    torch_folder = Path(torch.__file__).parent
    system = headers, _cuda_headers(), torch_folder / "include"
    flags += [f"-I{CSRC}", f"-I{_SOURCES}", *(f"-isystem{folder}" for folder in system)]
    sources = [str(_SOURCES / f"emulated_{name}.cpp") for name in ("gpu", "bn_act", "ops")]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/emulated.so"
        command = ["g++", *flags, "-shared", "-o", path, *sources, *libraries]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(path)


@dataclass(kw_only=True)
class EmulatedGpu:
    """What kernels are run on."""

    num_multiprocessors: int = 3
    ring_slots: int = 2
    """Chunks that a multiprocessor can keep."""
    narrow: bool = True
    """Blocks of 128 threads instead of 512."""
    seed: int = 0
    """Of the order in which threads run; 0 for one after another."""
    skip_barrier: int = -1
    """The number of the __syncthreads that is left out, to see that it is needed."""

    def runs(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        """An operator of `rsfast_emulated` on this GPU."""

        def run(*arguments: Any) -> Any:
            settings = self.num_multiprocessors, self.ring_slots, self.narrow, self.seed
            emulator_library().emulate_gpu(*map(int, settings), self.skip_barrier)
            return operator(*arguments)

        return run


@contextlib.contextmanager
def emulated_extension() -> Iterator[EmulatedGpu]:
    """A GPU that computes the operators of `rsfast._C` for tensors on the CPU."""
    emulator_library()
    gpu = EmulatedGpu()
    library = torch.library.Library("rsfast_C", "FRAGMENT")
    with pytest.MonkeyPatch.context() as patch:
        is_built = importlib.util.find_spec("rsfast._C") is not None
        if not is_built:
            patch.setitem(sys.modules, "rsfast._C", ModuleType("rsfast._C"))
        for name in _OPERATORS:
            operator = getattr(torch.ops.rsfast_emulated, name).default
            if not is_built:
                library.define(str(operator._schema).removeprefix("rsfast_emulated::"))
            library.impl(name, gpu.runs(operator), "CPU")
        yield gpu
        library._destroy()
