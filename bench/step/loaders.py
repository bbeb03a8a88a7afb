"""Loaders with few and many threads: `python -m bench.step.loaders`.

Each by itself, because they would take each other's cores. On a GPU, DALI is tried with several
shares of the images for the GPU's own JPEG decoder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.step import bench_loader as loader
from bench.support.results_file import Results
from bench.support.timing import DEVICE, time_steps

__all__ = ["main"]

_ABOUT = """\
Images per second from JPEG files of the built-in set to packed pyramids; an image counts once for
all its resolutions. Nothing else runs: beside a training step it is less."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.step.loaders", description=__doc__)
    threads = sorted({min(4, loader.CORES), min(8, loader.CORES), loader.CORES})
    parser.add_argument("--output", type=Path, help="folder (a new one in bench/results)")
    add = parser.add_argument
    add("--threads", type=int, nargs="+", default=threads, help=f"of DALI {threads}; Pillow: most")
    loads = [0.0, 0.65, 0.9]
    add("--hw-decoder-load", type=float, nargs="+", default=loads, help=f"on a GPU {loads}")
    parser.add_argument("--rounds", type=int, default=3, help="of each (3)")
    args = parser.parse_args(argv)
    if min(args.threads) < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    if not all(0 <= load <= 1 for load in args.hw_decoder_load):
        parser.error("--hw-decoder-load must be in [0, 1]")
    results = Results(args.output, "loaders", DEVICE)
    for name, backend, device, options in _cases(args.threads, args.hw_decoder_load):
        run = loader.make_run(backend, device, **options)
        seconds = time_steps({name: run}, rounds=args.rounds, steps=1)[name]
        rates = [loader.rates(second)["images_per_s"] for second in seconds]
        results.add(f"loader/{name}", rates, "images/s", cores=loader.CORES)
    results.finish(["bench.step.loaders", *(sys.argv[1:] if argv is None else argv)], _ABOUT)
    return 0


def _cases(
    threads: Sequence[int], loads: Sequence[float]
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(name, backend, where it decodes, options)."""
    for backend, device in loader.CASES:
        for workers in threads if backend == "dali" else threads[-1:]:
            name = f"{backend}/{device}/threads{workers}"
            if device == "cpu":
                yield name, backend, device, {"workers": workers}
                continue
            for load in loads:
                options = {"workers": workers, "hw_decoder_load": load}
                yield f"{name}/hw{load:g}", backend, device, options


if __name__ == "__main__":
    raise SystemExit(main())
