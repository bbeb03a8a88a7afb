"""`python -m rsfast.latency DIR`: what an exported network costs on this machine.

Each configuration is measured in a process of its own. Resolutions take turns in random order, so
that a disturbance of the machine meets all of them, and every turn begins with a switch.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsfast.deploy import Manifest, Network, load
from rsfast.deploy.manifest import VALIDATION_FILE
from rsfast.deploy.network import model_file
from rsfast.deploy.runtimes import MODES, PRECISIONS, RUNTIMES, library, refuse
from rsfast.files.folders import make_writable
from rsfast.files.tables import read_rows, write_rows

__all__ = ["Configuration", "Row", "held_mib", "main", "measure", "waited_ns"]

_STEADY = 4  # inferences of a turn after the first one, which pays for the switch
_WARM_UP = 2  # per resolution, before anything is timed
_MOST_WAITING = 0.02  # of the time, above which there is a warning
_SMAPS = Path("/proc/self/smaps_rollup")
_TASKS = Path("/proc/self/task")  # schedstat in it, which some kernels do not have


@dataclass(frozen=True, slots=True)
class Configuration:
    """How a network is run; see :func:`rsfast.deploy.load`."""

    runtime: str
    precision: str
    mode: str
    threads: int
    batch: int

    def __str__(self) -> str:
        how = f"{self.runtime} {self.precision} {self.mode}"
        return f"{how}, threads {self.threads}, batch {self.batch}"


@dataclass(frozen=True, slots=True)
class Row:
    """One resolution in one configuration, in the order of the CSV's columns.

    Attributes:
        runtime, precision, mode, threads, batch: the configuration.
        resolution: in pixels.
        p50_ms, p95_ms: of a call with a whole batch, some time after the last switch.
        load_ms: until all sessions of the configuration are open.
        memory_mib: that the configuration holds between calls once all resolutions have run.
        switch_ms: by how much the first call after another resolution takes longer, at the median.
        rounds: turns of each resolution; the percentiles are of four calls each.
        top1: in percent, of a table of accuracies; None if there is none for this precision.
    """

    runtime: str
    precision: str
    mode: str
    threads: int
    batch: int
    resolution: int
    p50_ms: float
    p95_ms: float
    load_ms: float
    memory_mib: float
    switch_ms: float | None
    rounds: int
    top1: float | None = None


def measure(folder: Path, configuration: Configuration, rounds: int, seed: int = 0) -> list[Row]:
    """Measures all trained resolutions in this process.

    Args:
        folder: of the exported network.
        configuration: how to run it.
        rounds: turns of each resolution.
        seed: of their order.

    Raises:
        ValueError: if there is no such file or configuration.
        ImportError: if the runtime is absent or too old.
    """
    library(configuration.runtime)  # what the package itself takes is not the network's
    rng = np.random.default_rng(seed)
    contract = Manifest.read(folder)
    images = {r: _images(contract, configuration.batch, r, rng) for r in contract.resolutions}
    before = held_mib()
    start = time.perf_counter_ns()
    net = load(
        folder,
        configuration.runtime,
        configuration.mode,
        configuration.threads,
        configuration.precision,
        batch_sizes=(configuration.batch,),
    )
    load_ms = _ms_since(start)
    start, waited = time.perf_counter_ns(), waited_ns()
    first, steady = _take_turns(net, images, rounds, rng)
    spent = configuration.threads * max(1, time.perf_counter_ns() - start)
    share = (waited_ns() - waited) / spent
    if share > _MOST_WAITING:
        print(
            f"rsfast.latency: warning: {configuration} waited {share:.0%} of the time for a core "
            "that others had: its latencies are those of a busy machine",
            file=sys.stderr,
        )
    memory_mib = held_mib() - before
    alone = len(images) == 1  # and nothing to switch to
    return [
        Row(
            **asdict(configuration),
            resolution=resolution,
            p50_ms=round(float(np.median(times)), 4),
            p95_ms=round(float(np.percentile(times, 95)), 4),
            load_ms=round(load_ms, 1),
            memory_mib=round(memory_mib, 2),
            switch_ms=None
            if alone
            else round(float(np.median(first[resolution]) - np.median(times)), 4),
            rounds=rounds,
        )
        for resolution, times in steady.items()
    ]


def _take_turns(
    net: Network, images: dict[int, np.ndarray], rounds: int, rng: np.random.Generator
) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Milliseconds of the first calls after a switch and of the others, by resolution."""
    first: dict[int, list[float]] = {r: [] for r in images}
    steady: dict[int, list[float]] = {r: [] for r in images}
    for batch in images.values():
        for _ in range(_WARM_UP):
            net(batch)
    last = None
    for _ in range(rounds):
        order = rng.permutation(list(images)).tolist()
        if order[0] == last:  # which would be no switch
            order.reverse()
        for last in order:
            times = []
            for _ in range(1 + _STEADY):
                start = time.perf_counter_ns()
                net(images[last])
                times.append(_ms_since(start))
            first[last].append(times[0])
            steady[last] += times[1:]
    return first, steady


