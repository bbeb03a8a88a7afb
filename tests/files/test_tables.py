"""CSV files there and back."""

from __future__ import annotations

from pathlib import Path

from rsfast.files.tables import as_csv, read_columns, read_rows, write_rows


def test_rows_come_back_as_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", [{"a": 1, "b": "x, y"}, {"a": 2.5, "b": None}])
    assert read_rows(tmp_path / "a.csv") == [{"a": "1", "b": "x, y"}, {"a": "2.5", "b": ""}]
    assert read_columns(tmp_path / "a.csv") == {"a": ["1", "2.5"], "b": ["x, y", ""]}


def test_a_path_of_any_bytes_survives(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode(errors="surrogateescape")
    write_rows(tmp_path / "a.csv", [{"image": name}])
    assert read_rows(tmp_path / "a.csv") == [{"image": name}]
    assert b"caf\xe9.jpg" in (tmp_path / "a.csv").read_bytes()


def test_lines_end_the_same_everywhere() -> None:
    assert as_csv([{"a": 1}]) == "a\n1\n"


def test_rows_of_a_later_program_may_have_more_columns() -> None:
    assert as_csv([{"a": 1}, {"a": 2, "b": 3}]) == "a,b\n1,\n2,3\n"
