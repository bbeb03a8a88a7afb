"""Trains and tests what a set needs, several at once if asked to; whatever is done stays done."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
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
from typing import Any

import torch

from rsfast.config import TrainConfig, as_flag, read_config
from rsfast.experiments.sets import Training
from rsfast.files.seal import write_whole
from rsfast.files.tables import read_log
from rsfast.runtime.interrupt import STOPPED
from rsfast.training.resume import fixed_settings

__all__ = ["Job", "Jobs", "Outcome", "run_folder_of", "test_folder"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_NOT_STARTED = -1  # instead of an exit code
_TRAINED = "trained.toml"  # the settings of a training that has ended well
_TESTED = "tested.json"  # what a finished test was asked for
_TEST_SETTINGS = (
    *("data", "train_data", "val_data", "val_list", "tolerate_truncated"),
    *("loader", "precision", "kernels", "device"),
)


def run_folder_of(output: Path, training: str, seed: int) -> Path:
    """Where a training is kept, for all sets."""
    return output / "runs" / training / f"seed{seed}"


def test_folder(run: Path, between: str) -> Path:
    """Where it is tested; not where `rsfast.evaluate` writes by itself."""
    return run / f"test_{between}"


@dataclass(frozen=True)
class Outcome:
    """How a job went: an exit code, and what went wrong."""

    code: int
    reason: str = ""


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
        if base.levels == "nearest" and base.picked_from is None:
            # For all networks of the set, those of one smaller resolution, too.
            changes["picked_from"] = base.resolutions[0]
        cfg = dataclasses.replace(base, **changes)
        return cls(cfg, tested, f"{training.name}, seed {seed}")

    @property
    def folder(self) -> Path:
        """Of the run."""
        assert self.cfg.output is not None
        return Path(self.cfg.output)

    def is_trained(self) -> bool:
        """Whether the training has ended well.

        Raises:
            ValueError: if it has, with other settings.
        """
        mark = self.folder / _TRAINED
        if not mark.exists() or not (self.folder / "last.pt").exists():
            return False
        done = read_config(mark)
        for name in fixed_settings():
            wanted, found = getattr(self.cfg, name), getattr(done, name)
            if wanted != found:
                raise ValueError(
                    f"{self.folder} was trained with {name} = {found!r}, this set has {wanted!r}: "
                    f"take the same settings{as_flag(name, found)}, or another --output"
                )
        return True

    def check(self, data_set: Mapping[str, str]) -> None:
        """Refuses to go on with what was begun otherwise.

        Args:
            data_set: names for the images, as a run's log has them.

        Raises:
            ValueError: if a training here has ended with other settings, or began with other
                images.
        """
        self.is_trained()
        lines = [line for _, line in read_log(self.folder / "log.jsonl")]
        for start in (line for line in lines if line["event"] == "start"):
            for name, images in data_set.items():
                if start.get(name, images) != images:
                    raise ValueError(
                        f"{self.folder} was trained on other images than those of "
                        f"{self.cfg.images}: take another --output"
                    )

    def mark_trained(self) -> None:
        """Says that the training has ended well."""
        write_whole(self.folder / _TRAINED, [self.cfg.to_toml().encode()])

    def untested(self) -> dict[str, list[int]]:
        """What is left of `tested`."""
        left = {}
        for between, resolutions in self.tested.items():
            mark = test_folder(self.folder, between) / _TESTED
            done = json.loads(mark.read_text()) if mark.exists() else {}
            known = set(done["resolutions"]) if done.get("settings") == self._test() else set()
            if not set(resolutions) <= known:
                # Also what was tested there before, for another set.
                left[between] = sorted(known | set(resolutions), reverse=True)
        return left

    def mark_tested(self, between: str, resolutions: Sequence[int]) -> None:
        """Says that a test has ended well."""
        content = {"resolutions": list(resolutions), "settings": self._test()}
        mark = test_folder(self.folder, between) / _TESTED
        write_whole(mark, [json.dumps(content).encode()])

    def _test(self) -> dict[str, Any]:
        """What a test depends on; the checkpoint by when it was written."""
        cfg = self.cfg
        return {
            **{name: getattr(cfg, name) for name in _TEST_SETTINGS},
            "val_list_sha256": _digest(cfg.val_list),
            "checkpoint": (self.folder / "last.pt").stat().st_mtime_ns,
        }


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

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Each job and how it went; a signal lets those under way save and end."""
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.at_once):
            slots.put(slot)

        def work(job: Job) -> Outcome:
            slot = slots.get()
            try:
                return self._train_and_test(job, slot)
            except (OSError, ValueError) as error:
                return Outcome(1, str(error))
            finally:
                slots.put(slot)

        with self._signals_passed_on(), ThreadPoolExecutor(self.at_once) as pool:
            futures = {pool.submit(work, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()

    def _train_and_test(self, job: Job, slot: int) -> Outcome:
        job.folder.mkdir(parents=True, exist_ok=True)
        # The lock is the children's too: it lasts as long as the last of them.
        with open(job.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Outcome(1, f"another process is at work in {job.folder}")
            kept = "(trained before)"
            if not job.is_trained():
                settings = job.folder / "settings.toml"
                settings.write_text(job.cfg.to_toml())
                code = self._start(job, slot, lock.fileno(), "train", "--config", str(settings))
                if code:
                    return self._failed(job, code)
                job.mark_trained()
                kept = ""
            for between, resolutions in job.untested().items():
                arguments = [str(job.folder / "last.pt"), "--per-image", "--between", between]
                arguments += ["--output", str(test_folder(job.folder, between))]
                arguments += ["--resolutions", *map(str, resolutions), *_shared(job.cfg)]
                code = self._start(job, slot, lock.fileno(), "evaluate", *arguments)
                if code:
                    return self._failed(job, code)
                job.mark_tested(between, resolutions)
        return Outcome(0, kept)

    def _start(self, job: Job, slot: int, lock: int, module: str, *arguments: str) -> int:
        if self._stopped:
            return _NOT_STARTED
        command = [*shlex.split(self.launch), "-m", f"rsfast.{module}", *arguments]
        print(f"{job.name}: rsfast.{module}, see {job.folder / 'output.txt'}", flush=True)
        with open(job.folder / "output.txt", "a") as screen:
            screen.write(f"$ {shlex.join(command)}\n")
            screen.flush()
            process = subprocess.Popen(
                command,
                env=_environment(slot, self.at_once, job.cfg.device),
                stdout=screen,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C reaches this process only, which lets them save
                pass_fds=(lock,),
            )
            self._running.add(process)
            if self._stopped:  # while it was started
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self._running.discard(process)
        return code

    def _failed(self, job: Job, code: int) -> Outcome:
        if self._stopped:
            return Outcome(STOPPED, "not started" if code == _NOT_STARTED else "stopped")
        screen = job.folder / "output.txt"
        errors = [line for line in screen.read_text().splitlines() if ": error: " in line]
        reason = f"{errors[-1]}, " if errors else ""
        return Outcome(code, f"{reason}exit code {code}, see {screen}")

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def stop(number: int, _frame: object) -> None:
            self._stopped = True
            for process in list(self._running):
                process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _digest(file: str | None) -> str | None:
    """Of what a file says."""
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _shared(cfg: TrainConfig) -> list[str]:
    """Settings that an evaluation has in common with its training."""
    data = []
    for flag in ("data", "train_data", "val_data", "val_list"):
        if value := getattr(cfg, flag):
            data += [f"--{flag.replace('_', '-')}", value]
    loading = ["--loader", cfg.loader]
    for flag in ("dont_use_mmap", "tolerate_truncated"):
        loading += [f"--{flag.replace('_', '-')}"] if getattr(cfg, flag) else []
    for flag, value in (("workers", cfg.workers), ("hw-decoder-load", cfg.hw_decoder_load)):
        loading += [] if value is None else [f"--{flag}", str(value)]
    batch = ["--batch-size", str(cfg.batch_size), "--device", cfg.device]
    precision = ["--precision", cfg.precision] if cfg.precision else []
    network = ["--arch", cfg.arch]  # of whose code the caller of the training is sure
    return [*network, *data, *loading, *batch, *precision, "--kernels", cfg.kernels]


def _environment(slot: int, at_once: int, device: str) -> dict[str, str]:
    """Of a process that shares the machine with others like it."""
    environment = dict(os.environ)
    if at_once > 1 and device != "cpu" and torch.cuda.device_count() > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        devices = visible if visible != [""] else list(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    elif at_once > 1 and (device == "cpu" or not torch.cuda.is_available()):
        share = max(1, (os.cpu_count() or 1) // at_once)
        environment.setdefault("OMP_NUM_THREADS", str(share))
    return environment
