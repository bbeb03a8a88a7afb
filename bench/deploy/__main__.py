"""One exported file beside a file per resolution and beside PyTorch, interleaved, at batch 1.

    python -m bench.deploy --checkpoint FILE [--data DIR] --output DIR

Exports the checkpoint in every way that competes, asks each for its logits before any time is
taken, and measures latency, switches, loading, memory and disk. With --data also accuracy.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.deploy import accuracy, report
from bench.deploy.files import export_all
from bench.deploy.implementations import IMPLEMENTATIONS, MATMUL_SIZE, MATMULS, Implementation
from bench.deploy.race import Child, Samples, Task, race
from bench.deploy.verdicts import names, share_of_rate
from bench.support.results_file import Results
from rsfast.deploy.manifest import Manifest
from rsfast.deploy.reference import patterns
from rsfast.models import RSNet
from rsfast.models.deploy import multiply_adds
from rsfast.training.checkpoint import load_model

__all__ = ["main"]

_MIB = 2**20
_NO_DATA = """\
Without --data the int8 files are calibrated on smooth patterns: they take the time of any int8 file
of this network, and their accuracy is unknown."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = _parse(argv)
    impls = [impl for impl in IMPLEMENTATIONS if args.impls is None or impl.name in args.impls]
    results = Results(args.output, "deploy", torch.device("cpu"))
    model, _ = load_model(args.checkpoint, arch=args.arch)
    with tempfile.TemporaryDirectory(prefix="rsfast-deploy-") as scratch:
        folder = Path(scratch)
        manifest = export_all(model, args.checkpoint, args.data, folder)
        arch, resolutions = manifest.arch or "network", manifest.resolutions
        for impl in impls:
            files = impl.files(folder, args.checkpoint, resolutions)
            size = sum(file.stat().st_size for file in files) / _MIB
            results.add(names("disk", arch, 0, impl.name, 0), [size], "MiB", files=len(files))
        for threads in args.threads:
            task = Task(folder, args.checkpoint, args.arch, resolutions, threads)
            _measure(impls, model, task, args, results)
        if args.data is not None:
            _measure_accuracy(impls, folder, manifest, args.data, results)
    notes = [_about_machine(args.checkpoint)] + ([] if args.data else [_NO_DATA])
    about = (results.rows, arch, resolutions, args.threads)
    report.draw(*about, results.folder)
    command = ["bench.deploy", *(sys.argv[1:] if argv is None else argv)]
    results.finish(command, report.write_about(*about, notes))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.deploy", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of rsfast or of the authors' code")
    add("--arch", help="as of rsfast.export")
    add("--data", type=Path, help="folder with train/, to calibrate int8 on, and val/")
    add("--output", type=Path, help="folder of the results (a new one in bench/results)")
    add("--threads", type=int, nargs="+", default=[1, 2], help="one race each (1 2)")
    add("--rounds", type=int, default=30, help="visits of each resolution at most (30)")
    add("--minutes", type=float, default=10.0, help="after which a race ends (10)")
    add("--heats", type=int, default=5, help="of each race, with new processes (5)")
    known = [impl.name for impl in IMPLEMENTATIONS]
    add("--impls", nargs="+", choices=known, metavar="NAME", help=f"of {', '.join(known)} (all)")
    add("--seed", type=int, default=0, help="of the orders (0)")
    args = parser.parse_args(argv)
    if min(*args.threads, args.rounds, args.heats) < 1:
        parser.error("--threads, --rounds and --heats must be at least 1")
    return args


def _measure_accuracy(
    impls: Sequence[Implementation],
    folder: Path,
    manifest: Manifest,
    data: Path,
    results: Results,
) -> None:
    found, count = accuracy.top1(impls, folder, manifest, data)
    for impl in impls:
        for resolution in manifest.resolutions if impl.arithmetic in found else ():
            name = f"accuracy/{data.name}/{manifest.arch}/{impl.name}/{resolution}"
            top1 = found[impl.arithmetic][resolution]
            results.add(name, [top1], "%", images=count, measured_as=impl.arithmetic)


