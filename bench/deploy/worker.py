"""A process that holds one implementation and times it when told to: `bench.deploy.race` starts it.

It reads lines from its input and answers each with a line of JSON. In between it waits for the next
line without using a core, so that implementations in other processes can have their turn.

- at the start, unasked: `{"load_ms", "memory_mib", "logits": {size: [K]}}`;
- `BEFORE SIZE CALLS`: runs once at the size BEFORE, then so many times at SIZE; answers with
  `{"ns": [CALLS], "waited": share of that time in which it could have run and had no core}`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.deploy.implementations import (
    MATMUL_FILE,
    MATMUL_SIZE,
    Implementation,
    separate_file,
)
from rsfast.deploy import load
from rsfast.deploy.manifest import Manifest
from rsfast.deploy.reference import patterns
from rsfast.deploy.runtimes import Pin, Session, library, open_session
from rsfast.latency import held_mib, waited_ns

__all__ = ["main", "open_at"]

_WARM_UP = 3  # calls per size

Runs = dict[int, Callable[[], Any]]  # size -> one inference at batch 1


def main() -> int:
    """Serves until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    task = json.loads(sys.argv[1])
    impl = Implementation(*task["implementation"])
    folder, threads = Path(task["folder"]), task["threads"]
    manifest = Manifest.read(folder)
    inputs = {r: patterns(r, manifest)[:1] for r in task["resolutions"]}
    _import_packages(impl, threads)
    before, start = held_mib(), time.perf_counter_ns()
    if impl.family == "matmul":
        runs = _matmul(impl, folder, threads)
    elif impl.family == "pytorch":
        runs = _pytorch(impl, Path(task["checkpoint"]), task["arch"], inputs)
    else:
        sessions = open_at(impl, folder, threads, list(inputs))
        runs = {r: functools.partial(sessions[r], images) for r, images in inputs.items()}
    load_ms = (time.perf_counter_ns() - start) / 1e6
    logits = {}
    for size, run in runs.items():
        for _ in range(_WARM_UP):
            result = run()
        if impl.family != "matmul":
            logits[size] = np.asarray(result)[0].tolist()
    result = None
    memory = held_mib() - before
    _answer(answers, {"load_ms": load_ms, "memory_mib": memory, "logits": logits})
    for line in sys.stdin:
        _answer(answers, _time(runs, *map(int, line.split())))
    return 0


def _answer(answers: Any, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _time(runs: Runs, before: int, size: int, calls: int) -> dict[str, Any]:
    runs[before]()
    run, times = runs[size], []
    began, waited = time.perf_counter_ns(), waited_ns()
    for _ in range(calls):
        start = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - start)
    share = (waited_ns() - waited) / max(1, time.perf_counter_ns() - began)
    return {"ns": times, "waited": share}


def _import_packages(impl: Implementation, threads: int) -> None:
    """What packages themselves take of time and memory is not the network's."""
    if impl.family == "pytorch" or impl.name in ("matmul_fp32", "matmul_bf16"):
        import torch

        import rsfast.training.checkpoint  # noqa: F401

        torch.set_num_threads(threads)
        return
    library(impl.runtime or "onnxruntime")
    if (impl.runtime, impl.precision) == ("openvino", "int8"):
        import onnx  # noqa: F401  which rsfast.deploy then reads the file with


def open_at(
    impl: Implementation, folder: Path, threads: int, resolutions: Sequence[int]
) -> dict[int, Session]:
    """Opens the exported file, or files, at batch 1.

    Args:
        impl: of family "rsfast" or "separate".
        folder: of the files.
        threads: to compute with.
        resolutions: in pixels.
    """
    how: dict[str, Any] = {"threads": threads, "precision": impl.precision}
    if impl.family == "rsfast":
        return dict.fromkeys(resolutions, load(folder, impl.runtime, impl.mode, **how))
    files = {r: separate_file(folder, impl.precision, r) for r in resolutions}
    return {r: open_session(path, impl.runtime, Pin(1, r), **how) for r, path in files.items()}


def _pytorch(
    impl: Implementation, checkpoint: Path, arch: str | None, inputs: dict[int, np.ndarray]
) -> Runs:
    import torch

    from rsfast.training.checkpoint import load_model

    model, _ = load_model(checkpoint, arch=arch)
    order = torch.channels_last if impl.mode else torch.contiguous_format

    def make(resolution: int, images: np.ndarray) -> Callable[[], Any]:
        net = model.at(resolution).to(memory_format=order)
        pixels = torch.from_numpy(images).to(memory_format=order)

        @torch.inference_mode()
        def run() -> Any:
            return net(pixels)

        return run

    return {r: make(r, images) for r, images in inputs.items()}


def _matmul(impl: Implementation, folder: Path, threads: int) -> Runs:
    square = (MATMUL_SIZE, MATMUL_SIZE)
    if impl.precision == "int8":
        package = library("onnxruntime")
        options = package.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = package.InferenceSession(
            str(folder / MATMUL_FILE), options, providers=["CPUExecutionProvider"]
        )
        left = np.random.default_rng(0).integers(0, 256, square, dtype=np.uint8)
        return {MATMUL_SIZE: lambda: session.run(None, {"a": left})}
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[impl.precision]
    a, b = (torch.randn(square, dtype=torch.float32).to(dtype) for _ in range(2))
    return {MATMUL_SIZE: lambda: a @ b}


if __name__ == "__main__":
    raise SystemExit(main())
