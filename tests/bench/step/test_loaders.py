"""The comparison of loaders covers every setting that it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.step import bench_loader, loaders
from rsfast.data.builtin import builtin_root


def test_loaders_are_timed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = builtin_root(tmp_path / "cache", num_train=20, num_val=10)
    monkeypatch.setattr(bench_loader, "builtin_root", lambda: root)
    monkeypatch.setattr(bench_loader, "BATCH", 4)
    monkeypatch.setattr(bench_loader, "BATCHES", 1)
    monkeypatch.setattr(bench_loader, "CASES", [("pil", "cpu")])
    assert loaders.main(["--output", str(tmp_path), "--threads", "1", "2", "--rounds", "1"]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["loader/pil/cpu/threads2"]
    assert rows[0]["value"] > 0


def test_a_gpu_tries_every_share_with_every_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_loader, "CASES", [("dali", "cpu"), ("dali", "cuda")])
    cases = {name: options for name, _, _, options in loaders._cases([2, 4], [0.0, 0.9])}
    assert cases["dali/cpu/threads4"] == {"workers": 4}
    assert cases["dali/cuda/threads2/hw0.9"] == {"workers": 2, "hw_decoder_load": 0.9}
    assert len(cases) == 2 + 4
