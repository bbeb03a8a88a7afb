"""Class folders, tar shards and Parquet files against each other: `python -m bench.data IMAGES`.

IMAGES is a zip file of photographs called wnid_word.JPEG. Everything is written to a temporary
folder, the caches of rsfast included.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.data.forms import make_forms, make_large_index, unpack
from bench.support.results_file import Results
from bench.support.shapes import PAPER_RESOLUTIONS
from bench.support.timing import time_steps
from rsfast.data import Loader, open_split, train_loader
from rsfast.data.shards import index_shards

__all__ = ["main"]

_ABOUT = """\
Images per second of one core, from the same photographs stored in four ways ({images} images of
{kilobytes:.0f} kB on average, {copies} copies of each of {photographs} photographs; all of them in
the system's page cache). `read`: bytes only, in random order. `pil` and `dali`: training batches
of {batch} at {resolutions} pixels, Pillow in this process, DALI with one thread on the CPU.
`parquet` is not compressed, so that every image is one seek; `parquet-snappy` is as Hugging Face
writes it, with 100 rows in a row group. The forms are interleaved, round by round. `index`: shards
indexed for the first time with one thread. `start`: a warm start on a generated index of {entries}
entries in 1024 shards, and the memory that the index takes, per million entries.
{shared}"""
_SHARED = "Other processes used the machine at the same time: only ratios within a round count."
# Prints seconds and bytes of memory of a warm start.
_START = """
import sys, time
from rsfast.data.dataset import open_split
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
open_split(sys.argv[2], "train")
import gc; gc.collect()
before, start = resident(), time.perf_counter()
index = open_split(sys.argv[1], "train")
seconds = time.perf_counter() - start
gc.collect()
print(len(index), seconds, resident() - before)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.data", description=__doc__)
    add = parser.add_argument
    add("images", type=Path, help="zip file of photographs")
    add("--output", type=Path, help="folder (a new one in bench/results)")
    add("--rounds", type=int, default=7, help="of each (7)")
    add("--copies", type=int, default=8, help="of each photograph (8)")
    add("--batch", type=int, default=32, help="images (32)")
    add("--batches", type=int, default=4, help="per round (4)")
    add("--entries", type=int, default=1_281_167, help="of the generated index (1281167)")
    add("--shared", action="store_true", help="say that the machine was not quiet")
    args = parser.parse_args(argv)
    if min(args.rounds, args.copies, args.batch, args.batches, args.entries) < 1:
        parser.error("all numbers must be at least 1")
    if not args.images.is_file():
        parser.error(f"images must be a zip file, got {args.images}")
    torch.set_num_threads(1)
    results = Results(args.output, "data", torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="rsfast-bench-") as place:
        os.environ["RSFAST_CACHE"] = os.path.join(place, "cache")
        about = _measure(results, args, Path(place))
    results.finish(["bench.data", *(sys.argv[1:] if argv is None else argv)], about)
    return 0


def _measure(results: Results, args: argparse.Namespace, place: Path) -> str:
    """Adds all rows; returns what was measured."""
    folder = unpack(args.images, place / "folder", args.copies)
    forms = make_forms(folder, place)
    indexes = {form: open_split(root, "train") for form, root in forms.items()}
    digests = {form: index.read(len(index) // 2) for form, index in indexes.items()}
    assert len({*digests.values()}) == 1, "the forms hold other images"
    count = len(indexes["folder"])
    order = np.random.default_rng(0).permutation(count)[: args.batch * args.batches].tolist()
    runs = {form: _reading(index.read, order) for form, index in indexes.items()}
    _add(results, "read", runs, len(order), args.rounds)
    backends = ["pil", *(["dali"] if importlib.util.find_spec("nvidia") else [])]
    for backend in backends:
        loaders = {form: _loader(root, backend, args) for form, root in forms.items()}
        _assert_same(loaders)
        runs = {form: _epoch(loader) for form, loader in loaders.items()}
        _add(results, backend, runs, args.batch * args.batches, args.rounds)
    shards = sorted(map(str, (forms["shards"] / "train").glob("*.tar")))
    runs = {"shards": lambda: index_shards(shards, workers=1, cache=False)}
    _add(results, "index", runs, count, args.rounds)
    _add_starts(results, args, place, forms["shards"])
    size = sum(len(indexes["shards"].read(row)) for row in range(0, count, args.copies))
    return _ABOUT.format(
        images=count,
        kilobytes=size / (count // args.copies) / 1e3,
        photographs=count // args.copies,
        copies=args.copies,
        batch=args.batch,
        resolutions=", ".join(map(str, PAPER_RESOLUTIONS)),
        entries=args.entries,
        shared=_SHARED if args.shared else "",
    ).strip()


def _reading(read: Callable[[int], bytes], order: Sequence[int]) -> Callable[[], None]:
    def run() -> None:
        for position in order:
            read(position)

    return run


def _loader(root: Path, backend: str, args: argparse.Namespace) -> Loader:
    workers = 0 if backend == "pil" else 1
    return train_loader(
        root,
        PAPER_RESOLUTIONS,
        args.batch,
        backend=backend,
        workers=workers,
        max_steps=args.batches,
    )


def _assert_same(loaders: dict[str, Loader]) -> None:
    """No rate is shown for wrong batches."""
    for batches in zip(*loaders.values(), strict=True):
        for batch in batches[1:]:
            assert torch.equal(batch.images.rows, batches[0].images.rows)
            assert torch.equal(batch.labels, batches[0].labels)


def _epoch(loader: Loader) -> Callable[[], None]:
    """Batches from a standing start, so that none was made while another form was timed."""

    def run() -> None:
        for _ in loader:
            pass

    return run


def _add(
    results: Results, group: str, runs: dict[str, Callable[[], object]], images: int, rounds: int
) -> None:
    seconds = time_steps(runs, rounds=rounds, steps=1)
    for form, samples in seconds.items():
        results.add(f"{group}/{form}", [images / s for s in samples], "images/s")
    for form, samples in seconds.items():
        if form != "folder" and "folder" in seconds:
            ratios = [a / b for a, b in zip(seconds["folder"], samples, strict=True)]
            results.add(f"{group}/{form} over folder", ratios, "times")


def _add_starts(results: Results, args: argparse.Namespace, place: Path, small: Path) -> None:
    large = make_large_index(place / "large", args.entries)
    starts = []
    for _ in range(args.rounds):
        command = [sys.executable, "-c", _START, str(large), str(small)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert int(said[0]) == args.entries
        starts.append((float(said[1]), int(said[2])))
    results.add("start/shards", [seconds for seconds, _ in starts], "s", entries=args.entries)
    per_million = [size / args.entries * 1e6 / 2**20 for _, size in starts]
    results.add("start/shards memory per million", per_million, "MiB")


if __name__ == "__main__":
    raise SystemExit(main())
