"""Signals that ask a run to stop, agreed on by all ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

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
        if not self._deferred:
            raise Stopped(f"{signal.Signals(number).name} before the first step")
        if not self.requested:
            self.requested, self._first = True, clock
        elif clock - self._first > _SAME_REQUEST_S:
            os._exit(STOPPED)


class Vote:
    """What all ranks do after the same step; a rank alone decides for itself.

    Args:
        group: of gloo, so that the host asks without waiting for a GPU; None for one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def __call__(self, *wishes: bool) -> list[bool]:
        """Each wish, on all ranks if it is one rank's."""
        if self._group is None:
            return list(wishes)
        votes = torch.tensor(wishes, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        return [bool(vote) for vote in votes.tolist()]


def ignore_in_worker(_: int) -> None:
    """For processes that decode: schedulers signal them too, but the one that trains decides."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
