"""`python -m rsfast.experiments SET`: trains and compares what a table of the paper shows."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rsfast.config import TrainConfig, parse_args
from rsfast.experiments.report import write_report
from rsfast.experiments.results import collect
from rsfast.experiments.runs import Job, Jobs, evaluation_folder
from rsfast.experiments.sets import SETS, ExperimentSet, make_set
from rsfast.interrupt import STOPPED
from rsfast.tables import read_rows

__all__ = ["main"]

_ABOUT = """\
Runs the trainings of one or more tables and figures of the paper with equal settings, tests them,
and writes a report for each. What is done is kept: the same command goes on where it was stopped.
Every flag of rsfast.train that is the same for all rows may follow, --arch, --data, --epochs,
--resolutions and so on; without --data the built-in set is used."""
# What a row or a seed decides.
_NOT_HERE = (
    *("--distill", "--kd-type", "--bn", "--crop", "--copies", "--seed", "--resume"),
    *("--restart-epoch", "--profile"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Exit codes: 0 done, 1 a training or test failed, 2 bad input, 75 stopped by a signal.
    """
    args, rest = _parser().parse_known_args(argv)
    odd = [text for text in rest if text.split("=")[0] in _NOT_HERE]
    if odd:
        _parser().error(f"{odd[0]} is what the rows of a set differ in, it cannot be given")
    base = parse_args(rest, "rsfast.experiments", "Settings of all rows")
    try:
        which = [make_set(name, base.resolutions) for name in dict.fromkeys(args.sets)]
        jobs = _jobs(which, base, range(args.seeds), args.output)
        code = _run(Jobs(args.launch, args.jobs), jobs)
        if code == 0:
            for part in which:
                folder = args.output / part.name
                collect(part, range(args.seeds), args.output, folder)
                write_report(part, range(args.seeds), folder)
                print(f"written: {folder / 'README.md'}")
    except (ValueError, OSError) as error:
        print(f"rsfast.experiments: error: {error}", file=sys.stderr)
        return 2
    return code


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
        default=shlex.quote(sys.executable),
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


def _run(runner: Jobs, jobs: Sequence[Job]) -> int:
    """Runs what is left and says how each went."""
    codes = []
    for number, (job, code) in enumerate(runner.run(jobs), start=1):
        codes.append(code)
        print(f"[{number}/{len(jobs)}] {job.name}: {_outcome(job, code)}", flush=True)
    if STOPPED in codes:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    return 1 if any(codes) else 0


def _outcome(job: Job, code: int) -> str:
    if code == STOPPED:
        return "stopped"
    if code:
        return f"failed with exit code {code}, see {job.folder / 'output.txt'}"
    rows = read_rows(evaluation_folder(job.folder, next(iter(job.tested))) / "accuracy.csv")
    return "top-1 " + "  ".join(f"{row['resolution']}: {float(row['top1']):.1f}" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
