"""The training step against its rivals, interleaved, and whether the loader keeps up with it.

    python -m bench.step

Implementations that train the same thing must lose the same at their first step. Times are of
the wall clock over several steps, so that what the host costs is in them. Rows are written as they
come.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.models import roofline
from bench.step import bench_loader as loader
from bench.step import bench_train_step as race
from bench.support.results_file import Results
from bench.support.shapes import ARCHITECTURES, PAPER_ARCHITECTURES
from bench.support.timing import DEVICE, ON_GPU, time_steps
from rsfast.data.prefetching import prefetch
from rsfast.engine import PRECISIONS
from rsfast.kernels import choose_backend

__all__ = ["main"]

_ABOUT = """\
Steps of the same network and loss on the same images, implementations interleaved, wall clock; an
image counts once for all its resolutions. authors_* is a list of tensors through every layer, eager
or compiled; separate_amp one training for each resolution. card/floor_* is what the measured
matrix rate or copy bandwidth alone would allow. loader/* is from JPEG files to packed pyramids;
its demand_images_per_s, in summary.json, is what the fastest step takes. end_to_end/* trains from
a loader."""


_PARTS = ("race", "loaders", "end_to_end")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.step", description=_ABOUT)
    batches = [32, 64, 128, 256] if ON_GPU else [race.BATCH]
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--archs", nargs="+", choices=ARCHITECTURES, default=PAPER_ARCHITECTURES)
    parser.add_argument("--batches", nargs="+", type=int, default=batches)
    parser.add_argument("--resolutions", nargs="+", type=int, default=race.RESOLUTIONS)
    parser.add_argument("--precision", choices=list(PRECISIONS), default=race.PRECISION)
    parser.add_argument("--impls", nargs="+", choices=race.IMPLEMENTATIONS, help="(all)")
    parser.add_argument("--rounds", type=int, default=10, help="of each implementation (10)")
    parser.add_argument("--steps", type=int, default=5, help="in a round (5)")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="(all)")
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True  # as a run has it
    results = Results(args.output, "train_step", DEVICE)
    copy, rate = roofline.measure_card(results)
    resolutions = tuple(args.resolutions)
    impls = args.impls or race.implementations(args.precision)
    for arch in args.archs:
        floors = roofline.step_floors(arch, resolutions)
        results.add(f"card/floor_flops/{arch}", [rate / floors.flops], "images/s")
        results.add(f"card/floor_bytes/{arch}", [copy / floors.bytes_16_bit], "images/s")
        for batch in args.batches:
            setting = race.Setting(arch, batch, args.precision, resolutions)
            if "race" in args.parts:
                _race(setting, impls, args.rounds, args.steps, results)
    if "loaders" in args.parts:
        _race_loaders(args.rounds, results)
    if "end_to_end" in args.parts:
        largest = race.Setting(args.archs[0], max(args.batches), args.precision, resolutions)
        _train_from_loaders(largest, args.rounds, args.steps, results)
    results.finish(["bench.step", *(sys.argv[1:] if argv is None else argv)], _ABOUT)
    return 0


def _race(
    setting: race.Setting, impls: Sequence[str], rounds: int, steps: int, results: Results
) -> None:
    """Interleaves all that fit into memory at once; the rest races rsfast again, later."""
    anchor, waiting = impls[-1], list(impls)
    while waiting:
        runs, peaks, broken = _build(setting, [anchor, *(i for i in waiting if i != anchor)])
        waiting = [impl for impl in waiting if impl not in broken]
        new = [impl for impl in waiting if impl in runs]
        if not new:
            if waiting:
                print(f"left out, do not fit into memory: {', '.join(waiting)} of {setting}")
            return
        times = time_steps(runs, rounds=rounds, steps=steps)
        rates = {i: [setting.batch / second for second in times[i]] for i in runs}
        for impl in new:
            precision = "fp32" if impl.endswith("fp32") else setting.precision
            results.add(
                f"train_step/{setting.arch}/{precision}/b{setting.batch}/{impl}",
                rates[impl],
                "images/s",
                peak_mem_gib=peaks[impl],
                **{f"{anchor}_in_this_race": statistics.median(rates.get(anchor, [math.nan]))},
            )
        waiting = [impl for impl in waiting if impl not in runs]
        del runs


def _build(
    setting: race.Setting, impls: Sequence[str]
) -> tuple[dict[str, race.Step], dict[str, float | None], list[str]]:
    """What fits into memory beside each other, the GiB that each takes at most, what is broken."""
    runs, losses, peaks, broken = {}, {}, {}, []
    for impl in impls:
        before = _reset_peak()
        try:
            run = race.make_step(setting, impl)
            losses[impl] = float(run())
            run()
        except torch.OutOfMemoryError:
            continue
        except Exception as error:  # what a rival cannot do must not end the race of the others
            if impl.startswith("rsfast"):
                raise
            print(f"left out: {impl} of {setting}: {type(error).__name__}: {error}"[:500])
            broken.append(impl)
            continue
        runs[impl] = run
        peaks[impl] = (torch.cuda.max_memory_allocated() - before) / 2**30 if ON_GPU else None
    race.check_losses(losses)
    return runs, peaks, broken


def _race_loaders(rounds: int, results: Results) -> None:
    """Each loader by itself: they would take each other's cores."""
    demand = max(
        (r["value"] for r in results.rows if r["name"].split("/")[-1].startswith("rsfast")),
        default=None,
    )
    for backend, device in loader.CASES:
        run = loader.make_run(backend, device)
        seconds = time_steps({backend: run}, rounds=max(2, rounds // 2), steps=1)[backend]
        results.add(
            f"loader/{backend}/{device}",
            [loader.rates(second)["images_per_s"] for second in seconds],
            "images/s",
            cores=loader.CORES,
            demand_images_per_s=demand,
        )


def _train_from_loaders(setting: race.Setting, rounds: int, steps: int, results: Results) -> None:
    """The same step fed with one random batch, and with JPEG files."""
    step = race.rsfast_step(setting, graph=ON_GPU)
    files = "dali" if loader.HAS_DALI else "pil"
    runs = {name: _fed(step, setting, name) for name in ("synthetic", files)}
    for name, seconds in time_steps(runs, rounds=rounds, steps=steps).items():
        results.add(
            f"end_to_end/{setting.arch}/{setting.precision}/b{setting.batch}/{name}",
            [setting.batch / second for second in seconds],
            "images/s",
        )


def _fed(step: Callable[..., Any], setting: race.Setting, backend: str) -> Callable[[], Any]:
    source = loader.make_loader(backend, DEVICE.type, setting.batch, setting.resolutions)
    dtype = PRECISIONS[setting.precision] or torch.float32
    source.feed(dtype, 4 if ON_GPU else 3, choose_backend("auto", DEVICE))
    batches = loader.endless(lambda: prefetch(source, DEVICE))
    return lambda: step(next(batches))


def _reset_peak() -> int:
    """Bytes that are taken now."""
    if not ON_GPU:
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    raise SystemExit(main())
