"""Processes that take turns: each holds one implementation, one at a time runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.deploy.implementations import Implementation

__all__ = ["Child", "Samples", "Task", "race"]

_STEADY = 4  # calls of a visit after the first one, which pays for the switch
_PAUSE = 0.005  # seconds before a visit: threads of others that wait by spinning stop by then
_FEWEST = 2  # rounds, whatever the time


@dataclass(frozen=True, slots=True)
class Task:
    """What all processes share.

    Attributes:
        folder: that :mod:`bench.deploy.files` filled.
        checkpoint: that it is from.
        arch: of the checkpoint, where it has to be given.
        resolutions: in pixels.
        threads: of each implementation.
    """

    folder: Path
    checkpoint: Path
    arch: str | None
    resolutions: tuple[int, ...]
    threads: int


@dataclass(slots=True)
class Samples:
    """Of one implementation at one size.

    Attributes:
        first_ms: calls right after one at another size.
        steady_ms: the calls after those.
        waited: share of each visit in which the process had no core.
    """

    first_ms: list[float] = field(default_factory=list)
    steady_ms: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def add(self, other: Samples) -> None:
        """Those of another heat."""
        self.first_ms += other.first_ms
        self.steady_ms += other.steady_ms
        self.waited += other.waited


class Child:
    """A process of :mod:`bench.deploy.worker`, ready to be timed.

    Attributes:
        hello: what it says once it is loaded and warm.

    Raises:
        RuntimeError: if it ends before that, or later without being told.
    """

    def __init__(self, implementation: Implementation, task: Task) -> None:
        self.name = implementation.name
        content = {
            "implementation": astuple(implementation),
            "folder": str(task.folder),
            "checkpoint": str(task.checkpoint),
            "arch": task.arch,
            "resolutions": task.resolutions,
            "threads": task.threads,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.deploy.worker", json.dumps(content)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.hello = self._answer()
        except RuntimeError:
            self.close()
            raise

    def visit(self, before: int, size: int) -> dict[str, Any]:
        """Times a switch from one size to another, and calls after it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{before} {size} {1 + _STEADY}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process and waits for that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended: its message is above")
        return json.loads(line)


def race(
    children: Mapping[str, Child],
    sizes: Mapping[str, Sequence[int]],
    rounds: int,
    minutes: float,
    rng: np.random.Generator,
) -> dict[tuple[str, int], Samples]:
    """Visits every implementation at every size once a round, in an order anew each time.

    Args:
        children: by name.
        sizes: of each name.
        rounds: at most.
        minutes: after which no new round begins, but for the first two.
        rng: decides the orders, and which size comes before a switch.
    """
    pairs = [(name, size) for name in children for size in sizes[name]]
    found = {pair: Samples() for pair in pairs}
    end = time.monotonic() + 60 * minutes
    for number in range(rounds):
        if number >= _FEWEST and time.monotonic() > end:
            print(f"stopped by the clock after {number} rounds of {rounds}", flush=True)
            break
        for index in rng.permutation(len(pairs)):
            name, size = pairs[index]
            others = [other for other in sizes[name] if other != size] or [size]
            time.sleep(_PAUSE)
            answer = children[name].visit(int(rng.choice(others)), size)
            first, *steady = (round(ns / 1e6, 4) for ns in answer["ns"])
            samples = found[name, size]
            samples.first_ms.append(first)
            samples.steady_ms += steady
            samples.waited.append(answer["waited"])
    return found