def _ms_since(start_ns: int) -> float:
    return (time.perf_counter_ns() - start_ns) / 1e6


def waited_ns() -> int:
    """How long the threads of this process could have run and had no core, added up."""
    return sum(int(path.read_text().split()[1]) for path in _TASKS.glob("*/schedstat"))


def _images(
    manifest: Manifest, batch: int, resolution: int, rng: np.random.Generator
) -> np.ndarray:
    shape = (batch, 3, resolution, resolution)
    if manifest.input_dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.standard_normal(shape, dtype=np.float32)


def held_mib() -> float:
    """Memory of this process that no file backs, after free memory went back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library has it
    if trim is not None:
        trim(0)
    for line in _SMAPS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Anonymous":
            return int(value.split()[0]) / 1024
    raise RuntimeError(f"{_SMAPS} has no line Anonymous")


def _in_own_process(folder: Path, configuration: Configuration, rounds: int) -> list[Row]:
    context = multiprocessing.get_context("spawn")  # a fork would begin with this one's memory
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(measure, folder, configuration, rounds).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"the process of {configuration} was killed") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 bad input, 1 measuring failed, 130 interrupted."""
    args = _parse(argv)
    try:
        if args.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {args.rounds}")
        if not _SMAPS.exists():
            raise ValueError(f"memory is read from {_SMAPS}, which only Linux has")
        folder = args.output or args.folder
        resolutions = Manifest.read(args.folder).resolutions
        known = _checked(args.folder)
        if args.accuracy:
            evaluated = _evaluated(args.accuracy, resolutions)
            known |= {"fp32": evaluated, "bf16": evaluated}
        make_writable(folder)
        rows: list[Row] = []
        for configuration in _configurations(args):
            found = _in_own_process(args.folder, configuration, args.rounds)
            rows += (_with_top1(row, known[row.precision]) for row in found)
            _show(configuration, rows[-len(found) :])
        _write(rows, folder)
    except (ValueError, ImportError) as error:
        print(f"rsfast.latency: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"rsfast.latency: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rsfast.latency: interrupted; nothing is written", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rsfast.latency",
        description="Latency, memory and cost of a switch of an exported network on this machine, "
        "in all combinations of the flags.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="that rsfast.export wrote")
    add("--runtime", nargs="+", choices=tuple(RUNTIMES), default=["onnxruntime"])
    add("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    add("--mode", nargs="+", choices=MODES, default=["fast"], help="as in rsfast.deploy.load")
    add("--threads", nargs="+", type=int, default=[1], metavar="T")
    add("--batch", nargs="+", type=int, default=[1], metavar="N", help="images of a call")
    add("--rounds", type=int, default=25, help="turns of each resolution, of 5 calls (default 25)")
    add(
        "--accuracy",
        type=Path,
        metavar="CSV",
        help="accuracy.csv of rsfast.evaluate, for fp32 and bf16; by default what `rsfast.export "
        "check DIR --data` has measured, of int8 always that",
    )
    add("--output", type=Path, help="folder for latency.csv and latency.png; by default DIR")
    return parser.parse_args(argv)


def _configurations(args: argparse.Namespace) -> list[Configuration]:
    """All combinations that there are; those that there are not are named on screen."""
    lists = (args.runtime, args.precision, args.mode, args.threads, args.batch)
    kept, reasons = [], []
    for values in itertools.product(*(dict.fromkeys(part) for part in lists)):
        configuration = Configuration(*values)
        for name in ("threads", "batch"):
            if getattr(configuration, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(configuration, name)}")
        try:
            refuse(configuration.runtime, configuration.mode, configuration.precision)
        except ValueError as error:
            reasons.append(str(error))
            continue
        model_file(args.folder, configuration.precision)
        library(configuration.runtime)
        kept.append(configuration)
    if not kept:
        raise ValueError(reasons[0])
    for reason in dict.fromkeys(reasons):
        print(f"left out: {reason}")
    return kept


def _evaluated(file: Path, resolutions: Iterable[int]) -> dict[int, float]:
    """Top-1 by resolution, as rsfast.evaluate writes it."""
    try:
        rows = [row for row in read_rows(file) if row["resolution"] != "ensemble"]
        found = {int(row["resolution"]): float(row["top1"]) for row in rows}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} must be a CSV file with resolution and top1: {error}") from error
    if missing := [r for r in resolutions if r not in found]:
        raise ValueError(f"{file} must have the accuracy at all resolutions, {missing} are missing")
    return found


def _checked(folder: Path) -> dict[str, dict[int, float]]:
    """Precision -> top-1 by resolution, as far as `rsfast.export check` has measured it."""
    path = folder / VALIDATION_FILE
    known: dict[str, dict[int, float]] = {precision: {} for precision in PRECISIONS}
    if path.exists():
        try:
            content = json.loads(path.read_text())["top1"]
            known |= {
                precision: {int(resolution): float(top1) for resolution, top1 in values.items()}
                for precision, values in content.items()
            }
        except (OSError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return known


def _with_top1(row: Row, known: dict[int, float]) -> Row:
    return Row(**{**asdict(row), "top1": known.get(row.resolution)})


def _show(configuration: Configuration, rows: Sequence[Row]) -> None:
    print(f"{configuration}: loaded in {rows[0].load_ms:.0f} ms, {rows[0].memory_mib:.1f} MiB")
    print(f"{'resolution':>12}{'p50 ms':>10}{'p95 ms':>10}{'switch ms':>12}{'top-1':>8}")
    for row in rows:
        switch = "" if row.switch_ms is None else f"{row.switch_ms:.2f}"
        top1 = "" if row.top1 is None else f"{row.top1:.2f}"
        print(f"{row.resolution:>12}{row.p50_ms:>10.2f}{row.p95_ms:>10.2f}{switch:>12}{top1:>8}")


def _write(rows: Sequence[Row], folder: Path) -> None:
    """latency.csv and, where it can be drawn, latency.png."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "latency.csv", (_texts(row) for row in rows))
        print(f"written: {folder / 'latency.csv'}")
        _draw(folder)
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be written: {error}") from error


def _draw(folder: Path) -> None:
    try:  # loads a plotting library, which the measured processes do without
        from rsfast import figures
    except ImportError as error:
        print(
            f"rsfast.latency: no picture, {error}: pip install matplotlib, then "
            f"python -m rsfast.figures {folder}",
            file=sys.stderr,
        )
        return
    figures.draw(folder)
    print(f"written: {folder / 'latency.png'}")


def _texts(row: Row) -> dict[str, Any]:
    return {name: "" if value is None else value for name, value in asdict(row).items()}


if __name__ == "__main__":
    sys.exit(main())
