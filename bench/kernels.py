"""All operations against their rivals, interleaved: `python -m bench.kernels --output FOLDER`.

Correctness is asserted on the timed inputs first. Times of the layers of a network are added up,
each as often as the network has it. Writes summary.json and prints a short table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import bench_distillation_loss as loss
from bench import bench_global_avg_pool as pool
from bench import bench_switchable_bn_act as norm
from bench import roofline
from bench.record import check_alike
from bench.results_file import make_row, write_summary
from bench.shapes import ARCHITECTURES, batch_norm_layers
from bench.timing import DEVICE, time_interleaved

__all__ = ["main"]

Row = dict[str, Any]
Runs = Mapping[str, Callable[[], Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for summary.json")
    parser.add_argument("--archs", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--rounds", type=int, default=30, help="of each implementation (30)")
    parser.add_argument("--without", nargs="+", default=[], help="implementations to leave out")
    args = parser.parse_args(argv)
    copy = roofline.copy_bandwidth(DEVICE)
    rows = [
        {"name": "card/copy_bandwidth", "value": copy / 1e9, "unit": "GB/s"},
        {
            "name": "card/matmul_bf16",
            "value": roofline.matmul_rate(DEVICE) / 1e12,
            "unit": "TFLOP/s",
        },
    ]
    bench = Bench(args.rounds, copy, args.without)
    rows += bench.losses()
    for arch in args.archs:
        rows += bench.pooling(arch)
        rows += bench.batch_norms(arch)
    write_summary(args.output, rows, DEVICE)
    for row in rows:
        share = f"{row['share_of_copy_bandwidth']:7.1%}" if "share_of_copy_bandwidth" in row else ""
        print(f"{row['name']:75s} {row['value']:12.1f} {row['unit']:8s} {share}")
    return 0


class Bench:
    """Times of one session on one device.

    Args:
        rounds: of each implementation.
        copy_bandwidth: of the device, bytes per second.
        without: names of implementations to leave out.
    """

    def __init__(self, rounds: int, copy_bandwidth: float, without: Sequence[str]) -> None:
        self.rounds = rounds
        self.copy_bandwidth = copy_bandwidth
        self.without = without
        self.done: dict[tuple[Any, ...], dict[str, list[float]]] = {}

    def losses(self) -> Iterator[Row]:
        """Forward and backward of the loss."""
        for shape in loss.SHAPES:
            for dtype in loss.DTYPES:
                runs = loss.make_runs(shape, dtype)
                times = self._time(runs, loss.IMPLEMENTATIONS, dtype, list)
                moved = loss.moved_bytes(shape, dtype)
                group = "distillation_loss/R{}-N{}-K{}".format(*shape)
                yield from self._rows(group, dtype, "forward_backward", times, moved)

    def pooling(self, arch: str) -> Iterator[Row]:
        """Pooling of one network."""
        for dtype in pool.DTYPES:
            for direction in pool.PASSES:
                runs = pool.make_runs(arch, dtype, direction)
                times = self._time(runs, pool.IMPLEMENTATIONS, dtype, pool.as_packed)
                moved = pool.moved_bytes(arch, dtype, direction)
                yield from self._rows(f"global_avg_pool/{arch}", dtype, direction, times, moved)

    def batch_norms(self, arch: str) -> Iterator[Row]:
        """Every kind of batch-norm layer of one network, then all of them together."""
        layers = batch_norm_layers(arch, norm.RESOLUTIONS)
        for dtype in norm.DTYPES:
            for direction in norm.PASSES:
                totals: dict[str, list[float]] = {}
                moved_in_all = 0
                for layer, count in layers.items():
                    moved = norm.moved_bytes(layer, dtype, direction)
                    moved_in_all += count * moved
                    key = (layer, dtype, direction)
                    if key not in self.done:
                        runs = norm.make_runs(layer, dtype, direction)
                        self.done[key] = self._time(
                            runs, norm.IMPLEMENTATIONS, dtype, norm.as_packed
                        )
                        group = f"switchable_bn_act/{layer}"
                        yield from self._rows(group, dtype, direction, self.done[key], moved)
                    for impl, times in self.done[key].items():
                        before = totals.get(impl, [0.0] * len(times))
                        totals[impl] = [a + count * b for a, b in zip(before, times, strict=True)]
                group = f"switchable_bn_act/{arch}"
                yield from self._rows(group, dtype, direction, totals, moved_in_all)

    def _time(
        self, runs: Runs, names: Sequence[str], dtype: torch.dtype, pack: Callable[[Any], Any]
    ) -> dict[str, list[float]]:
        wanted = pack(runs["reference"]())
        chosen = {n: runs[n] for n in names if n in runs and n not in self.without}
        for run in chosen.values():
            check_alike(pack(run()), wanted, dtype)
        return time_interleaved(chosen, DEVICE, rounds=self.rounds)

    def _rows(
        self,
        group: str,
        dtype: torch.dtype,
        direction: str,
        times: Mapping[str, Sequence[float]],
        moved_bytes: int,
    ) -> Iterator[Row]:
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        for impl, seconds in times.items():
            bandwidth = moved_bytes / statistics.median(seconds)
            yield make_row(
                f"kernel/{group}/{short}/{direction}/{impl}",
                [1e6 * second for second in seconds],
                "us",
                bandwidth_gb_s=bandwidth / 1e9,
                share_of_copy_bandwidth=bandwidth / self.copy_bandwidth,
            )


if __name__ == "__main__":
    raise SystemExit(main())
