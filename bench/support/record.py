"""What is checked before a time is taken, and what is kept with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.support.timing import ON_GPU

__all__ = ["as_packed", "check_alike", "record"]

Runs = Mapping[str, Callable[[], Any]]


def as_packed(results: Sequence[Any]) -> list[Tensor]:
    """Lists as one tensor each: images and rows of levels as rows, those of banks as [B, C]."""
    packed = []
    for result in results:
        if isinstance(result, list):
            levels = [r.permute(0, 2, 3, 1).flatten(0, 2) if r.dim() == 4 else r for r in result]
            result = torch.stack(levels) if levels[0].dim() == 1 else torch.cat(levels)
        packed.append(result)
    return packed


def check_alike(runs: Runs, names: Sequence[str], pack: Callable[[Any], list[Tensor]]) -> None:
    """No time is shown for a wrong result.

    Against `runs["exact"]`, the reference in float64, every named run may be at most twice as far
    off as `runs["reference"]`, in the root mean square, plus one rounding.

    Args:
        runs: callables on the same numbers.
        names: those to check.
        pack: makes a list of like tensors of what they return.
    """
    exact = pack(runs["exact"]())
    reference = pack(runs["reference"]())
    for name in names:
        results = pack(runs[name]())
        for result, eager, want in zip(results, reference, exact, strict=True):
            bound = 2 * _distance(eager, want) + torch.finfo(result.dtype).eps
            error = _distance(result, want)
            assert error <= bound, f"{name} is off by {error:.1e} of the result, above {bound:.1e}"


def _distance(value: Tensor, want: Tensor) -> float:
    value, want = value.detach().double(), want.detach().double()
    size = want.square().mean().sqrt().clamp_min(1e-30)
    return float((value - want).square().mean().sqrt() / size)


def record(
    benchmark: Any,
    run: Callable[[], Any],
    group: str,
    moved_bytes: int,
    copy_bandwidth: float,
) -> None:
    """Times a run, and notes the bytes it must move, GB/s, and the share of a copy's bandwidth.

    Caches are as the run before left them. Ten calls make a round on a GPU, so that the host's
    share shows in short ones only where it is the larger.
    """
    benchmark.group = group
    benchmark.pedantic(
        run,
        rounds=30 if ON_GPU else 3,
        warmup_rounds=3 if ON_GPU else 1,
        iterations=10 if ON_GPU else 1,
    )
    bandwidth = moved_bytes / benchmark.stats.stats.median if benchmark.stats else 0.0
    benchmark.extra_info |= {
        "moved_bytes": moved_bytes,
        "bandwidth_gb_s": bandwidth / 1e9,
        "share_of_copy_bandwidth": bandwidth / copy_bandwidth,
        "copy_bandwidth_gb_s": copy_bandwidth / 1e9,
    }
