"""What each method of a set takes to be as good as the first one is at the end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["RUNNING", "Cost", "costs_of"]

Rows = Sequence[Mapping[str, str]]

RUNNING = 3  # epochs that a figure is averaged over: single ones jump


class Cost(NamedTuple):
    """Of a method; None for what it does not reach."""

    method: str
    figure: float
    """At the end, in percent, mean over resolutions, seeds and RUNNING epochs."""
    epochs: int | None
    """Until it is as good as the first method is at the end."""
    seconds: float | None
    """In training steps till then, of all its networks together, mean over the seeds."""


def costs_of(rows: Rows, figure: str) -> list[Cost]:
    """Costs of all methods that were validated at the resolutions of the first one.

    Args:
        rows: of an epochs.csv.
        figure: of its columns, which is compared.
    """
    methods: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    resolutions = [{row["resolution"] for row in part} for part in methods.values()]
    curves = {
        name: _curve(part, figure)
        for (name, part), own in zip(methods.items(), resolutions, strict=True)
        if own == resolutions[0]
    }
    target = next(iter(curves.values()))[-1][1]
    found = []
    for name, curve in curves.items():
        reached = next(((n, seconds) for n, value, seconds in curve if value >= target), None)
        epochs, seconds = reached or (None, None)
        found.append(Cost(name, curve[-1][1], epochs, seconds))
    return found


def _curve(rows: Rows, figure: str) -> list[tuple[int, float, float]]:
    """Epoch, running mean of the figure, and seconds of all networks, mean over the seeds."""
    seeds = {row["seed"] for row in rows}
    values: dict[int, list[float]] = {}
    seconds: dict[int, dict[tuple[str, str], float]] = {}
    for row in rows:
        epoch = int(row["epoch"])
        values.setdefault(epoch, []).append(float(row[figure]))
        seconds.setdefault(epoch, {})[row["training"], row["seed"]] = float(row["train_s"])
    means = [statistics.mean(values[epoch]) for epoch in sorted(values)]
    return [
        (
            epoch,
            statistics.mean(means[max(0, number - RUNNING) : number]),
            sum(seconds[epoch].values()) / len(seeds),
        )
        for number, epoch in enumerate(sorted(values), start=1)
    ]
