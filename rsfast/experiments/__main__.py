"""`python -m rsfast.experiments SET`: trains and compares what a table of the paper shows."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rsfast.config import TrainConfig, parse_args
from rsfast.experiments.report import write_report
from rsfast.experiments.results import collect
from rsfast.experiments.runs import Job, Jobs, test_folder
from rsfast.experiments.sets import FIG9_CROP_AREA, SETS, ExperimentSet, make_set
from rsfast.interrupt import STOPPED
from rsfast.tables import read_rows

__all__ = ["main"]

_ABOUT = """\
Runs the trainings of one or more tables and figures of the paper with equal settings, tests them,
and writes a report for each. What is done is kept: the same command goes on where it was stopped.
Every flag of rsfast.train that is the same for all rows may follow, --arch, --data, --epochs,
--resolutions and so on; without --data the built-in set is used."""
_PYTHON = shlex.quote(sys.executable)
# What a row or a seed decides.
_NOT_HERE = ("distill", "bn", "crop", "copies", "seed", "resume", "restart_epoch", "profile")


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Exit codes: 0 done, 1 a training or test failed, 2 bad input, 75 stopped by a signal.
    """
    args, rest = _parser().parse_known_args(argv)
    base = parse_args(rest, "rsfast.experiments", "Settings of all rows")
    seeds = range(args.seeds)
    try:
        _check(base, args)
        which = [make_set(name, base.resolutions) for name in dict.fromkeys(args.sets)]
        jobs = _jobs(which, base, seeds, args.output)
        code, done = _run(Jobs(args.launch, args.jobs), jobs)
        for part in which:
            names = {f"{t.name}, seed {seed}" for t in part.trainings for seed in seeds}
            if names <= done:
                folder = args.output / part.name
                collect(part, seeds, args.output, folder, args.jobs, args.launch)
                write_report(part, seeds, folder)
                print(f"written: {folder / 'README.md'}")
    except (ValueError, OSError) as error:
        print(f"rsfast.experiments: error: {error}", file=sys.stderr)
        return 2
    return code


def _check(base: TrainConfig, args: argparse.Namespace) -> None:
    """Refuses settings that do not go with a set."""
    usual = TrainConfig()
    for name in _NOT_HERE:
        if getattr(base, name) != getattr(usual, name):
            raise ValueError(f"{name} is what rows or seeds differ in, it cannot be given")
    if base.loader == "synthetic":
        raise ValueError("loader must decode images, got 'synthetic', which has nothing to test")
    if "fig9" in args.sets and base.crop_area[0] >= FIG9_CROP_AREA[0]:
        raise ValueError(
            f"crop_area must begin below {FIG9_CROP_AREA[0]}, which is what fig9 raises it to, "
            f"got {base.crop_area}: add --crop-area 0.08 1"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("start it without torchrun, and give that as --launch")
    if args.jobs > 1 and args.launch != _PYTHON and torch.cuda.device_count() > 1:
        raise ValueError(
            f"jobs must be 1 with a launcher of its own, got {args.jobs}: each job gets one GPU"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rsfast.experiments",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The other flags: python -m rsfast.train --help",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("sets", nargs="+", choices=SETS, metavar="SET", help=", ".join(SETS))
    add("--seeds", type=_positive, default=1, help="trainings of each network (default 1)")
    add("--jobs", type=_positive, default=1, help="trainings at a time (default 1)")
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


def _jobs(
    which: Sequence[ExperimentSet], base: TrainConfig, seeds: Sequence[int], output: Path
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
            job.is_trained()
            jobs.append(job)
    return jobs


def _run(runner: Jobs, jobs: Sequence[Job]) -> tuple[int, set[str]]:
    """Runs what is left and says how each went; the exit code, and the names of those done."""
    codes, done = set(), set()
    for number, (job, outcome) in enumerate(runner.run(jobs), start=1):
        codes.add(outcome.code)
        if outcome.code == 0:
            done.add(job.name)
            text = _top1(job)
        else:
            text = "stopped" if outcome.code == STOPPED else f"failed: {outcome.reason}"
        print(f"[{number}/{len(jobs)}] {job.name}: {text}", flush=True)
    if STOPPED in codes:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED, set()
    return (1 if codes - {0} else 0), done


def _top1(job: Job) -> str:
    rows = read_rows(test_folder(job.folder, next(iter(job.tested))) / "accuracy.csv")
    return "top-1 " + "  ".join(f"{row['resolution']}: {float(row['top1']):.1f}" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
