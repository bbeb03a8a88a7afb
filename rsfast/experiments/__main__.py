"""`python -m rsfast.experiments SET`: trains and compares what a table of the paper shows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rsfast.config import TrainConfig, parse_args
from rsfast.data import default_workers
from rsfast.data.builtin import builtin_root
from rsfast.experiments.measures import MEASURES
from rsfast.experiments.overrides import check_patterns, parse_overrides, with_overrides
from rsfast.experiments.report import write_report
from rsfast.experiments.results import collect
from rsfast.experiments.runs import Job, Jobs, test_folder
from rsfast.experiments.sets import (
    FIG9_CROP_AREA,
    QUANTISED_SETS,
    SETS,
    ExperimentSet,
    make_set,
    papers_network,
)
from rsfast.files.folders import make_writable
from rsfast.files.plots import main_figure
from rsfast.files.tables import read_rows
from rsfast.runtime.interrupt import STOPPED
from rsfast.tasks import task_of

__all__ = ["main"]

_ABOUT = """\
Runs the trainings of one or more tables and figures of the paper with equal settings, tests them,
and writes a report for each. What is done is kept: the same command goes on where it was stopped.
Every flag of rsfast.train that is the same for all rows may follow, --arch, --data, --epochs,
--resolutions and so on; without --data the built-in set is used."""
_PYTHON = shlex.quote(sys.executable)
# What a row or a seed decides.
_ROWS, _RUNS = "it is what the rows of a set differ in", "every run goes on by itself"
_NOT_HERE = {
    "distill": _ROWS,
    "kd_type": _ROWS,
    "bn": _ROWS,
    "crop": _ROWS,
    "copies": _ROWS,
    "continue_from": "an ancestor fixes bn and copies, in which the rows of a set differ",
    "seed": "--seeds N takes seeds 0 to N - 1",
    "resume": _RUNS,
    "restart_epoch": _RUNS,
    "profile": "it is for one run",
}
# What --for cannot give to some trainings only.
_NOT_FOR_SOME = {
    **_NOT_HERE,
    "resolutions": _ROWS,
    "output": "it is one folder for all",
    **dict.fromkeys(("data", "train_data", "val_data", "val_list"), "all are tested on one set"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Exit codes: 0 done, 1 a training or test failed, 2 bad input, 75 stopped by a signal, 130
    interrupted.
    """
    args, rest = _parser().parse_known_args(argv)
    odd = [name for name in args.sets if name not in SETS]
    if odd:  # perhaps the value of a flag, before any set
        print(
            f"rsfast.experiments: error: sets come first and must be some of {', '.join(SETS)}, "
            f"got {odd[0]!r}",
            file=sys.stderr,
        )
        return 2
    network = papers_network(args.sets)
    if network and not {"--arch", "--config"} & _flags(rest):
        rest = ["--arch", network, *rest]
    base = parse_args(rest, "rsfast.experiments", "Settings of all rows")
    seeds = range(args.seeds)
    try:
        _check(base, args, rest)
        if args.jobs > 1 and base.workers is None and args.launch == _PYTHON:
            base = dataclasses.replace(base, workers=max(1, default_workers() // args.jobs))
        which = [make_set(name, base.resolutions, base.arch) for name in dict.fromkeys(args.sets)]
        overrides = parse_overrides(args.overrides, _NOT_FOR_SOME)
        check_patterns(overrides, [t.name for part in which for t in part.trainings])
        which = [with_overrides(part, overrides, base) for part in which]
        for part in which:
            if part.task != base.task:
                raise ValueError(
                    f"{part.name} is of {part.task}, and {base.arch} of {base.task}: name an "
                    f"--arch of {part.task}, and no sets of another task"
                )
        make_writable(args.output)
        jobs = _jobs(which, base, seeds, args.output, _data_set(base))
        code, done = _run(Jobs(args.launch, args.jobs), jobs)
        for part in which:
            names = {f"{t.name}, seed {seed}" for t in part.trainings for seed in seeds}
            if names <= done:
                folder = args.output / part.name
                collect(part, seeds, args.output, folder, args.jobs, args.launch)
                write_report(part, seeds, folder)
                print(f"written: {folder / 'README.md'}")
    except (ValueError, ImportError, OSError) as error:
        print(f"rsfast.experiments: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rsfast.experiments: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return code


def _check(base: TrainConfig, args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses settings that do not go with a set, and a report of fewer seeds than there is."""
    usual = TrainConfig()
    flags = _flags(rest)
    for name, reason in _NOT_HERE.items():
        given = {f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"} & flags
        if given or getattr(base, name, None) != getattr(usual, name, None):
            raise ValueError(f"{name} cannot be given: {reason}")
    for name in args.sets:
        file = args.output / name / "run.json"
        done = len(json.loads(file.read_text())["seeds"]) if file.exists() else 0
        if done > args.seeds:
            raise ValueError(
                f"{file.parent} is of {done} seeds, and would be overwritten by {args.seeds}: "
                f"take --seeds {done}, or another --output"
            )
    if base.loader == "synthetic":
        raise ValueError("loader must decode images, got 'synthetic', which has nothing to test")
    if "fig9" in args.sets and base.crop_area[0] >= FIG9_CROP_AREA[0]:
        raise ValueError(
            f"crop_area must begin below {FIG9_CROP_AREA[0]}, which is what fig9 raises it to, "
            f"got {base.crop_area}: add --crop-area 0.08 1"
        )
    for name in set(args.sets) & {*QUANTISED_SETS}:
        for setting, paper in (("weight_bits", (None, 2)), ("activation_bits", (None, 2, 32))):
            if getattr(base, setting) not in paper:
                raise ValueError(
                    f"{setting} cannot be given: {_ROWS}, and those of {name} have 2 and 32"
                )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("start it without torchrun, and give that as --launch")
    if args.jobs > 1 and args.launch != _PYTHON and torch.cuda.device_count() > 1:
        raise ValueError(
            f"jobs must be 1 with a launcher of its own, got {args.jobs}: each job gets one GPU"
        )


def _flags(arguments: Sequence[str]) -> set[str]:
    return {text.split("=")[0] for text in arguments}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rsfast.experiments",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The other flags: python -m rsfast.train --help",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("sets", nargs="+", metavar="SET", help=", ".join(SETS))
    add("--seeds", type=_positive, default=1, help="trainings of each network (default 1)")
    add("--jobs", type=_positive, default=1, help="trainings at a time (default 1)")
    add(
        "--for",
        dest="overrides",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAMES", "SETTING=VALUE"),
        help="settings of some trainings, named as their folders are, such as 'inet_*' lr=0.05; "
        "several times, if need be, where the last one counts",
    )
    add(
        "--launch",
        default=_PYTHON,
        help="what starts a module, such as 'torchrun --nproc-per-node=8' (default: this Python)",
    )
    add(
        "--output",
        type=Path,
        default=Path("runs/experiments"),
        help="folder of all runs and reports (default runs/experiments)",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 10000, got {text!r}")
    return int(text)


def _data_set(base: TrainConfig) -> dict[str, str]:
    """Names for what is read of both splits, in the words of a run's log.

    Raises:
        ValueError: if they cannot be found.
    """
    task = task_of(base)
    root = base.data or (builtin_root(**task.builtin) if base.is_builtin else "")
    places = {"train": base.train_data or root, "val": base.val_data or root}
    return {f"{split}_set": task.digest_of(base, data, split) for split, data in places.items()}


def _jobs(
    which: Sequence[ExperimentSet],
    base: TrainConfig,
    seeds: Sequence[int],
    output: Path,
    data_set: dict[str, str],
) -> list[Job]:
    """Each training of the sets once for each seed, seed by seed; the finished ones are checked."""
    trainings = {training.name: training for part in which for training in part.trainings}
    jobs = []
    for seed in seeds:
        for training in trainings.values():
            tested: dict[str, list[int]] = {}
            for part in which:
                for between, resolutions in part.tested(training).items():
                    known = tested.setdefault(between, [])
                    known += [r for r in resolutions if r not in known]
            job = Job.of(base, training, seed, tested, output)
            job.check(data_set)
            jobs.append(job)
    return jobs


def _run(runner: Jobs, jobs: Sequence[Job]) -> tuple[int, set[str]]:
    """Runs what is left and says how each went; the exit code, and the names of those done."""
    codes, done = set(), set()
    for number, (job, outcome) in enumerate(runner.run(jobs), start=1):
        codes.add(outcome.code)
        if outcome.code == 0:
            done.add(job.name)
            text = f"{_figures(job)}  {outcome.reason}"
        else:
            text = outcome.reason if outcome.code == STOPPED else f"failed: {outcome.reason}"
        print(f"[{number}/{len(jobs)}] {job.name}: {text}".rstrip(), flush=True)
    if STOPPED in codes:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED, set()
    return (1 if codes - {0} else 0), done


def _figures(job: Job) -> str:
    name, label = main_figure(MEASURES[job.cfg.task].figures)
    rows = read_rows(test_folder(job.folder, next(iter(job.tested))) / "accuracy.csv")
    return f"{label} " + "  ".join(f"{row['resolution']}: {float(row[name]):.1f}" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
