"""The training step against its rivals, interleaved: `python -m bench.train_step --output FOLDER`.

Implementations that train the same thing must lose the same at their first step. Times are of
the wall clock over several steps, so that what the host costs is in them. Rows are written as they
come.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import bench_train_step as bench
from bench import roofline
from bench.results_file import Results
from bench.shapes import ARCHITECTURES
from bench.timing import DEVICE, ON_GPU, time_steps
from rsfast.engine import PRECISIONS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.train_step", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--archs", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--batches", nargs="+", type=int, default=[bench.BATCH])
    parser.add_argument("--resolutions", nargs="+", type=int, default=bench.RESOLUTIONS)
    parser.add_argument("--precision", choices=list(PRECISIONS), default=bench.PRECISION)
    parser.add_argument(
        "--impls", nargs="+", choices=bench.IMPLEMENTATIONS, default=bench.IMPLEMENTATIONS
    )
    parser.add_argument("--rounds", type=int, default=10, help="of each implementation (10)")
    parser.add_argument("--steps", type=int, default=5, help="in a round (5)")
    args = parser.parse_args(argv)
    results = Results(args.output, DEVICE)
    copy, rate = roofline.measure_card(results)
    for arch in args.archs:
        floors = roofline.step_floors(arch, tuple(args.resolutions))
        results.add(f"card/floor_flops/{arch}", [rate / floors.flops], "images/s")
        results.add(f"card/floor_bytes/{arch}", [copy / floors.bytes_16_bit], "images/s")
        for batch in args.batches:
            setting = bench.Setting(arch, batch, args.precision, tuple(args.resolutions))
            _race(setting, args.impls, args.rounds, args.steps, results)
    return 0


def _race(
    setting: bench.Setting, impls: Sequence[str], rounds: int, steps: int, results: Results
) -> None:
    runs, losses, peaks = {}, {}, {}
    for impl in impls:
        try:
            _forget_peak()
            run = bench.make_step(setting, impl)
            losses[impl] = float(run())
            run()
        except torch.OutOfMemoryError:
            print(f"left out: {impl} of {setting} does not fit into memory")
            continue
        runs[impl], peaks[impl] = run, _peak_gib()
    bench.check_losses(losses)
    for impl, seconds in time_steps(runs, rounds=rounds, steps=steps).items():
        precision = "fp32" if impl.endswith("fp32") else setting.precision
        results.add(
            f"train_step/{setting.arch}/{precision}/b{setting.batch}/{impl}",
            [setting.batch / second for second in seconds],
            "images/s",
            peak_mem_gib=peaks[impl],
        )


def _forget_peak() -> None:
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None


if __name__ == "__main__":
    raise SystemExit(main())