def _measure(
    impls: Sequence[Implementation],
    model: RSNet,
    task: Task,
    args: argparse.Namespace,
    results: Results,
) -> None:
    """One race: rows of every implementation with one number of threads.

    It is run in heats of new processes: where in memory a process has its weights makes the same
    graph several percent faster or slower, as long as it lives.
    """
    rng = np.random.default_rng(args.seed)
    rates_of = [m for m in MATMULS if any(i.precision == m.precision for i in impls)]
    sizes = {impl.name: task.resolutions for impl in impls}
    sizes |= {impl.name: (MATMUL_SIZE,) for impl in rates_of}
    hellos: dict[str, list[dict]] = {name: [] for name in sizes}
    samples: dict[tuple[str, int], Samples] = {}
    errors: dict[str, dict[int, float]] = {}
    for heat in range(args.heats):
        with contextlib.ExitStack() as ends:
            children = {}
            for index in rng.permutation(len(sizes)):
                child = Child([*impls, *rates_of][index], task)
                ends.callback(child.close)
                children[child.name] = child
                hellos[child.name].append(child.hello)
            if not heat:
                errors = _check(impls, model, task, hellos)
            rounds = math.ceil(args.rounds / args.heats)
            found = race(children, sizes, rounds, args.minutes / args.heats, rng)
            for pair, values in found.items():
                samples.setdefault(pair, Samples()).add(values)
    rates = _add_rates(rates_of, samples, task.threads, results)
    costs = {r: multiply_adds(model.at(r), r) for r in task.resolutions}
    arch = model.arch or "network"
    for impl in impls:
        row = functools.partial(names, arch=arch, threads=task.threads, impl=impl.name)
        for key, unit in (("load_ms", "ms"), ("memory_mib", "MiB")):
            values = [hello[key] for hello in hellos[impl.name]]
            results.add(row(key.split("_")[0], resolution=0), values, unit)
        for r in task.resolutions:
            found = samples[impl.name, r]
            median = statistics.median(found.steady_ms)
            results.add(
                row("latency", resolution=r),
                found.steady_ms,
                "ms",
                p95=float(np.percentile(found.steady_ms, 95)),
                share_of_matmul=share_of_rate(costs[r], median, rates[impl.precision]),
                waited_share=statistics.mean(found.waited),
                error=errors[impl.name][r],
            )
            switches = [first - median for first in found.first_ms]
            results.add(row("switch", resolution=r), switches, "ms")


def _check(
    impls: Sequence[Implementation], model: RSNet, task: Task, hellos: Mapping[str, list[dict]]
) -> dict[str, dict[int, float]]:
    """How far the logits of each are from PyTorch's; raises where that is too far."""
    manifest = Manifest.read(task.folder)
    inputs = {r: torch.from_numpy(patterns(r, manifest)[:1]) for r in task.resolutions}
    exact = {r: model.at(r)(images).detach()[0].numpy() for r, images in inputs.items()}
    logits = {
        impl.name: {int(r): np.array(v) for r, v in hellos[impl.name][0]["logits"].items()}
        for impl in impls
    }
    errors = accuracy.distances(logits, exact)
    accuracy.check_logits(impls, errors)
    return errors


def _add_rates(
    impls: Sequence[Implementation],
    samples: Mapping[tuple[str, int], Samples],
    threads: int,
    results: Results,
) -> dict[str, float]:
    """Precision -> 10**9 operations per second of a matrix product."""
    rates = {}
    for impl in impls:
        values = [2 * MATMUL_SIZE**3 / ms / 1e6 for ms in samples[impl.name, MATMUL_SIZE].steady_ms]
        rates[impl.precision] = statistics.median(values)
        unit = "GOP/s" if impl.precision == "int8" else "GFLOP/s"
        per_core = rates[impl.precision] / threads
        results.add(f"card/{impl.name}/t{threads}", values, unit, per_core=per_core)
    return rates


def _about_machine(checkpoint: Path) -> str:
    """What summary.json does not say of the processor."""
    from importlib import metadata

    known = {entry.metadata["Name"]: entry.version for entry in metadata.distributions()}
    packages = ", ".join(f"{p} {known[p]}" for p in ("onnxruntime", "openvino") if p in known)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    wide = [f for f in facts.get("flags", "").split() if f.startswith(("avx512_", "avx_v", "amx"))]
    cores = sum(line.startswith("processor") for line in lines)
    return (
        f"{facts.get('model name', 'A processor')}, {cores} cores, {', '.join(sorted(wide))}; "
        f"{packages}. Network: {checkpoint.name}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
