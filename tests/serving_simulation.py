"""A machine that serves one request after another, simulated, for the choice of resolution.

`PYTHONPATH=tests python -m serving_simulation` prints what docs/serving.md states.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rsfast.deploy.chooser import Chooser
from rsfast.deploy.table import Row, Table

# ms, about those of a ResNet-50 in int8 on one core; without accuracies the larger is the better.
TABLE = Table(
    tuple(
        Row(resolution, p50, 1.1 * p50, None)
        for resolution, p50 in ((224, 26.4), (192, 20.0), (160, 14.8), (128, 10.6), (96, 7.3))
    )
)
OBJECTIVE_MS = 60.0

Profile = Callable[[float], float]  # seconds -> value


class Clock:
    """Seconds, set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(order=True, slots=True)
class Answer:
    """One request: when it came, in seconds, and what became of it."""

    came: float
    latency_ms: float
    resolution: int


@dataclass
class Outcome:
    """Answers in their order, and (second, resolution) from the start on and after each switch."""

    answers: list[Answer] = field(default_factory=list)
    switches: list[tuple[float, int]] = field(default_factory=list)

    def within(self, objective_ms: float, since: float = 0.0, until: float = math.inf) -> float:
        """Share of the requests that came in a time and were answered within the objective."""
        chosen = [a.latency_ms <= objective_ms for a in self.answers if since <= a.came < until]
        return sum(chosen) / len(chosen)

    def in_use(self, second: float) -> int:
        """The resolution at a time."""
        return [resolution for at, resolution in self.switches if at <= second][-1]

    def mean_resolution(self, since: float, until: float) -> float:
        """Of the requests that came in a time."""
        return fmean(a.resolution for a in self.answers if since <= a.came < until)

    def count(self, since: float = 0.0, until: float = math.inf) -> int:
        """Switches in a time, the start not among them."""
        return sum(since <= at < until for at, _ in self.switches[1:])


def poisson(rate: Profile, seconds: float, seed: int) -> Iterator[float]:
    """Arrivals of an open loop at `rate` requests a second, independent of each other."""
    rng = random.Random(seed)
    now = 0.0
    while (now := now + rng.expovariate(rate(now))) < seconds:
        yield now


def simulate(
    arrivals: Iterator[float] | None,
    *,
    seconds: float,
    clients: Profile = lambda _: 0,
    slowdown: Profile = lambda _: 1.0,
    fixed_ms: float = 0.0,
    noise: float = 0.05,
    spikes: float = 0.0,
    percentile: float = 95,
    objective_ms: float = OBJECTIVE_MS,
    table: Table = TABLE,
    seed: int = 0,
) -> Outcome:
    """Requests in the order in which they come, each at the resolution chosen as its turn comes.

    Args:
        arrivals: of an open loop, ascending seconds; None for a closed loop.
        seconds: after which nothing comes.
        clients: of a closed loop: each sends its next request with the answer.
        slowdown: of the machine.
        fixed_ms: of each request, before its turn, at no cost to others.
        noise: deviation of the logarithm of the time that the network takes.
        spikes: share of the requests for which it takes ten times as long.
        percentile, objective_ms, table: of the chooser.
        seed: of noise and spikes.
    """
    rng = random.Random(seed)
    clock = Clock()
    chooser = Chooser(table, objective_ms, percentile, clock)
    times = {row.resolution: row.p50_ms for row in table.rows}
    outcome = Outcome(switches=[(0.0, chooser.resolution)])
    closed: list[float] = []  # when clients send next
    active, free = 0, 0.0
    while True:
        if arrivals is None:
            wanted = int(clients(free))
            while active < wanted:
                heapq.heappush(closed, free)
                active += 1
            came = heapq.heappop(closed)
        else:
            came = next(arrivals, math.inf)
        if came >= seconds:
            return outcome
        begin = max(free, came + fixed_ms / 1000)
        resolution = chooser.resolution
        service = times[resolution] * slowdown(begin) * math.exp(rng.gauss(0, noise))
        service *= 10 if rng.random() < spikes else 1
        free = begin + service / 1000
        answer = Answer(came, (free - came) * 1000, resolution)
        outcome.answers.append(answer)
        clock.now = free
        chooser.observe(resolution, answer.latency_ms, fixed_ms)
        if chooser.resolution != outcome.switches[-1][1]:
            outcome.switches.append((free, chooser.resolution))
        if arrivals is None:
            if active > int(clients(free)):
                active -= 1
            else:
                heapq.heappush(closed, free)


def step(before: float, during: float, after: float, at: float = 60, until: float = 120) -> Profile:
    """One value, another from `at` to `until`, and a third."""
    return lambda t: before if t < at else during if t < until else after


def rise(t: float) -> float:
    """From 1 to 4 in five minutes, and back."""
    return 1 + 3 * (1 - abs(t - 300) / 300)


def open_loop(rate: Profile, seconds: float, seed: int, **how: Any) -> Outcome:
    """Requests at a rate, independent of each other."""
    return simulate(poisson(rate, seconds, seed), seconds=seconds, seed=seed, **how)


def closed_loop(clients: Profile, seconds: float, seed: int, **how: Any) -> Outcome:
    """Requests of clients that wait for their answers."""
    return simulate(None, clients=clients, seconds=seconds, seed=seed, **how)


SCENARIOS: dict[str, Callable[[int], Outcome]] = {
    "open loop, 16, 32, 16 requests/s": lambda seed: open_loop(step(16, 32, 16), 180, seed),
    "open loop, 30, 60, 30 requests/s": lambda seed: open_loop(step(30, 60, 30), 180, seed),
    "open loop, 20 requests/s throughout": lambda seed: open_loop(lambda _: 20, 180, seed),
    "30, 60, 30 requests/s, the median within the objective": lambda seed: open_loop(
        step(30, 60, 30), 180, seed, percentile=50
    ),
    "closed loop, 1, 6, 1 clients": lambda seed: closed_loop(step(1, 6, 1), 180, seed),
    "8 requests/s, machine slower by 1, 4, 1": lambda seed: open_loop(
        lambda _: 8, 180, seed, slowdown=step(1, 4, 1)
    ),
    "16, 32, 16 requests/s, 15 ms of decoding": lambda seed: open_loop(
        step(16, 32, 16), 180, seed, fixed_ms=15
    ),
}


def main() -> None:
    """The table of docs/serving.md: the worst of ten seeds."""
    print("| load before, during, after | before | first 5 s | rest of it | after | switches |")
    print("|---|---|---|---|---|---|")
    for name, run in SCENARIOS.items():
        outcomes = [run(seed) for seed in range(10)]
        shares = [
            min(outcome.within(OBJECTIVE_MS, since, until) for outcome in outcomes)
            for since, until in ((0, 60), (60, 65), (65, 120), (120, 180))
        ]
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        print(f"| {name} | {cells} | {max(outcome.count() for outcome in outcomes)} |")


if __name__ == "__main__":
    main()
