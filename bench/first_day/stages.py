"""What the first day on a GPU runs, most telling first."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.support.timing import ON_GPU

__all__ = ["STAGES", "Stage"]

_PYTHON = sys.executable
_ARCH = "resnet50" if ON_GPU else "resnet18"
_DEMO = "--resolutions 32 16 --epochs 1 --steps-per-epoch 5 --batch-size 8".split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One process, or several in a row, that write into a folder of their own.

    Attributes:
        name: of the stage and of its folder.
        about: what it shows, in a line.
        commands: given its folder. The first one that fails ends the stage.
        minutes: that it may take at most.
        lacks: what this machine has not got for it; None if nothing.
    """

    name: str
    about: str
    commands: Callable[[Path], list[list[str]]]
    minutes: float
    lacks: Callable[[], str | None] = lambda: None


def _module(name: str, *flags: str) -> Callable[[Path], list[list[str]]]:
    """`python -m NAME FLAGS --output FOLDER`."""
    return lambda folder: [[_PYTHON, "-m", name, *flags, "--output", str(folder)]]


def _tests(*selection: str) -> Callable[[Path], list[list[str]]]:
    """Those of a selection, all of them whatever fails."""
    # Most of their time kernels are compiled, by one core for each process.
    processes = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    pytest = [_PYTHON, "-m", "pytest", "-q", *processes]
    return lambda folder: [[*pytest, f"--junitxml={folder}/tests.xml", *selection]]


def _gpu() -> str | None:
    return None if ON_GPU else "a CUDA device"


def _dali() -> str | None:
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return _gpu() or (None if found else "NVIDIA DALI")


def _compiler() -> str | None:
    return _gpu() or (None if shutil.which("nvcc") else "nvcc")


def _sanitizer() -> str | None:
    return _compiler() or (None if shutil.which("compute-sanitizer") else "compute-sanitizer")


def _race(batch: int, toy: int) -> Callable[[Path], list[list[str]]]:
    if not ON_GPU:
        flags = f"--batches {toy} --resolutions 32 16 --precision fp32 --rounds 2 --steps 1"
        return _module("bench.step", "--archs", _ARCH, "--parts", "race", *flags.split())
    rivals = "authors_amp authors_compile authors_compile_graph rsfast_eager rsfast_graph"
    flags = f"--batches {batch} --rounds 8 --impls {rivals}"
    return _module("bench.step", "--archs", _ARCH, "--parts", "race", *flags.split())


def _demo(folder: Path) -> list[list[str]]:
    run = str(folder / "run")
    train = [_PYTHON, "-m", "rsfast.train", "--arch", "resnet18", "--output", run]
    evaluate = [_PYTHON, "-m", "rsfast.evaluate", f"{run}/model_best.pt"]
    if ON_GPU:
        return [train, [*evaluate, "--resolutions", "48:96:6"]]
    return [[*train, *_DEMO, "--lr", "0.01"], [*evaluate, "--resolutions", "24"]]


def _sanitized(folder: Path) -> list[list[str]]:
    """Each tool over the extension's smaller tests; a finding is an error."""
    tests = "tests/kernels/switchable_bn_act/test_extension.py"
    pytest = [_PYTHON, "-m", "pytest", "-q", "-x", "-m", "gpu", tests]
    return [
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *pytest]
        for tool in ("memcheck", "racecheck")
    ]


_GPU_TESTS = "tests/test_gpu.py"
_BATCH_NORM = ["tests/kernels/switchable_bn_act", "tests/kernels/bn_act_max_pool"]
_OTHER_KERNELS = ["tests/kernels", *(f"--ignore={path}" for path in _BATCH_NORM)]

STAGES = (
    Stage(
        name="card",
        about="environment, copy bandwidth and matrix rate",
        commands=_module("bench.first_day.card"),
        minutes=2,
    ),
    Stage(
        name="training",
        about="50 steps of a small network: the loss falls, eager and graph lose the same",
        commands=_module("bench.first_day.training"),
        minutes=3,
    ),
    Stage(
        name="tests_step",
        about="the step, its graph and its precisions on the GPU",
        commands=_tests("-m", "gpu", "-k", "not dali", _GPU_TESTS),
        minutes=5,
        lacks=_gpu,
    ),
    Stage(
        name="tests_batch_norm",
        about="batch norm against float64",
        commands=_tests("-m", "gpu", *_BATCH_NORM),
        minutes=4,
        lacks=_gpu,
    ),
    Stage(
        name="tests_kernels",
        about="all other kernels against float64",
        commands=_tests("-m", "gpu", *_OTHER_KERNELS),
        minutes=3,
        lacks=_gpu,
    ),
    Stage(
        name="tests_dali",
        about="DALI on the GPU against Pillow",
        commands=_tests("-m", "gpu", "-k", "dali", _GPU_TESTS),
        minutes=2,
        lacks=_dali,
    ),
    Stage(
        name="race_large",
        about="the step against the authors' way, eager and compiled, at batch 256",
        commands=_race(256, 4),
        minutes=6,
    ),
    Stage(
        name="race_small",
        about="the same at batch 32",
        commands=_race(32, 2),
        minutes=4,
    ),
    Stage(
        name="kernels",
        about="batch norm, loss and pooling against their rivals",
        commands=_module(
            "bench.ops",
            *f"--archs {_ARCH} --rounds {10 if ON_GPU else 1}".split(),
            *"--ops switchable_bn_act bn_act_max_pool distillation_loss".split(),
            *"global_avg_pool subsample".split(),
        ),
        minutes=5,
    ),
    Stage(
        name="loaders",
        about="JPEG files to pyramids with few and many threads",
        commands=_module("bench.step.loaders"),
        minutes=4,
    ),
    Stage(
        name="end_to_end",
        about="the step fed from JPEG files and with one random batch",
        commands=_module(
            "bench.step",
            *f"--archs {_ARCH} --parts end_to_end --rounds {5 if ON_GPU else 1}".split(),
            *([] if ON_GPU else "--batches 4 --resolutions 32 16 --precision fp32".split()),
        ),
        minutes=4,
    ),
    Stage(
        name="budget",
        about="where the step's time goes",
        commands=_module(
            "bench.step.budget",
            *f"--arch {_ARCH} --rounds {5 if ON_GPU else 1}".split(),
            *(["--batch", "256"] if ON_GPU else "--batch 4 --precision fp32".split()),
        ),
        minutes=4,
    ),
    Stage(
        name="demo",
        about="`make demo`: trained on generated JPEGs, evaluated at other resolutions, too",
        commands=_demo,
        minutes=6,
    ),
    Stage(
        name="extension",
        about="the CUDA C++ batch norm: built, against float64, raced",
        commands=lambda folder: [
            [
                "env",
                "RSFAST_BUILD_CUDA=1",
                _PYTHON,
                "setup.py",
                "build_ext",
                "--inplace",
                "--force",
            ],
            *_tests("-m", "gpu", "tests/kernels/switchable_bn_act/test_extension.py")(folder),
            *_module(
                "bench.step",
                *f"--archs {_ARCH} --parts race --batches 256 32 --rounds 8".split(),
                *"--impls rsfast_cuda rsfast_graph".split(),
            )(folder / "race"),
        ],
        minutes=8,
        lacks=_compiler,
    ),
    Stage(
        name="sanitizer",
        about="compute-sanitizer on the extension",
        commands=_sanitized,
        minutes=10,
        lacks=_sanitizer,
    ),
    Stage(
        name="tests",
        about="`make test`",
        commands=_tests("-m", "not gpu and not slow"),
        minutes=15,
        lacks=_gpu,
    ),
)
