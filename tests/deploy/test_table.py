"""Reading latency.csv, and what of it is worth its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rsfast.deploy.table import Row, Table, pareto
from rsfast.files.tables import write_rows


def line(resolution: int, p50: float, **other: Any) -> dict[str, Any]:
    return {
        "runtime": "onnxruntime",
        "precision": "fp32",
        "mode": "fast",
        "threads": 1,
        "batch": 1,
        "resolution": resolution,
        "p50_ms": p50,
        "p95_ms": p50 + 1,
        "load_ms": 100.0,
        "memory_mib": 50.0,
        "switch_ms": 0.1,
        "rounds": 50,
        "top1": "",
        **other,
    }


def written(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "latency.csv"
    write_rows(path, lines)
    return path


def test_what_is_slower_and_no_better_is_not_worth_its_cost() -> None:
    assert pareto([1, 2, 3, 4], [10, 30, 20, 40]) == [True, True, False, True]


@pytest.mark.parametrize(
    ("costs", "values", "expected"),
    [
        ([1, 1], [10, 20], [False, True]),
        ([1, 2], [10, 10], [True, False]),
        ([1, 1], [10, 10], [True, True]),
        ([], [], []),
    ],
    ids=["same cost", "same value", "same", "none"],
)
def test_ties_leave_what_nothing_beats(
    costs: list[float], values: list[float], expected: list[bool]
) -> None:
    assert pareto(costs, values) == expected


def test_the_only_configuration_of_a_file_needs_no_naming(tmp_path: Path) -> None:
    table = Table.read(written(tmp_path, line(96, 5.0, top1=60.5), line(224, 20.0, top1=70.0)))
    assert table.rows == (Row(224, 20.0, 21.0, 70.0), Row(96, 5.0, 6.0, 60.5))


def test_one_of_several_configurations_is_chosen_by_what_differs(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        line(96, 5.0),
        line(96, 3.0, threads=2),
        line(96, 30.0, batch=8),
        line(96, 2.0, precision="int8"),
    )
    table = Table.read(path, threads=2, batch=1, precision="fp32")
    assert [row.p50_ms for row in table.rows] == [3.0]
    with pytest.raises(ValueError, match=r"several values of threads, choose one of \['1', '2'\]"):
        Table.read(path, batch=1, precision="fp32")


def test_a_configuration_that_was_not_measured_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, line(96, 5.0))
    with pytest.raises(ValueError, match=r"rows of mode small, it has \['fast'\]"):
        Table.read(path, mode="small")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"resolution": 96}], "no .*'p50_ms'"),
        ([line(96, 5.0), line(96, 6.0)], "one row per resolution, 96"),
        ([line(96, 5.0, top1=60), line(128, 6.0)], r"not known: \[128\]"),
        ([line(96, 0.0)], "0 < p50_ms"),
        ([line(96, 5.0, p95_ms=4.0)], "p50_ms <= p95_ms"),
        ([line(96, float("nan"))], "finite"),
        ([line(96, 5.0, p95_ms="fast")], "could not convert"),
    ],
    ids=["columns", "twice", "accuracy", "zero", "percentiles", "nan", "text"],
)
def test_what_is_no_table_is_refused(
    tmp_path: Path, lines: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"latency.csv .*{message}"):
        Table.read(written(tmp_path, *lines))


def test_no_file_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.csv must be a table of rsfast.latency"):
        Table.read(tmp_path / "nothing.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match=r"empty.csv must be a table of rsfast.latency"):
        Table.read(tmp_path / "empty.csv")


def test_between_the_measured_percentiles_latency_is_on_a_line() -> None:
    row = Row(96, 10.0, 19.0, None)
    assert [row.latency_ms(p) for p in (50, 75, 95)] == [10.0, 15.0, 19.0]


def test_the_pareto_set_is_that_of_the_percentile() -> None:
    steady, shaky = Row(128, 12.0, 13.0, 65.0), Row(96, 10.0, 20.0, 60.0)
    table = Table((steady, shaky))
    assert table.worthwhile(50) == [shaky, steady]
    assert table.worthwhile(95) == [steady]


def test_without_accuracy_a_larger_resolution_counts_as_a_better_one() -> None:
    rows = [Row(224, 20.0, 21.0, None), Row(160, 25.0, 26.0, None), Row(96, 5.0, 6.0, None)]
    assert [row.resolution for row in Table(tuple(rows)).worthwhile(95)] == [96, 224]
