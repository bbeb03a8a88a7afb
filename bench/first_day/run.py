"""Runs stages one after another, whatever becomes of each, and keeps what they say."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from bench.first_day.stages import Stage
from bench.support.timing import DEVICE
from rsfast.runtime.environment import describe

__all__ = ["Outcome", "outcomes", "run_stages"]

_ROOT = Path(__file__).parents[2]
_FILE = "stage.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a stage.

    Attributes:
        name: of the stage.
        status: "passed", "failed", "out of time", "left out", "cut off" or "not run".
        why: in words, where it did not pass.
        seconds: that it took.
        device: that it ran on.
        commit: that it ran.
    """

    name: str
    status: str
    why: str = ""
    seconds: float = 0.0
    device: str = ""
    commit: str = ""


def outcomes(stages: Sequence[Stage], folder: Path) -> list[Outcome]:
    """Of all stages, as they stand."""
    return [
        _load(folder / stage.name) or Outcome(name=stage.name, status="not run") for stage in stages
    ]


def run_stages(
    stages: Sequence[Stage], folder: Path, minutes: float, after_each: Callable[[], object]
) -> None:
    """Each stage that has not passed on this device yet, as long as there is time.

    Those that were run before and did not pass come last: they may take their time again.

    Args:
        stages: in their order.
        folder: each stage writes into a folder of its name in it, with what it prints in log.txt.
        minutes: for all of them; one that is under way when they are over is ended.
        after_each: is called when a stage is over.
    """
    end = time.monotonic() + 60 * minutes
    facts = describe(DEVICE)
    here = {"device": str(facts.get("gpu", "cpu")), "commit": str(facts["commit"])}
    before = {stage.name: _load(folder / stage.name) for stage in stages}

    def has_run(stage: Stage) -> bool:
        outcome = before[stage.name]
        return outcome is not None and outcome.status in ("failed", "out of time")

    for stage in sorted(stages, key=has_run):
        earlier = before[stage.name]
        if earlier and (earlier.status, earlier.device) == ("passed", here["device"]):
            continue
        left = end - time.monotonic()
        if left <= 0:
            return
        place = folder / stage.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _keep(Outcome(name=stage.name, status="cut off", **here), place)
        lacking = stage.lacks()
        print(f"{stage.name}: {stage.about}", flush=True)
        if lacking is None:
            outcome = _run(stage, place, min(60 * stage.minutes, left))
        else:
            outcome = Outcome(name=stage.name, status="left out", why=f"needs {lacking}")
        _keep(replace(outcome, **here), place)
        print(f"    {outcome.status} after {outcome.seconds:.0f} s {outcome.why}", flush=True)
        after_each()


def _keep(outcome: Outcome, place: Path) -> None:
    (place / _FILE).write_text(json.dumps(asdict(outcome), indent=1) + "\n")


def _load(place: Path) -> Outcome | None:
    path = place / _FILE
    return Outcome(**json.loads(path.read_text())) if path.exists() else None


def _run(stage: Stage, place: Path, seconds: float) -> Outcome:
    start = time.monotonic()
    status, why = "passed", ""
    with open(place / "log.txt", "w") as log:
        for command in stage.commands(place):
            left = seconds - (time.monotonic() - start)
            code = _call(command, log, left)
            if code is None:
                status, why = "out of time", f"of {seconds / 60:.1f} minutes: {_shown(command)}"
            elif code:
                status, why = "failed", f"with {code}: {_shown(command)}"
            if status != "passed":
                break
    taken = round(time.monotonic() - start, 1)
    return Outcome(name=stage.name, status=status, why=why, seconds=taken)


def _call(command: Sequence[str], log: IO[str], seconds: float) -> int | None:
    """The exit code; None if it was ended for its time, with all that it had started."""
    log.write(f"$ {_shown(command)}\n")
    log.flush()
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=_ROOT,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shown(command: Sequence[str]) -> str:
    """Without the folders of the interpreter."""
    return " ".join([Path(command[0]).name, *command[1:]])
