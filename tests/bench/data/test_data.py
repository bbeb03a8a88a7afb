"""The benchmark of forms runs from end to end, on a few small images."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from bench.data.__main__ import main
from helpers import JPEG


def test_the_benchmark_writes_a_row_for_every_form_and_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    monkeypatch.setenv("RSFAST_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as stored:
        for number in range(3):
            stored.writestr(f"set/n0{number}_word.JPEG", JPEG)
    output = tmp_path / "out"
    sizes = ["--rounds", "2", "--copies", "2", "--batch", "2", "--batches", "2"]
    command = [str(tmp_path / "images.zip"), "--output", str(output), *sizes, "--entries", "5000"]
    assert main(command) == 0
    names = {row["name"] for row in json.loads((output / "summary.json").read_text())["rows"]}
    for form in ("folder", "shards", "parquet", "parquet-snappy"):
        assert {f"read/{form}", f"pil/{form}"} <= names
    assert {"index/shards", "start/shards", "start/shards memory per million"} <= names
    assert "3 photographs" in (output / "README.md").read_text()
