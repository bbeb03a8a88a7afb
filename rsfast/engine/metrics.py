"""Counters that stay on the device until they are read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rsfast.engine.terms import Terms
from rsfast.runtime.distributed import sum_over_ranks

__all__ = ["EpochMean", "LossMeter", "StepClock"]


class LossMeter:
    """Mean of the loss terms since it was last read, over the steps at which they were finite.

    Args:
        names: of the T terms.
        device: of the sums.

    Attributes:
        sums: [T + 1] float64 on the device: of each term, and the steps they are of.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)

    def add(self, terms: Terms) -> None:
        """Counts one step; no synchronisation."""
        values = torch.stack([*terms, torch.ones_like(terms.total)])
        self.sums += torch.where(values.isfinite().all(), values, 0.0)

    def read(self) -> dict[str, float]:
        """Mean over steps and ranks of each term and of their total, in nats; starts anew.

        NaN if there was no step at which they were finite.
        """
        *sums, steps = sum_over_ranks(self.sums.clone()).tolist()
        self.sums.zero_()
        means = [value / steps if steps else math.nan for value in sums]
        return {"loss": sum(means), **dict(zip(self._names, means, strict=True))}


@dataclass
class EpochMean:
    """Mean of log lines, each as heavy as it has steps; lines without a finite step are left out.

    Attributes:
        sums: of each figure.
        weight: steps in all.
    """

    sums: dict[str, float] = field(default_factory=dict)
    weight: int = 0

    def add(self, values: dict[str, float], weight: int) -> None:
        """Counts one line."""
        finite = math.isfinite(values["loss"])
        self.weight += weight if finite else 0
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + (value * weight if finite else 0.0)

    def read(self) -> dict[str, float]:
        """NaN if nothing was finite."""
        return {n: v / self.weight if self.weight else math.nan for n, v in self.sums.items()}


class StepClock:
    """Steps per second between readings.

    The first step of all compiles kernels and captures the graph, so the clock starts again behind
    it: only a reading directly after it has it in.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._every = 0
        self.start()

    def start(self) -> None:
        """Starts a reading: what was before it is not timed."""
        self._steps, self._began = 0, time.perf_counter()

    def step(self) -> None:
        """To be called before a step."""
        if self._every == 1:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.start()
        self._every += 1
        self._steps += 1

    def read(self) -> float:
        """Steps per second, once the device has been waited for; starts the next reading."""
        rate = self._steps / (time.perf_counter() - self._began)
        self.start()
        return rate
