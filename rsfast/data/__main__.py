"""`python -m rsfast.data`: finds what is wrong with the files of a data set, and leaves files out.

Exit codes: 0 all is well, 1 there is a bad file or a class folder without an image to use, 2 bad
input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rsfast.data.check import KINDS, Finding, Report, check_split
from rsfast.data.folder import exclude, split_folders
from rsfast.data.index import printable

__all__ = ["main"]

_SHOWN = 20  # findings of each kind on screen


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _build_parser().parse_args(argv)
    try:
        return _check(args) if args.command == "check" else _exclude(args)
    except (ValueError, OSError) as error:
        print(f"rsfast.data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rsfast.data: interrupted; the next check continues", file=sys.stderr)
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rsfast.data", description="Looks after a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="decode every image, name what is broken or odd, and leave out the broken"
    )
    leave_out = commands.add_parser("exclude", help="leave files out by hand, whatever they hold")
    for command in (check, leave_out):
        command.add_argument("dir", metavar="DIR", help="folder with train/ and val/, or one split")
    check.add_argument("--list", metavar="FILE", help="write all findings, separated by tabs")
    check.add_argument("--workers", type=int, metavar="N", help="processes; one per CPU by default")
    leave_out.add_argument("files", metavar="FILE", nargs="+", help="as seen from here or from DIR")
    leave_out.add_argument("--undo", action="store_true", help="use the files again")
    return parser


def _check(args: argparse.Namespace) -> int:
    splits = split_folders(args.dir)
    if args.list is not None:
        _write(args.list, "")  # a check takes too long to find out at its end
    folder = Path(os.path.abspath(args.dir))
    reports = {split: check_split(split, workers=args.workers) for split in splits}
    findings = [
        finding._replace(path=os.path.relpath(split / finding.path, folder))
        for split, report in reports.items()
        for finding in report.findings
    ]
    if args.list is not None:
        rows = ("\t".join(map(printable, finding)) for finding in findings)
        _write(args.list, "".join(f"{row}\n" for row in rows))
    _show(findings)
    for split, report in reports.items():
        print(_summary(split.name, report))
    if any(finding.kind == "bad" for finding in findings):
        print("bad images are left out of training until they change")
    return 0 if all(report.is_good for report in reports.values()) else 1


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--list must name a file that can be written, got {file}") from error


def _show(findings: Sequence[Finding]) -> None:
    for kind in KINDS:
        same = [finding for finding in findings if finding.kind == kind]
        for finding in same[:_SHOWN]:
            print(f"{kind:<8}  {printable(finding.path)}  {printable(finding.reason)}")
        if len(same) > _SHOWN:
            print(f"{kind:<8}  and {len(same) - _SHOWN} more (--list FILE names all)")


def _summary(name: str, report: Report) -> str:
    kinds = [finding.kind for finding in report.findings]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS)
    rate = f"{report.decoded} decoded"
    if report.decoded:
        rate += f" at {report.decoded / report.seconds:.0f} images/s"
    return f"{name}: {report.images} images, {counts}; {rate}"


def _exclude(args: argparse.Namespace) -> int:
    for split, count in exclude(args.dir, args.files, undo=args.undo).items():
        print(f"{split.name}: files left out by hand: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
