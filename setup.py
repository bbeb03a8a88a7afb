"""The packages of rsfast, and its optional extension `rsfast._C` from csrc/.

`kernels/` is installed as `rsfast.kernels`. RSFAST_BUILD_CUDA=1 builds the extension or says what
is missing, 0 leaves it out; without it, it is built where that can be. The build sees PyTorch only
with `pip install --no-build-isolation`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

VARIABLE = "RSFAST_BUILD_CUDA"
SOURCES = ["csrc/ops.cpp", "csrc/switchable_bn_act.cu"]
OLDEST_TORCH = (2, 11)  # whose stable ABI the extension is written for
# Ampere and Hopper; newer ones compile the PTX of the latter.
ARCHITECTURES = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]


def toolkit(nvcc: str) -> Path | None:
    """The folder of the CUDA toolkit, as the compiler tells it: `nvcc` may be a link or a script.

    None if it does not tell, or has no headers there.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "empty.cu")
        source.touch()
        command = [nvcc, "--dryrun", "-c", str(source), "-o", str(Path(scratch, "empty.o"))]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    if not found:
        return None
    home = Path(found[1]).resolve()
    parts = "include/cuda_runtime_api.h", "bin/nvcc"
    return home if all((home / part).exists() for part in parts) else None


def missing() -> str | None:
    """What this environment lacks to build the extension; None if nothing."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else "nvcc"
    if not shutil.which(nvcc):
        return "the CUDA compiler nvcc, in PATH or in the folder bin of CUDA_HOME"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch, which a build sees with pip install --no-build-isolation"
    import torch

    if torch.version.cuda is None:
        return f"a PyTorch with CUDA, torch {torch.__version__} is without"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"PyTorch {oldest} or newer, found {torch.__version__}"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if f"release {torch.version.cuda.split('.')[0]}." not in version:
        return f"the compiler nvcc of CUDA {torch.version.cuda}, as PyTorch has, found {version!r}"
    if not home and toolkit("nvcc") is None:
        return "CUDA_HOME set to the folder of the CUDA toolkit, which nvcc does not tell"
    return None


def build_options() -> dict[str, Any]:
    """Arguments of `setup` for the extension, or none of them.

    Raises:
        SystemExit: if the extension is asked for and cannot be built.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"{VARIABLE} must be 0, 1 or not set, got {choice!r}")
    lacking = None if choice == "0" else missing()
    if choice == "1" and lacking:
        raise SystemExit(f"{VARIABLE}=1 needs {lacking}")
    if choice == "0" or lacking:
        return {}
    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        # Left to itself, PyTorch takes the folder above the one that nvcc was found in.
        os.environ["CUDA_HOME"] = str(toolkit("nvcc"))
    from torch.utils.cpp_extension import CUDAExtension

    target = OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48
    flags = ["-O3", "-std=c++17", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={target:#x}"]
    nvcc_flags = [f"-gencode={architecture}" for architecture in ARCHITECTURES]
    extension = CUDAExtension(
        "rsfast._C",
        SOURCES,
        extra_compile_args={"cxx": flags, "nvcc": flags + nvcc_flags},
        py_limited_api=True,
        optional=choice == "",  # where nobody asked for it, its errors end nothing
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": build_command()},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def build_command() -> type:
    """PyTorch's build, with errors that setuptools lets pass for an optional extension."""
    from setuptools.errors import CompileError
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (RuntimeError, OSError) as error:  # compilers that do not go together
                if not all(extension.optional for extension in self.extensions):
                    raise
                self.warn(f"rsfast._C is not built: {error}")

        def build_extension(self, ext: Any) -> None:
            try:
                super().build_extension(ext)
            except RuntimeError as error:  # what PyTorch makes of a compiler's error
                raise CompileError(str(error)) from error

    return Build


def packages() -> list[str]:
    """Every folder of modules, under the name it is imported by."""
    # A checkout may have a link rsfast/kernels, to be imported without being installed.
    own = find_packages("rsfast", exclude=["kernels", "kernels.*"])
    kernels = find_packages("kernels")
    names = [*own, "kernels", *(f"kernels.{name}" for name in kernels)]
    return ["rsfast", *(f"rsfast.{name}" for name in sorted(names))]


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir={"rsfast": "rsfast", "rsfast.kernels": "kernels"},
        package_data={"rsfast.experiments": ["*.toml"], "rsfast.recipes": ["*.toml"]},
        **build_options(),
    )
