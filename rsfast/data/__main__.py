"""`python -m rsfast.data`: finds what is wrong with a data set, leaves files out, and converts it.

Exit codes: 0 all is well, 1 there is a bad file or a class folder without an image to use, 2 bad
input or an archive that cannot be used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rsfast.data.check import KINDS, Finding, Report, check_split
from rsfast.data.convert import FORMS, convert, parse_size
from rsfast.data.damage import DamagedArchivesError
from rsfast.data.exclusion import exclude
from rsfast.data.index import printable
from rsfast.data.mask_convert import convert_masks, parse_pairs
from rsfast.data.masks import IGNORE_LABEL
from rsfast.data.pair_check import PairReport, check_pairs, class_table
from rsfast.data.patterns import ARCHIVE_EXTENSIONS, quote_hint
from rsfast.data.splits import Split, find_splits

__all__ = ["main"]

_SHOWN = 20  # findings of each kind on screen


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{quote_hint(unknown)}")
    try:
        return _COMMANDS[args.command](args)
    except (ValueError, ImportError, OSError) as error:
        print(f"rsfast.data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rsfast.data: interrupted; the next {args.command} continues", file=sys.stderr)
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rsfast.data", description="Looks after a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="decode every image, name what is broken or odd, and leave out the broken"
    )
    leave_out = commands.add_parser("exclude", help="leave files out by hand, whatever they hold")
    for command in (check, leave_out):
        command.add_argument(
            "dir",
            metavar="DIR",
            help="folder with train/ and val/, or one split, or a pattern of archives",
        )
    check.add_argument("--list", metavar="FILE", help="write all findings, separated by tabs")
    check.add_argument(
        "--ignore-label",
        type=int,
        metavar="N",
        default=IGNORE_LABEL,
        help="of pixels of masks that do not count (255)",
    )
    check.add_argument("--workers", type=int, metavar="N", help="processes; one per CPU by default")
    leave_out.add_argument("files", metavar="FILE", nargs="+", help="as seen from here or from DIR")
    leave_out.add_argument("--undo", action="store_true", help="use the files again")
    _add_convert(
        commands.add_parser(
            "convert",
            help="write tar shards of a folder or of Parquet "
            "files, or a folder of tar shards; images are copied as they are",
        )
    )
    _add_masks(
        commands.add_parser(
            "masks", help="write masks of segmentation as class numbers in 8-bit grey PNG"
        )
    )
    return parser


def _add_masks(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="SRC", help="folder of masks: grey, palette, 16-bit, or colours")
    add("target", metavar="DST", help="folder to write them to, such as data/trainannot")
    add("--shift", type=int, default=0, metavar="N", help="add N; labels below 0 become 255")
    add(
        "--map",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="give a stored label another number, which is not shifted; may come again",
    )
    add("--colors", metavar="FILE", help='a line "red green blue name" for each class from 0')
    add("--list", metavar="FILE", help="convert only masks whose stems are in this file")
    add("--stem", metavar="OLD=NEW", help="convert only stems that end in OLD, and end them in NEW")


def _masks(args: argparse.Namespace) -> int:
    old, equals, new = (args.stem or "").partition("=")
    if args.stem is not None and not (old and equals):
        raise ValueError(f"--stem must be two ends of names, as in _labels=_image, got {args.stem}")
    done = convert_masks(
        args.source,
        args.target,
        shift=args.shift,
        mapping=parse_pairs(args.map),
        colors=args.colors,
        listed=args.list,
        stem=None if args.stem is None else (old, new),
    )
    labels = ", ".join(map(str, done.labels))
    print(f"{args.target}: {done.masks} masks written, with the labels {labels}")
    return 0


def _add_convert(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="SRC", help="data set, one split, or a pattern of archives")
    add("target", metavar="DST", help="folder that is empty, or holds a part of the conversion")
    add("--to", choices=FORMS, help="by default shards, and a folder where SRC is shards")
    add("--shard-size", default="256MB", metavar="SIZE", help="of images per shard (256MB)")
    add("--val-list", metavar="FILE", help="labels of a val/ without class folders")
    add("--images-per-shard", type=int, metavar="N", help="in place of a size")


def _convert(args: argparse.Namespace) -> int:
    for done in convert(
        args.source,
        args.target,
        shard_bytes=parse_size(args.shard_size),
        images_per_shard=args.images_per_shard,
        to=args.to,
        val_list=args.val_list,
    ):
        order = (
            "in the order of SRC: the same seed trains on the same batches"
            if done.same_order
            else "in another order than SRC has: the same seed trains on other batches"
        )
        print(
            f"{done.folder}: {done.images} images in {done.files} files, {done.written} of them "
            f"written now and read back; {order}"
        )
        if done.left_out:
            print(f"{done.folder}: images excluded by hand in SRC, and left out: {done.left_out}")
        if done.unreadable:
            print(
                f"{done.folder}: files of SRC that cannot be opened, and left out: "
                f"{len(done.unreadable)}, the first is {printable(done.unreadable[0])}"
            )
    return 0


def _check(args: argparse.Namespace) -> int:
    splits = find_splits(args.dir)
    if args.list is not None:
        _write(args.list, "")  # a check takes too long to find out at its end
    folder = Path(os.path.abspath(args.dir))
    folder = folder if folder.is_dir() else splits[0].root
    reports, is_damaged = dict[Split, Report](), False
    pairs = dict[str, PairReport]()
    for split in splits:
        try:
            if split.masks is not None:
                found = check_pairs(split, ignore_label=args.ignore_label, workers=args.workers)
                reports[split], pairs[split.name] = found.report, found
            else:
                reports[split] = check_split(split, workers=args.workers)
        except DamagedArchivesError as error:
            is_damaged = True
            for reason in error.reasons.values():
                print(f"rsfast.data: error: {reason}", file=sys.stderr)
    findings = [
        finding._replace(path=os.path.relpath(split.root / finding.path, folder))
        for split, report in reports.items()
        for finding in report.findings
    ]
    if args.list is not None:
        rows = ("\t".join(map(printable, finding)) for finding in findings)
        _write(args.list, "".join(f"{row}\n" for row in rows))
    _show(findings)
    for line in class_table(pairs) if pairs else ():
        print(line)
    for split, report in reports.items():
        print(_summary(split.name, report))
    bad = [finding.path for finding in findings if finding.kind == "bad"]
    shards = [path for path in bad if path.endswith(ARCHIVE_EXTENSIONS)]
    if len(bad) > len(shards):
        print("bad images are left out of training until they change")
    if shards:
        print("bad shards are used all the same, until they are replaced")
    if is_damaged:
        return 2
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


_COMMANDS = {"check": _check, "exclude": _exclude, "convert": _convert, "masks": _masks}

if __name__ == "__main__":
    sys.exit(main())
