"""Signals that ask a run to stop, agreed on by all ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["STOPPED", "Interrupt", "Stopped", "Vote", "ignore_in_worker"]

STOPPED = 75  # exit code: stopped by a signal, run again with --resume auto (EX_TEMPFAIL)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Schedulers signal every process of a job, and torchrun passes on what it gets: within so many
# seconds it is the same request.
_SAME_REQUEST_S = 2.0


class Stopped(BaseException):
    """A signal has asked for the end; what there is to save is saved."""


class Interrupt:
    """Takes SIGTERM and SIGUSR1 while it is entered.

    Before `defer` the first of them ends the process at once, by `Stopped`: there is nothing to
    save. After it, the first sets `requested`, and one that comes later ends the process there and
    then.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # others cannot take signals
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def defer(self) -> None:
        """From here on there is something to save."""
        self._deferred = True

    def _take(self, number: int, _: FrameType | None) -> None:
        clock = time.monotonic()
        if not self.requested:
            self.requested, self._first = True, clock
            if not self._deferred:
                raise Stopped(f"{signal.Signals(number).name} before the first step")
        elif clock - self._first > _SAME_REQUEST_S:
            os._exit(STOPPED)


class Vote:
    """What all ranks do after the same step; a rank alone decides for itself.

    The hosts count while the next step runs, so that its result is that of the step before.

    Args:
        group: of gloo, so that the host asks without waiting for a GPU; None for one rank.
        every: only each such call is a vote, the same ones on all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, every: int = 1) -> None:
        self._group = group
        self._every = every
        self._calls = 0
        self._votes: Tensor | None = None
        self._count: dist.Work | None = None

    def __call__(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Hands in this rank's wishes; returns which of the last ones some rank had."""
        if self._group is None:
            return stop, save
        self._calls += 1
        if self._calls % self._every:
            return False, False
        result = self.result()
        self._votes = torch.tensor([stop, save], dtype=torch.int32)
        self._count = dist.all_reduce(
            self._votes, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return result

    def result(self) -> tuple[bool, bool]:
        """Of the vote under way, which is then over."""
        if self._votes is None or self._count is None:
            return False, False
        self._count.wait()
        stop, save = self._votes.tolist()
        self._votes = self._count = None
        return bool(stop), bool(save)


def ignore_in_worker(_: int) -> None:
    """For processes that decode: schedulers signal them too, but the one that trains decides.

    It has a minute for it; a worker that is asked to end because its loader has ended, but does
    not hear of it, is gone then.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
