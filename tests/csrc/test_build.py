"""The extension `rsfast._C` compiles for the GPUs we support, and is built where it can be."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution, Extension
from setuptools.errors import CompileError

from emulator import CSRC

ROOT = CSRC.parent
# What torch.utils.cpp_extension and setup.py compile with.
FLAGS = """-std=c++17 -O3 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x20b000000000000
    -DPy_LIMITED_API=0x030A0000 -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__
    -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__
    --expt-relaxed-constexpr -Xcompiler -fPIC""".split()
NUM_KERNELS = 12 + 8  # types x activations x residual or not, types x gates
MAX_REGISTERS = 65536 // 512


def compile_source(source: str, folder: Path, *flags: str) -> str:
    """What the compiler says of a source."""
    includes = [Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]
    command = ["nvcc", *FLAGS, *flags, *(f"-I{path}" for path in includes)]
    command += ["-c", str(CSRC / source), "-o", str(folder / f"{source}{flags[-1]}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rsfast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not in PATH")
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    def compile_for(capability: int) -> str:
        return compile_source(
            "switchable_bn_act.cu", tmp_path, "-Xptxas=-v", f"-arch=sm_{capability}"
        )

    with ThreadPoolExecutor() as pool:
        logs = dict(zip((80, 90), pool.map(compile_for, (80, 90)), strict=True))
    for capability, log in logs.items():
        names = re.findall(r"Compiling entry function '(\w+)'", log)
        registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        for name, number in zip(names, registers, strict=True):
            print(f"sm_{capability}", name, f"registers={number}")
        assert len(names) == NUM_KERNELS
        assert len(spills) == 2 * NUM_KERNELS
        assert set(spills) == {"0"}
        assert max(registers) <= MAX_REGISTERS
        assert " smem" not in log  # all of it is dynamic


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not in PATH")
def test_operators_compile_on_the_stable_abi(tmp_path: Path) -> None:
    output = compile_source("ops.cpp", tmp_path, "-O0")
    assert "csrc/" not in output, output


@pytest.mark.parametrize("choice", ["", "0"])
def test_without_the_choice_or_a_cuda_pytorch_the_package_is_pure_python(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSFAST_BUILD_CUDA", choice)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert load_setup().build_options() == {}


def test_the_extension_is_built_or_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RSFAST_BUILD_CUDA", "1")
    module = load_setup()
    lacking = module.missing()
    if lacking:
        with pytest.raises(SystemExit, match=re.escape(f"RSFAST_BUILD_CUDA=1 needs {lacking}")):
            module.build_options()
    else:
        (extension,) = module.build_options()["ext_modules"]
        assert all((ROOT / source).exists() for source in extension.sources)


def write_nvcc(folder: Path, says: str) -> str:
    """A script in the place of the compiler, whose dry run says so."""
    script = folder / "nvcc"
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' '#$ _SPACE_=' '{says}' >&2\n")
    script.chmod(0o755)
    return str(script)


def test_a_wrapped_compiler_tells_the_folder_of_its_toolkit(tmp_path: Path) -> None:
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    nvcc = write_nvcc(tmp_path, f"#$ TOP={home}/bin/..")
    assert load_setup().toolkit(nvcc) is None, "a toolkit without headers is none"
    (home / "include" / "cuda_runtime_api.h").touch()
    (home / "bin" / "nvcc").touch()
    assert load_setup().toolkit(nvcc) == home
    assert load_setup().toolkit(write_nvcc(tmp_path, "#$ OTHER=x")) is None


def test_a_compiler_that_does_not_tell_its_toolkit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    script = Path(write_nvcc(tmp_path, "#$ OTHER=x"))
    script.write_text(script.read_text() + "echo release 13.0.\n")
    assert str(load_setup().missing()).startswith("CUDA_HOME set to the folder of the CUDA toolkit")


def test_an_error_of_the_compiler_ends_no_install_that_did_not_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Error compiling objects for extension")

    monkeypatch.setattr("torch.utils.cpp_extension.BuildExtension.build_extension", fail)
    optional, asked_for = (Extension("rsfast._C", [], optional=yes) for yes in (True, False))
    command = load_setup().build_command()(Distribution())
    with command._filter_build_errors(optional):  # what setuptools builds each extension in
        command.build_extension(optional)
    with (
        pytest.raises(CompileError, match="Error compiling objects"),
        command._filter_build_errors(asked_for),
    ):
        command.build_extension(asked_for)


@pytest.mark.parametrize("asked_for", [False, True])
def test_compilers_that_do_not_go_together_end_an_install_that_asked(
    asked_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("The current installed version of g++ is greater than ...")

    monkeypatch.setattr("torch.utils.cpp_extension.BuildExtension.build_extensions", fail)
    command = load_setup().build_command()(Distribution())
    command.extensions = [Extension("rsfast._C", [], optional=not asked_for)]
    with pytest.raises(RuntimeError, match="g\\+\\+") if asked_for else contextlib.nullcontext():
        command.build_extensions()


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not in PATH")
def test_a_pytorch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert load_setup().missing() == f"a PyTorch with CUDA, torch {torch.__version__} is without"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert str(load_setup().missing()).startswith("the CUDA compiler nvcc")


def test_another_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSFAST_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or not set, got 'yes'"):
        load_setup().build_options()


def test_every_source_is_known_to_the_build() -> None:
    sources = {f"csrc/{path.name}" for path in CSRC.iterdir() if path.suffix in (".cpp", ".cu")}
    assert set(load_setup().SOURCES) == sources


def test_the_build_fails_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RSFAST_BUILD_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().startswith("RSFAST_BUILD_CUDA=1 needs the CUDA compiler nvcc")
