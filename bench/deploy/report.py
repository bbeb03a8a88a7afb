"""The tables of a result's README, from its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.deploy import figure
from bench.deploy.verdicts import as_table, judge, names

__all__ = ["PICTURE", "draw", "write_about"]

PICTURE = "accuracy_latency.png"
_ABOUT = """\
One file for every resolution (`rsfast_*`: `fast` has a pinned session per resolution, `small` one
for all) beside a file per resolution (`separate_*`, each exported alone, each in its pinned session
with the same options) and PyTorch eager (`pytorch_*`: a network of `RSNet.at` per resolution).

Each implementation is held by a process of its own. The processes take turns, one visit each to
every (implementation, resolution) in a random order per round: a call at another resolution, the
first call after the switch, and four more. *latency* is of those four; *switch* is what the first
takes longer than their median; *load* is until all resolutions can be called, from files that the
system has in memory; *memory* is what no file backs once all resolutions have run, less what was
there before loading; *disk* is the size of the files to ship. Logits of all were compared with
PyTorch's before: `error` in summary.json is their distance, by the size of the logits.
`share_of_matmul` is twice the multiply-adds by latency, held against the rate of a product of
1024 x 1024 matrices in the same precision, the same number of threads and the same rounds
(`card/matmul_*`, billions of operations per second). `waited_share` is the part of the time in
which others had the core; its mean over all is {waited:.2%}."""
_BUSY = """\
**A busy machine**: others had the core for more than 2 % of the time: these
times decide nothing."""
_MOST_WAITING = 0.02
_TOP1 = """\
By the sessions that were timed with one thread, at batch 1. Measured once for all that compute the
same: `measured_as` in summary.json."""


def write_about(
    rows: Sequence[Mapping[str, Any]],
    arch: str,
    resolutions: Sequence[int],
    threads: Sequence[int],
    notes: Sequence[str],
) -> str:
    """What was measured and what it says of the goals.

    Args:
        rows: of summary.json.
        arch: of the names of rows.
        resolutions: in pixels.
        threads: that were measured.
        notes: paragraphs on this run.
    """
    shares = [row["waited_share"] for row in rows if "waited_share" in row]
    waited = sum(shares) / len(shares)
    parts = [
        _ABOUT.format(waited=waited),
        *([_BUSY] if waited > _MOST_WAITING else []),
        *notes,
        "## Goals\n\nRatios of medians of this run.",
        as_table(judge(rows, arch, resolutions, threads), resolutions),
        f"![Accuracy or resolution against latency]({PICTURE})",
    ]
    for count in threads:
        parts += [f"## {_threads(count)}", _table(rows, arch, resolutions, count)]
    accuracies = _accuracies(rows, resolutions)
    if accuracies:
        parts += ["## Top-1, percent", _TOP1, accuracies]
    return "\n\n".join([*parts, "## Rows"])


def draw(
    rows: Sequence[Mapping[str, Any]],
    arch: str,
    resolutions: Sequence[int],
    threads: Sequence[int],
    folder: Path,
) -> None:
    """Writes the picture: top-1 against latency, or resolution where no accuracy is known."""
    by_name = {row["name"]: row["value"] for row in rows}
    top1 = {tuple(n.split("/")[-2:]): v for n, v in by_name.items() if n.startswith("accuracy/")}
    panels: dict[int, dict[str, list[tuple[float, float]]]] = {}
    for count in threads:
        panels[count] = {
            impl: [
                (
                    by_name[names("latency", arch, count, impl, r)],
                    top1[impl, str(r)] if top1 else r,
                )
                for r in resolutions
            ]
            for impl in _implementations(rows)
        }
    label = "top-1, percent" if top1 else "resolution, pixels"
    figure.draw(panels, label, folder / PICTURE)


def _threads(count: int) -> str:
    return "One thread" if count == 1 else f"{count} threads"


def _implementations(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = [row["name"].split("/") for row in rows]
    return list(dict.fromkeys(p[-2] for p in parts if p[0] == "latency"))


def _table(
    rows: Sequence[Mapping[str, Any]], arch: str, resolutions: Sequence[int], threads: int
) -> str:
    """A line per implementation: milliseconds, share of the matrix rate, and what it costs."""
    by_name = {row["name"]: row for row in rows}
    heads = [
        *(f"{r} px, ms" for r in resolutions),
        "share of matmul",
        "largest switch, ms",
        "load, ms",
        "memory, MiB",
        "disk, MiB",
    ]
    lines = ["| implementation | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    for impl in _implementations(rows):
        latency = [by_name[names("latency", arch, threads, impl, r)] for r in resolutions]
        switches = [by_name[names("switch", arch, threads, impl, r)]["value"] for r in resolutions]
        shares = [row["share_of_matmul"] for row in latency]
        rest = [
            by_name[names(q, arch, threads, impl, 0)]["value"] for q in ("load", "memory", "disk")
        ]
        cells = [
            impl,
            *(f"{row['value']:.2f}" for row in latency),
            f"{min(shares):.0f} to {max(shares):.0f} %",
            f"{max(switches):.2f}",
            f"{rest[0]:.0f}",
            f"{rest[1]:.1f}",
            f"{rest[2]:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    rates = [
        f"{name.split('/')[1].removeprefix('matmul_')} {row['value']:.0f}"
        for name, row in by_name.items()
        if name.startswith("card/matmul_") and name.endswith(f"/t{threads}")
    ]
    lines.append(f"\nMatrix products, 10^9 operations per second: {', '.join(rates)}.")
    return "\n".join(lines)


def _accuracies(rows: Sequence[Mapping[str, Any]], resolutions: Sequence[int]) -> str:
    """A line per implementation; empty where none was measured."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        kind, *_, impl, resolution = row["name"].split("/")
        if kind == "accuracy":
            found.setdefault(impl, {})[resolution] = row["value"]
    if not found:
        return ""
    lines = ["| | " + " | ".join(f"{r} px" for r in resolutions) + " |"]
    lines.append("|" + "---|" * (len(resolutions) + 1))
    for impl, values in found.items():
        cells = [impl, *(f"{values[str(r)]:.2f}" for r in resolutions)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
