"""Everything that only a GPU can show, most telling first: `python -m bench.first_day`.

Each stage is a process of its own and leaves its results in DIR/STAGE before the next one begins; a
failure or a time limit ends that stage only. The same command goes on where it was cut off: what
has passed on this device is not run again, and what has not comes last. Without a GPU the stages
that can run do so at toy size, which shows that they run and nothing else.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from bench.first_day.report import write_report
from bench.first_day.run import outcomes, run_stages
from bench.first_day.stages import STAGES
from bench.support.timing import ON_GPU

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 all stages passed or were left out, 1 otherwise,
    2 bad input, 130 cut off."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="bench.first_day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages, and the minutes that each may take at most:\n"
        + "\n".join(f"  {s.name:16s} {s.minutes:3.0f}  {s.about}" for s in STAGES),
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of report.md and of a folder for each stage",
    )
    parser.add_argument(
        "--minutes", type=float, default=25, help="for this call, whatever ran before (25)"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=names, default=names, metavar="STAGE", help="(all)"
    )
    args = parser.parse_args(argv)
    folder: Path = args.output.resolve()
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, got {args.minutes:g}")
    if folder.exists() and not folder.is_dir():
        parser.error(f"--output must be a folder, {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in STAGES if stage.name in args.stages]
    if not ON_GPU:
        print("no CUDA device: toy sizes, whose times mean nothing")
    # As Ctrl-C: the stage must not live on.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        run_stages(chosen, folder, args.minutes, lambda: write_report(STAGES, folder))
    except KeyboardInterrupt:
        write_report(STAGES, folder)
        print(f"cut off; {folder / 'report.md'} is up to date, and the same command goes on")
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    print(write_report(STAGES, folder))
    good = ("passed", "left out")
    return 0 if all(outcome.status in good for outcome in outcomes(chosen, folder)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
