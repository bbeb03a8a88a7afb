"""Patterns of archives, as WebDataset's users write them: braces, ranges and globs."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rsfast.data.walking import is_hidden

__all__ = [
    "ARCHIVE_EXTENSIONS",
    "check_archives",
    "check_complete",
    "compressed_tars",
    "expand",
    "is_pattern",
    "quote_hint",
]

ARCHIVE_EXTENSIONS = (".tar", ".parquet")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_REMOTE = re.compile(r"(pipe|https?|s3|gs|hf|az|file):")
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.")  # train-00000-of-00294.parquet
_MOST = 1_000_000  # files of one pattern


def is_pattern(text: str | os.PathLike[str]) -> bool:
    """Whether a text names archives, and no folder."""
    text = os.fspath(text)
    if os.path.isdir(text):
        return False
    ends = (*ARCHIVE_EXTENSIONS, *(part + "}" for part in ARCHIVE_EXTENSIONS))
    return bool(
        text.endswith(ends)
        or set("*?[{") & set(text)
        or _REMOTE.match(text)
        or _COMPRESSED.search(text)
    )


def check_archives(text: str) -> None:
    """Refuses what can be no pattern of archives, without a look at the disk.

    Raises:
        ValueError: if it names neither tar files nor Parquet files.
    """
    ends = (*ARCHIVE_EXTENSIONS, *(part + "}" for part in ARCHIVE_EXTENSIONS), "*")
    if not text.endswith(ends):
        raise ValueError(
            f"train_data and val_data must name {' or '.join(ARCHIVE_EXTENSIONS)} files, such as "
            f"/data/train-{{0000..1023}}.tar, got {text}; folders with train/ and val/ are for data"
        )


def expand(pattern: str) -> list[str]:
    """The files of a pattern such as `/data/train-{0000..1023}.tar` or `/data/train-*.tar`, sorted.

    Raises:
        ValueError: if there is none, one of those that braces name is missing, or they are not all
            tar files or all Parquet files.
    """
    if _REMOTE.match(pattern):
        raise ValueError(f"pattern must name files of this machine, got {pattern}: download them")
    files: set[str] = set()
    for part in _without_braces(pattern):
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        missing = [file for file in found if not os.path.isfile(file)]
        if missing or not found:
            raise ValueError(
                f"pattern {pattern} must name files that exist, found no {(missing or [part])[0]}"
            )
        files.update(os.path.abspath(file) for file in found)
    _check_kind(sorted(files), pattern)
    return sorted(files)


def _without_braces(pattern: str) -> list[str]:
    """Every text that a pattern's braces stand for."""
    pieces = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices = [
        _choices(piece, pattern) if number % 2 else [piece] for number, piece in enumerate(pieces)
    ]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MOST:
        raise ValueError(f"pattern must name at most {_MOST} files, got {count} in {pattern}")
    texts = ["".join(parts) for parts in itertools.product(*choices)]
    if any(set("{}") & set(text) for text in texts):
        raise ValueError(f"pattern must have braces in pairs, not nested, got {pattern}")
    return texts


def _choices(inside: str, pattern: str) -> list[str]:
    if span := _RANGE.fullmatch(inside):
        first, last = span.groups()
        if int(first) > int(last) or int(last) - int(first) >= _MOST:
            raise ValueError(f"pattern must have ranges from low to high, got {pattern}")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    return inside.split(",")


def _check_kind(files: Sequence[str], pattern: str) -> None:
    for file in files:
        if _COMPRESSED.search(file):
            raise ValueError(
                f"shards must be plain tar files, in which any image is one seek, got the "
                f"compressed {file}; unpack it, as by gunzip"
            )
    kinds = {os.path.splitext(file)[1] for file in files}
    if len(kinds) != 1 or not kinds <= set(ARCHIVE_EXTENSIONS):
        raise ValueError(
            f"pattern {pattern} must name {' or '.join(ARCHIVE_EXTENSIONS)} files, all of one "
            f"kind, got {', '.join(sorted(kinds)) or 'none'}"
        )


def compressed_tars(folder: Path) -> list[str]:
    """Names of the compressed tar files in a folder."""
    names = (entry.name for entry in os.scandir(folder))
    return sorted(name for name in names if _COMPRESSED.search(name) and not is_hidden(name))


def check_complete(files: Sequence[str]) -> None:
    """Refuses a part of the files that say of themselves how many they are.

    Raises:
        ValueError: naming a file that is missing.
    """
    for file in files:
        match = _NUMBERED.search(os.path.basename(file))
        if match is None:
            return
        start, end = (len(file) - len(os.path.basename(file)) + at for at in match.span())
        number, count = match.groups()
        wanted = {
            f"{file[:start]}-{n:0{len(number)}d}-of-{count}.{file[end:]}" for n in range(int(count))
        }
        if missing := sorted(wanted - set(files)):
            raise ValueError(
                f"the archives beside {file} must be all {int(count)}, found no {missing[0]}"
            )


def quote_hint(arguments: Sequence[str]) -> str:
    """What to say of arguments that no flag takes, where the shell has expanded a pattern."""
    is_expanded = any(text.endswith(ARCHIVE_EXTENSIONS) for text in arguments)
    return "; quote a pattern of archives, so that the shell leaves it alone" if is_expanded else ""
