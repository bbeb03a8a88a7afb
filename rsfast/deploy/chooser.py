"""Which resolution to run at, so that requests are answered in time and as well as possible.

A request's latency is modelled as L = fixed + slowdown * T(r): T(r) is what the table says of
resolution r on an idle machine, `fixed` what no resolution changes, such as decoding. Slowdown is
what is left, a busy machine as much as waiting for requests ahead. It is measured at the resolution
in use, from the P-th percentile of the last latencies there, so that "P % of the requests within
the objective" is what is controlled: an average would let the tail of a queue pass.

It carries to another resolution exactly if the machine is slow or if n clients wait for their
answers one after another (closed loop). Where requests come at a rate of their own (open loop), a
queue shrinks more than in proportion when the work does, and grows more: going down then goes
further than needed, and going up is tried on too good a prediction. Hence every step up is a trial.
If it is taken back, the next to the same resolution waits twice as long, up to a bound that limits
how often a resolution that cannot hold is tried at all.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from rsfast.deploy.table import Table

__all__ = ["Chooser", "Status"]

_WINDOW = 40  # requests that the percentile is taken of
_SPIKES = 2  # so many slow requests among them never change the resolution
_EVIDENCE = 20  # requests at a resolution before a step up from it
_MARGIN = 0.85  # share of the objective that a step up must be predicted to stay below
_HOLD_S = 2.0  # for so long, before the step is made
_LONGEST_HOLD_S = 64.0  # after trials that failed; a trial that lasted so long has succeeded


@dataclass(frozen=True, slots=True)
class Status:
    """What a chooser knows.

    Attributes:
        resolution: in use, in pixels.
        slowdown: of the table's latency, 1 on an idle machine.
        predicted_ms: latency at the percentile and resolution in use.
        objective_ms: that it should stay within.
        misses: whether even the fastest resolution is predicted to exceed the objective.
        requests, late: observed, and those of them that exceeded the objective.
        switches: of resolution, in all.
    """

    resolution: int
    slowdown: float
    predicted_ms: float
    objective_ms: float
    misses: bool
    requests: int
    late: int
    switches: int


class Chooser:
    """The most accurate resolution whose latency meets an objective, under the load of the moment.

    It starts with the most accurate resolution of the table's Pareto set that meets the objective
    on an idle machine, and never leaves that set. It goes down, as far as predicted to be needed,
    with the request that shows the need: at least the third slow one of the last 40 at the 95th
    percentile, the 21st at the 50th once 40 are known. One or two spikes never move it. It goes up
    one step when the prediction there has stayed below 0.85 of the objective for 2 s and at least
    20 requests; a step up that is taken back within 64 s doubles the 2 s of that step, up to 64 s,
    and one that was not resets them. So a resolution that meets the objective by less than 15 % is
    where it may start, but not where it returns to.

    One thread at a time may call `observe`; `resolution`, `misses` and `status` may be read by any.

    Args:
        table: of the network, the machine and the configuration that are in use.
        objective_ms: that a request should be answered within.
        percentile: share of the requests that should be, in percent, from 50 to 95.
        clock: seconds that never go back.

    Raises:
        ValueError: if objective or percentile are out of range.
    """

    def __init__(
        self,
        table: Table,
        objective_ms: float,
        percentile: float = 95,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < objective_ms < math.inf:
            raise ValueError(f"objective_ms must be positive and finite, got {objective_ms}")
        if not 50 <= percentile <= 95:
            raise ValueError(f"percentile must be from 50 to 95, got {percentile}")
        self.objective_ms = objective_ms
        self.percentile = percentile
        rows = table.worthwhile(percentile)
        self.resolutions = tuple(row.resolution for row in rows)
        self._latencies = tuple(row.latency_ms(percentile) for row in rows)
        self._clock = clock
        self._slowdown, self._fixed = 1.0, 0.0
        self._level = self._best()
        self._switched_at = self._unsafe_at = clock()
        self._window: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._holds = [_HOLD_S] * len(rows)
        self._raised_at = [-math.inf] * len(rows)
        self._requests = self._late = self._switches = 0

    @property
    def resolution(self) -> int:
        """To use for the next request, in pixels."""
        return self.resolutions[self._level]

    @property
    def misses(self) -> bool:
        """Whether even the fastest resolution is predicted to exceed the objective."""
        return self._predict(0) > self.objective_ms

    @property
    def fastest_ms(self) -> float:
        """Of a request at the fastest resolution: the table's, and what is fixed as seen so far."""
        return self._fixed + self._latencies[0]

    def status(self) -> Status:
        """Of this moment."""
        level = self._level
        return Status(
            resolution=self.resolutions[level],
            slowdown=self._slowdown,
            predicted_ms=self._predict(level),
            objective_ms=self.objective_ms,
            misses=self.misses,
            requests=self._requests,
            late=self._late,
            switches=self._switches,
        )

    def observe(self, resolution: int, latency_ms: float, fixed_ms: float = 0.0) -> None:
        """Tells of a request, as soon as it is answered.

        Requests that came before the last switch, and so waited behind others of the resolution
        before it, are counted but move nothing.

        Args:
            resolution: that it ran at.
            latency_ms: from its arrival to its answer, waiting included.
            fixed_ms: the part of it that is neither waiting for the network nor in the network.

        Raises:
            ValueError: if the resolution is not one to choose, or 0 <= fixed_ms <= latency_ms does
                not hold.
        """
        if resolution not in self.resolutions:
            raise ValueError(f"resolution must be one of {self.resolutions}, got {resolution}")
        if not 0 <= fixed_ms <= latency_ms < math.inf:
            raise ValueError(
                f"0 <= fixed_ms <= latency_ms must hold, got {fixed_ms} and {latency_ms}"
            )
        now = self._clock()
        self._requests += 1
        self._late += latency_ms > self.objective_ms
        if resolution == self.resolution and now - latency_ms / 1000 >= self._switched_at:
            self._measure(latency_ms, fixed_ms)
            self._decide(now)

    def _measure(self, latency_ms: float, fixed_ms: float) -> None:
        """Updates slowdown and the fixed part."""
        self._window.append((latency_ms, fixed_ms))
        above = math.floor(len(self._window) * (100 - self.percentile) / 100)
        place = max(_SPIKES, above)
        if len(self._window) > place:
            slowest = sorted((latency for latency, _ in self._window), reverse=True)
            self._fixed = min(fmean(fixed for _, fixed in self._window), slowest[place])
            self._slowdown = (slowest[place] - self._fixed) / self._latencies[self._level]

    def _decide(self, now: float) -> None:
        level = self._level
        if self._predict(level) > self.objective_ms:
            best = self._best()
            if best < level:
                failed = now - self._raised_at[level] < _LONGEST_HOLD_S
                hold = 2 * self._holds[level] if failed else _HOLD_S
                self._holds[level] = min(hold, _LONGEST_HOLD_S)
                self._switch(best, now)
            return
        if level + 1 == len(self.resolutions):
            return
        if self._predict(level + 1) >= _MARGIN * self.objective_ms:
            self._unsafe_at = now
        held = now - max(self._unsafe_at, self._switched_at) >= self._holds[level + 1]
        if held and len(self._window) >= _EVIDENCE:
            self._raised_at[level + 1] = now
            self._switch(level + 1, now)

    def _switch(self, level: int, now: float) -> None:
        self._level = level
        self._switched_at = now
        self._switches += 1
        self._window.clear()

    def _predict(self, level: int) -> float:
        """Latency in ms at the percentile."""
        return self._fixed + self._slowdown * self._latencies[level]

    def _best(self) -> int:
        """The most accurate level that is predicted to meet the objective, or the fastest."""
        fits = [k for k in range(len(self._latencies)) if self._predict(k) <= self.objective_ms]
        return max(fits, default=0)
