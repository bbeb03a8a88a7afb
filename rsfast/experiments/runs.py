"""Trains and tests what a set needs, several at once if asked to; whatever is done stays done."""

from __future__ import annotations

import csv
import dataclasses
import os
import queue
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rsfast.config import TrainConfig, read_config
from rsfast.experiments.sets import Training
from rsfast.interrupt import STOPPED
from rsfast.resume import fixed_settings
from rsfast.tables import read_rows

__all__ = ["Job", "Jobs", "evaluation_folder", "run_folder_of"]

_TAKEN_AS_THEY_COME = ("auto", None)  # a finished run has written what they became


def run_folder_of(output: Path, training: str, seed: int) -> Path:
    """Where a training is kept, for all sets."""
    return output / "runs" / training / f"seed{seed}"


def evaluation_folder(run: Path, between: str) -> Path:
    """Where it is tested."""
    return run / ("evaluation" if between == "interpolate" else f"evaluation_{between}")


@dataclass(frozen=True)
class Job:
    """One training with one seed, and its tests.

    Attributes:
        cfg: settings of the training; its output is set.
        tested: resolutions, by the way between the trained ones.
        name: to show.
    """

    cfg: TrainConfig
    tested: Mapping[str, Sequence[int]]
    name: str

    @classmethod
    def of(
        cls,
        base: TrainConfig,
        training: Training,
        seed: int,
        tested: Mapping[str, Sequence[int]],
        output: Path,
    ) -> Job:
        """The job of a training with a seed.

        Raises:
            ValueError: if the settings do not go together.
        """
        folder = str(run_folder_of(output, training.name, seed))
        changes = {**training.settings, "seed": seed, "output": folder, "resume": "auto"}
        cfg = dataclasses.replace(base, **changes)
        return cls(cfg, tested, f"{training.name}, seed {seed}")

    @property
    def folder(self) -> Path:
        """Of the run."""
        assert self.cfg.output is not None
        return Path(self.cfg.output)

    def is_trained(self) -> bool:
        """Whether the last epoch is done.

        Raises:
            ValueError: if it is, with other settings.
        """
        summary = self.folder / "summary.csv"
        if not summary.exists() or not (self.folder / "last.pt").exists():
            return False
        done = read_config(self.folder / "config.toml")
        for name in fixed_settings():
            wanted, found = getattr(self.cfg, name), getattr(done, name)
            if wanted != found and wanted not in _TAKEN_AS_THEY_COME:
                raise ValueError(
                    f"{self.folder} was trained with {name} = {found!r}, this set has {wanted!r}: "
                    f"take the same settings, or another --output"
                )
        return int(read_rows(summary)[-1]["epoch"]) == self.cfg.epochs

    def untested(self) -> dict[str, list[int]]:
        """What is left of `tested`."""
        left = {}
        for between, resolutions in self.tested.items():
            file = evaluation_folder(self.folder, between) / "per_image.csv"
            last = self.folder / "last.pt"
            columns: list[str] = []
            if file.exists() and file.stat().st_mtime >= last.stat().st_mtime:
                with open(file, newline="") as lines:
                    columns = next(csv.reader(lines))
            if not {str(r) for r in resolutions} <= set(columns):
                # Also what was tested there before, for another set.
                known = {int(name) for name in columns if name.isdecimal()}
                left[between] = sorted(known | set(resolutions), reverse=True)
        return left


@dataclass
class Jobs:
    """Runs jobs as processes of their own.

    Args:
        launch: what starts a module, before "-m": "python", or "torchrun --nproc-per-node=8".
        at_once: how many at a time. On a machine with several GPUs each process gets one of them,
            on a CPU each gets its share of the cores.
    """

    launch: str = shlex.quote(sys.executable)
    at_once: int = 1
    _running: set[subprocess.Popen] = field(default_factory=set)
    _stopped: bool = False

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, int]]:
        """Each job and its exit code as it ends; a signal lets those under way save and end."""
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.at_once):
            slots.put(slot)

        def work(job: Job) -> int:
            slot = slots.get()
            try:
                return self._train_and_test(job, slot)
            finally:
                slots.put(slot)

        with self._signals_passed_on(), ThreadPoolExecutor(self.at_once) as pool:
            futures = {pool.submit(work, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()

    def _train_and_test(self, job: Job, slot: int) -> int:
        code = 0
        job.folder.mkdir(parents=True, exist_ok=True)
        if not job.is_trained():
            settings = job.folder / "settings.toml"
            settings.write_text(job.cfg.to_toml())
            code = self._start(job, slot, "rsfast.train", "--config", str(settings))
        for between, resolutions in job.untested().items() if code == 0 else ():
            arguments = [str(job.folder / "last.pt"), "--per-image", "--between", between]
            arguments += ["--output", str(evaluation_folder(job.folder, between))]
            arguments += ["--resolutions", *map(str, resolutions)]
            code = code or self._start(job, slot, "rsfast.evaluate", *arguments, *_shared(job.cfg))
        return code

    def _start(self, job: Job, slot: int, module: str, *arguments: str) -> int:
        if self._stopped:
            return STOPPED
        command = [*shlex.split(self.launch), "-m", module, *arguments]
        with open(job.folder / "output.txt", "a") as screen:
            screen.write(f"$ {shlex.join(command)}\n")
            screen.flush()
            process = subprocess.Popen(
                command,
                env=_environment(slot, self.at_once),
                stdout=screen,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C reaches this process only, which lets them save
            )
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
        return STOPPED if self._stopped else code

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def stop(number: int, _frame: object) -> None:
            self._stopped = True
            for process in list(self._running):
                process.send_signal(signal.SIGTERM)

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _shared(cfg: TrainConfig) -> list[str]:
    """Settings that an evaluation has in common with its training."""
    data = ["--data", cfg.data] if cfg.data else []
    loading = ["--loader", cfg.loader, "--workers", str(cfg.workers)]
    batch = ["--batch-size", str(cfg.batch_size), "--device", cfg.device]
    precision = ["--precision", cfg.precision] if cfg.precision else []
    return [*data, *loading, *batch, *precision, "--kernels", cfg.kernels]


def _environment(slot: int, at_once: int) -> dict[str, str]:
    """Of a process that shares the machine with others like it."""
    environment = dict(os.environ)
    if at_once > 1 and torch.cuda.device_count() > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        devices = visible if visible != [""] else list(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    elif at_once > 1 and not torch.cuda.is_available():
        share = max(1, (os.cpu_count() or 1) // at_once)
        environment.setdefault("OMP_NUM_THREADS", str(share))
    return environment
