"""Everything that only a GPU can show, most telling first: `python -m bench.first_day`.

Each stage is a process of its own and leaves its results in DIR/STAGE before the next one begins;
a failure or a time limit ends that stage only. The same command goes on where it was cut off: what
has passed is not run again. Without a GPU the stages that can run do so at toy size, which shows
that they run and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.first_day.report import write_report
from bench.first_day.run import outcomes, run_stages
from bench.first_day.stages import STAGES
from bench.support.timing import ON_GPU

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 all stages passed or were left out, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="bench.first_day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=25, help="for all stages (25)")
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=names,
        default=names,
        metavar="STAGE",
        help=f"of {', '.join(names)} (all)",
    )
    args = parser.parse_args(argv)
    chosen = [stage for stage in STAGES if stage.name in args.stages]
    folder: Path = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not ON_GPU:
        print("no CUDA device: toy sizes, whose times mean nothing")
    run_stages(chosen, folder, args.minutes, lambda: write_report(STAGES, folder))
    print(write_report(STAGES, folder))
    good = ("passed", "left out")
    return 0 if all(outcome.status in good for outcome in outcomes(chosen, folder)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
