"""Which switch is faster, and by how much, out of rows of results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["targets", "verdicts"]

Row = Mapping[str, Any]
Rows = Mapping[str, Row]

# Images per second of ResNet-50 at five resolutions and batch 256 in bf16: the first goal, and
# MLPerf Training v4.0's rate per pixel on such a card.
_GOALS = {"H100": (2350.0, 2599.0), "H200": (2600.0, 2886.0)}
_OVER_EAGER, _OVER_COMPILED, _OF_COPY = 1.4, 1.2, 0.85
_RACE = "train_step/resnet50/bf16/b256"
_SWITCHES = (
    ("--graph", "rsfast_graph", "--no-graph", "rsfast_eager"),
    ("--kernels cuda", "rsfast_cuda", "--kernels triton", "rsfast_graph"),
)


def verdicts(files: Mapping[str, Rows]) -> list[str]:
    """A line for each switch that two rows of one file decide.

    Args:
        files: rows by name, of each file; numbers of two files are not compared.
    """
    return [line for rows in files.values() for line in _of_file(rows)]


def targets(gpu: str, files: Mapping[str, Rows]) -> list[tuple[str, float, float]]:
    """(what, reached, wanted) for every goal that there is a number for."""
    found: list[tuple[str, float, float]] = []
    goals = next((goals for card, goals in _GOALS.items() if card in gpu), ())
    for rows in files.values():
        race = {
            name.removeprefix(f"{_RACE}/"): r["value"]
            for name, r in rows.items()
            if name.startswith(_RACE)
        }
        ours = race.get("rsfast_graph")
        if ours is not None:
            found += [(f"{_RACE}, images/s", ours, goal) for goal in goals]
            if "authors_amp" in race:
                found.append(("times the authors' way", ours / race["authors_amp"], _OVER_EAGER))
            compiled = [v for impl, v in race.items() if impl.startswith("authors_compile")]
            if compiled:
                found.append(("times the best torch.compile", ours / max(compiled), _OVER_COMPILED))
        for name, row in rows.items():
            group = name.startswith("kernel/switchable_bn_act/resnet50/bf16/")
            if group and name.endswith("/rsfast"):
                share = row["share_of_copy_bandwidth"]
                found.append((f"{name}, share of a copy", share, _OF_COPY))
    return found


def _of_file(rows: Rows) -> Iterator[str]:
    for name, row in rows.items():
        place, _, impl = name.rpartition("/")
        if not name.startswith("train_step/"):
            continue
        for switch, ours, other, theirs in _SWITCHES:
            if impl == ours and f"{place}/{theirs}" in rows:
                yield f"{place}: {_compared(switch, row, other, rows[f'{place}/{theirs}'])}"
    yield from _best_of("loader/", rows)
    fed = {name: row for name, row in rows.items() if name.startswith("end_to_end/")}
    for name, row in fed.items():
        place, _, source = name.rpartition("/")
        random = fed.get(f"{place}/synthetic")
        if source != "synthetic" and random is not None:
            share = row["value"] / random["value"]
            yield f"{place}: fed from files the step is at {share:.0%} of its rate"


def _best_of(prefix: str, rows: Rows) -> Iterator[str]:
    found = sorted(
        ((row["value"], name, row) for name, row in rows.items() if name.startswith(prefix)),
        key=lambda entry: -entry[0],
    )
    if len(found) > 1:
        (_, first, best), (_, second, other) = found[:2]
        yield _compared(first, best, second, other)


def _compared(name: str, row: Row, other: str, against: Row) -> str:
    """Decided if the medians are more than twice the wider quartiles' distance apart."""
    spread = max(r["p75"] - r["p25"] for r in (row, against))
    numbers = f"{row['value']:,.0f} against {against['value']:,.0f} {row['unit']}"
    if abs(row["value"] - against["value"]) <= 2 * spread:
        return f"{name} or {other}: not decided ({numbers}, quartiles {spread:,.0f} apart)"
    if row["value"] > against["value"]:
        return f"{name} is {row['value'] / against['value']:.2f} times {other} ({numbers})"
    return f"{name} is slower: {row['value'] / against['value']:.2f} times {other} ({numbers})"
