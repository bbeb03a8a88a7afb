"""All operations against their rivals, interleaved: `python -m bench.ops`.

Correctness is asserted on the timed inputs first. Times of the layers of a network are added up,
each as often as the network has it. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import operator
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.models import roofline
from bench.ops import bench_bn_act_max_pool as max_pool
from bench.ops import bench_conv2d as conv
from bench.ops import bench_distillation_loss as loss
from bench.ops import bench_global_avg_pool as pool
from bench.ops import bench_lq_activation as quantised
from bench.ops import bench_normalize as pixels
from bench.ops import bench_stem as stem
from bench.ops import bench_subsample as strided
from bench.ops import bench_switchable_bn_act as norm
from bench.support.installed import left_out
from bench.support.record import as_packed, check_alike
from bench.support.results_file import Results
from bench.support.shapes import ARCHITECTURES, PAPER_ARCHITECTURES, short_name
from bench.support.timing import DEVICE, ON_GPU, time_interleaved

__all__ = ["main"]

Times = dict[str, list[float]]
_LAYERS = {"conv2d": conv, "subsample": strided, "switchable_bn_act": norm}
_OPS = (
    *_LAYERS,
    *("bn_act_max_pool", "distillation_loss", "global_avg_pool", "stem", "normalize"),
    "lq_activation",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.ops", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--archs", nargs="+", choices=ARCHITECTURES, default=PAPER_ARCHITECTURES)
    parser.add_argument("--rounds", type=int, default=30, help="of each implementation (30)")
    parser.add_argument("--ops", nargs="+", choices=_OPS, default=_OPS, help="(all)")
    parser.add_argument("--without", nargs="+", default=[], help="implementations to leave out")
    args = parser.parse_args(argv)
    missing = left_out() if ON_GPU else f"rsfast's Triton kernels, compiled (no GPU), {left_out()}"
    print(f"left out: {', '.join([missing, *args.without])}")
    torch.backends.cudnn.benchmark = True  # as a run has it
    results = Results(args.output, "ops", DEVICE)
    session = Session(args.rounds, results, args.without)
    if "distillation_loss" in args.ops:
        session.losses()
    if "normalize" in args.ops:
        session.normalization()
    if any(arch.startswith("res") for arch in args.archs):  # ResNets and ResNeXts
        session.stem(args.ops)
    if "lq_activation" in args.ops:
        session.layers(quantised, "lq_activation", quantised.ARCH)
    for arch in args.archs:
        if "global_avg_pool" in args.ops:
            session.pooling(arch)
        for op, module in _LAYERS.items():
            if op in args.ops and module.layers(arch):
                session.layers(module, op, arch)
    results.finish(
        ["bench.ops", *(sys.argv[1:] if argv is None else argv)],
        "Each operation on the shapes of the networks, implementations interleaved, device time. "
        "Rows named after a network add up its layers, each as often as it has it. "
        f"Left out: {', '.join([missing, *args.without])}.",
    )
    return 0


class Session:
    """Times of one session on one device.

    Args:
        rounds: of each implementation.
        results: where rows go.
        without: names of implementations to leave out.
    """

    def __init__(self, rounds: int, results: Results, without: Sequence[str]) -> None:
        self._rounds = rounds
        self._results = results
        self._without = without
        self._layers: dict[tuple[Any, ...], Times] = {}
        self._copy_bandwidth, _ = roofline.measure_card(results)

    def losses(self) -> None:
        """Forward and backward of the loss."""
        for case in loss.CASES:
            shape, kind = case
            for dtype in loss.dtypes_of(case):
                runs = loss.make_runs(shape, dtype, kind)
                times = self._time(runs, loss.IMPLEMENTATIONS, list)
                group = f"distillation_loss/{loss.case_name(case)}"
                moved = loss.moved_bytes(shape, dtype)
                self._add(f"{group}/{short_name(dtype)}/forward_backward", times, moved)

    def normalization(self) -> None:
        """Pixels to the input of the network."""
        for dtype in pixels.DTYPES:
            for channels in pixels.CHANNELS:
                runs = pixels.make_runs(dtype, channels)
                times = self._time(runs, pixels.IMPLEMENTATIONS, list)
                moved = pixels.moved_bytes(dtype, channels)
                self._add(f"normalize/C{channels}/{short_name(dtype)}/forward", times, moved)

    def stem(self, ops: Sequence[str] = _OPS) -> None:
        """The first convolution of a ResNet and what follows it: the same in all of them."""
        for module, op in ((stem, "stem"), (max_pool, "bn_act_max_pool")):
            if op not in ops:
                continue
            for dtype in module.DTYPES:
                for direction in module.PASSES:
                    self._layer(module, op, module.STEM, dtype, direction)

    def pooling(self, arch: str) -> None:
        """Pooling of one network."""
        for dtype in pool.DTYPES:
            for direction in pool.PASSES:
                runs = pool.make_runs(arch, dtype, direction)
                times = self._time(runs, pool.IMPLEMENTATIONS, as_packed)
                moved = pool.moved_bytes(arch, dtype, direction)
                self._add(f"global_avg_pool/{arch}/{short_name(dtype)}/{direction}", times, moved)

    def layers(self, module: Any, op: str, arch: str) -> None:
        """Every kind of a network's layers that an operation computes, then all of them together.

        Args:
            module: the benchmark of the operation.
            op: its name.
            arch: name of the network.
        """
        layers = module.layers(arch)
        for dtype in module.DTYPES:
            for direction in module.PASSES:
                each = [self._layer(module, op, layer, dtype, direction) for layer in layers]
                moved = [module.moved_bytes(layer, dtype, direction) for layer in layers]
                # A sum over some of the layers would be a sum of something else.
                everywhere = set.intersection(*(set(times) for times in each))
                counts = list(layers.values())
                totals = {
                    impl: [
                        sum(map(operator.mul, counts, once))
                        for once in zip(*(times[impl] for times in each), strict=True)
                    ]
                    for impl in each[0]
                    if impl in everywhere
                }
                in_all = sum(map(operator.mul, counts, moved))
                self._add(f"{op}/{arch}/{short_name(dtype)}/{direction}", totals, in_all)

    def _layer(self, module: Any, op: str, layer: Any, dtype: torch.dtype, direction: str) -> Times:
        key = (op, layer, dtype, direction)
        if key not in self._layers:
            runs = module.make_runs(layer, dtype, direction)
            self._layers[key] = self._time(runs, module.IMPLEMENTATIONS, as_packed)
            moved = module.moved_bytes(layer, dtype, direction)
            group = f"{op}/{layer}/{short_name(dtype)}/{direction}"
            self._add(group, self._layers[key], moved)
        return self._layers[key]

    def _time(
        self,
        runs: Mapping[str, Callable[[], Any]],
        names: Sequence[str],
        pack: Callable[[Any], Any],
    ) -> Times:
        chosen = [name for name in names if name in runs and name not in self._without]
        check_alike(runs, chosen, pack)
        return time_interleaved({n: runs[n] for n in chosen}, DEVICE, rounds=self._rounds)

    def _add(self, group: str, times: Times, moved_bytes: int) -> None:
        for impl, seconds in times.items():
            bandwidth = moved_bytes / statistics.median(seconds)
            self._results.add(
                f"kernel/{group}/{impl}",
                [1e6 * second for second in seconds],
                "us",
                bandwidth_gb_s=bandwidth / 1e9,
                share_of_copy_bandwidth=bandwidth / self._copy_bandwidth,
            )


if __name__ == "__main__":
    raise SystemExit(main())
