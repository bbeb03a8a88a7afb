"""`rsfast.train` with faults: `python faults.py '{"decode": {"step": 7}}' --arch ...`.

Each fault is a dict; "rank" names the only rank it happens on (all without it). Steps count from 0
over the whole run.

    kills    {"at": [[step, rank], ...], "folder"}
                                 SIGKILL before each of these steps, one after the other over as
                                 many starts; the folder remembers which are done
    signal   {"at", "step"}      SIGTERM at "start" (while loaders are made), before the "step",
                                 in the "validation", or while a "checkpoint" is written
    nan      {"step", "level"}   one image of one level is NaN
    delay    {"step", "seconds"} sleeps before the step; with "until_signal" no longer than until
                                 a signal is there
    decode   {"step"}            the loader cannot decode an image of the step
    write    {"number"}          the disk is full at that write of a checkpoint, from 0

"log": FILE appends one line of JSON per step that is begun: process, rank, step, images.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rsfast import train
from rsfast.data import Batch, pil
from rsfast.files import seal
from rsfast.runtime.interrupt import Interrupt
from rsfast.training import resume
from rsfast.training import start as starting
from rsfast.training.run import Run

Fault = dict[str, Any]
SIGNALS: list[int] = []  # that this process has got


class FaultyStep:
    """A TrainStep to which things happen first."""

    def __init__(self, run: Run, faults: dict[str, Any]) -> None:
        self._run = run
        self._step = run.step
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def __call__(self, batch: Batch) -> Any:
        step, rank = self._run.steps_done, self._run.rank.index
        if "log" in self._faults:
            line = {"process": os.getpid(), "rank": rank, "step": step}
            with open(self._faults["log"], "a") as file:
                file.write(json.dumps({**line, "images": batch.indices.tolist()}) + "\n")
        if "kills" in self._faults:
            kill_if_due(self._faults["kills"], step, rank)
        if self._due("signal", step) and self._faults["signal"]["at"] == "step":
            os.kill(os.getpid(), signal.SIGTERM)
        if self._due("delay", step):
            delay(**self._faults["delay"])
        if self._due("nan", step):
            batch.images.level(self._faults["nan"]["level"])[0] = float("nan")
        return self._step(batch)

    def _due(self, kind: str, step: int) -> bool:
        fault = self._faults.get(kind)
        return fault is not None and fault.get("step") == step and is_here(fault)


def delay(seconds: float, until_signal: bool = False, **_: Any) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (until_signal and SIGNALS):
        time.sleep(0.05)


def kill_if_due(kills: Fault, step: int, rank: int) -> None:
    folder = Path(kills["folder"])
    number = sum(1 for _ in folder.iterdir())
    if number < len(kills["at"]) and kills["at"][number] == [step, rank]:
        (folder / str(number)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def is_here(fault: Fault) -> bool:
    return fault.get("rank", int(os.environ.get("RANK", 0))) == int(os.environ.get("RANK", 0))


def signals_at(place: str, faults: dict[str, Any]) -> bool:
    fault = faults.get("signal", {})
    return fault.get("at") == place and is_here(fault)


def fail_to_write(number: int) -> None:
    """Makes the numbered write to a checkpoint's file fail, and every one after it."""
    writes = 0

    def faulty_open(path: Any, mode: str = "r", *rest: Any) -> Any:
        file = builtins.open(path, mode, *rest)  # noqa: SIM115 (the caller closes it)
        if "w" not in mode:
            return file
        write = file.write

        def counted(data: Any) -> int:
            nonlocal writes
            writes += 1
            if writes > number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(data)

        return WithWrite(file, counted)

    seal.open = faulty_open  # type: ignore[attr-defined]


class WithWrite:
    """A file with another `write`."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self._file = file
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> WithWrite:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def inject(faults: dict[str, Any]) -> None:
    """Puts the faults in place, in this process."""
    build, loaders, render = train.build, starting._loaders, pil.render

    def faulty_build(*arguments: Any) -> Run:
        run = build(*arguments)
        run.step = FaultyStep(run, faults)  # type: ignore[assignment]
        return run

    def faulty_loaders(*arguments: Any) -> Any:
        if signals_at("start", faults):
            os.kill(os.getpid(), signal.SIGTERM)
        return loaders(*arguments)

    take = Interrupt._take

    def noted(self: Interrupt, number: int, frame: Any) -> None:
        SIGNALS.append(number)
        take(self, number, frame)

    Interrupt._take = noted  # type: ignore[method-assign]
    train.build = faulty_build
    starting._loaders = faulty_loaders
    if signals_at("validation", faults):
        stoppable = train._stoppable

        def faulty_batches(*arguments: Any) -> Iterator[Batch]:
            for batch in stoppable(*arguments):
                os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        train._stoppable = faulty_batches
    if signals_at("checkpoint", faults):
        write_whole = resume.checkpoint.write_whole

        def faulty_write(path: Path, parts: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            write_whole(path, parts)

        resume.checkpoint.write_whole = faulty_write
    if "decode" in faults:

        def faulty_render(index: Any, batch: Any, resolutions: Any) -> Any:
            raise RuntimeError(f"cannot decode {index.path(batch.images[0])}: it is broken")

        pil.render = faulty_render if is_here(faults["decode"]) else render
    if "write" in faults and is_here(faults["write"]):
        fail_to_write(faults["write"]["number"])


if __name__ == "__main__":
    inject(json.loads(sys.argv[1]))
    sys.exit(train.main(sys.argv[2:]))
