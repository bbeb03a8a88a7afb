"""latency.csv as the choice of resolution needs it: how slow and how accurate each one is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rsfast.files.tables import read_rows

__all__ = ["Row", "Table", "pareto"]

_CONFIGURATION = ("runtime", "precision", "mode", "threads", "batch")
_NEEDED = (*_CONFIGURATION, "resolution", "p50_ms", "p95_ms", "top1")


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Which of n things are worth their cost.

    Args:
        costs: [n], less is better.
        values: [n], more is better.

    Returns:
        [n] whether no other one costs at most as much, is worth at least as much, and differs.
    """
    points = list(zip(costs, values, strict=True))
    return [
        not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
        for cost, value in points
    ]


@dataclass(frozen=True, slots=True)
class Row:
    """One resolution, as it was measured on an idle machine.

    Attributes:
        resolution: in pixels.
        p50_ms, p95_ms: latency of one call of the network, median and 95th percentile.
        top1: accuracy in percent; None if it is not known.
    """

    resolution: int
    p50_ms: float
    p95_ms: float
    top1: float | None

    def latency_ms(self, percentile: float) -> float:
        """At a percentile from 50 to 95: on the straight line between the two measured ones.

        Latencies have a long upper tail, so that the line lies above what would be measured.
        """
        return self.p50_ms + (self.p95_ms - self.p50_ms) * (percentile - 50) / 45


@dataclass(frozen=True)
class Table:
    """Latency and accuracy of every resolution of one network in one configuration.

    Attributes:
        rows: one per resolution; any order is accepted, descending is stored.

    Raises:
        ValueError: if there are no rows, two of a resolution, a latency that is not positive, or
            an accuracy for some resolutions only.
    """

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        rows = tuple(sorted(self.rows, key=lambda row: -row.resolution))
        object.__setattr__(self, "rows", rows)
        if not rows:
            raise ValueError("a table must have at least one resolution, got none")
        for row, following in pairwise(rows):
            if row.resolution == following.resolution:
                raise ValueError(
                    f"a table must have one row per resolution, {row.resolution} has 2"
                )
        for row in rows:
            if not (0 < row.p50_ms <= row.p95_ms < math.inf):
                raise ValueError(
                    "latencies must be finite with 0 < p50_ms <= p95_ms, got "
                    f"{row.p50_ms} and {row.p95_ms} at {row.resolution}"
                )
        unknown = [row.resolution for row in rows if row.top1 is None]
        if unknown and len(unknown) < len(rows):
            raise ValueError(f"top1 must be known of all resolutions or none, not known: {unknown}")

    @classmethod
    def read(
        cls,
        path: Path | str,
        *,
        runtime: str | None = None,
        precision: str | None = None,
        mode: str | None = None,
        threads: int | None = None,
        batch: int | None = None,
    ) -> Table:
        """The rows of one configuration in a file that `python -m rsfast.latency` wrote.

        Args:
            path: of latency.csv.
            runtime, precision, mode, threads, batch: of the configuration; what the file has
                only one of may be left out.

        Raises:
            ValueError: if the file is no such table, or has no such configuration, or several.
        """
        try:
            rows = read_rows(Path(path))
        except OSError as error:
            raise ValueError(f"{path} must be a table of rsfast.latency: {error}") from error
        if missing := sorted(set(_NEEDED) - set(rows[0] if rows else ())):
            raise ValueError(f"{path} must be a table of rsfast.latency, it has no {missing}")
        wanted = dict(zip(_CONFIGURATION, (runtime, precision, mode, threads, batch), strict=True))
        for name, value in wanted.items():
            known = sorted({row[name] for row in rows})
            if value is not None:
                rows = [row for row in rows if row[name] == str(value)]
            if not rows:
                raise ValueError(f"{path} must have rows of {name} {value}, it has {known}")
        for name in _CONFIGURATION:
            if len(known := sorted({row[name] for row in rows})) > 1:
                raise ValueError(f"{path} has several values of {name}, choose one of {known}")
        try:
            return cls(tuple(map(_row, rows)))
        except ValueError as error:
            raise ValueError(f"{path} is no table to choose from: {error}") from error

    def accuracies(self) -> list[float]:
        """What orders the rows by accuracy: top1, or the resolution where that is not known."""
        return [row.resolution if row.top1 is None else row.top1 for row in self.rows]

    def worthwhile(self, percentile: float) -> list[Row]:
        """The Pareto set, fastest and least accurate first.

        Args:
            percentile: of latency, from 50 to 95.
        """
        costs = [row.latency_ms(percentile) for row in self.rows]
        kept = pareto(costs, self.accuracies())
        ordered = sorted(zip(costs, self.rows, kept, strict=True), key=lambda item: item[0])
        return [row for _, row, keep in ordered if keep]


def _row(texts: dict[str, str]) -> Row:
    top1 = texts["top1"]
    return Row(
        resolution=int(texts["resolution"]),
        p50_ms=float(texts["p50_ms"]),
        p95_ms=float(texts["p95_ms"]),
        top1=float(top1) if top1 else None,
    )
