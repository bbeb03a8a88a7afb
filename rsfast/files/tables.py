"""CSV files and logs as lists of rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rsfast.files.seal import write_whole

__all__ = ["as_csv", "read_columns", "read_log", "read_rows", "write_rows"]

_ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}  # of any path


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by column."""
    with open(file, newline="", **_ENCODING) as lines:
        return list(csv.DictReader(lines))


def read_columns(file: Path) -> dict[str, list[str]]:
    """The columns of a CSV file."""
    with open(file, newline="", **_ENCODING) as lines:
        names, *rows = csv.reader(lines)
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def read_log(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a run's log.jsonl as text and content, none if it is not there.

    Whole lines only: a killed run or machine may have left other things.
    """
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "event" in line:
            found.append((f"{text}\n", line))
    return found


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a CSV file; the rows, of which there is at least one, name the columns."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file, whole or not at all; see :func:`as_csv`."""
    write_whole(file, [as_csv(rows).encode(**_ENCODING)])
