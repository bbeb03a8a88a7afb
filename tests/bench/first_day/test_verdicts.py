"""What the first day's page concludes from rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.first_day.report import write_report
from bench.first_day.verdicts import targets, verdicts


def rows(spread: float = 10.0, **values: float) -> dict[str, Any]:
    """Of a race at batch 256, by implementation."""
    return {
        f"train_step/resnet50/bf16/b256/{impl}": {
            "value": value,
            "unit": "images/s",
            "p25": value - spread / 2,
            "p75": value + spread / 2,
        }
        for impl, value in values.items()
    }


def test_a_switch_is_decided_beyond_twice_the_spread() -> None:
    faster, equal, slower = (
        verdicts({"race": rows(rsfast_graph=value, rsfast_eager=2000.0)})
        for value in (2100.0, 2015.0, 1900.0)
    )
    assert faster == [
        "train_step/resnet50/bf16/b256: --graph is 1.05 times --no-graph "
        "(2,100 against 2,000 images/s)"
    ]
    assert "--graph or --no-graph: not decided" in equal[0]
    assert "--graph is slower: 0.95 times --no-graph" in slower[0]


def test_rows_of_two_files_are_not_compared() -> None:
    files = {"a": rows(rsfast_graph=2100.0), "b": rows(rsfast_eager=2000.0)}
    assert verdicts(files) == []


def test_the_best_loader_and_what_it_costs_are_named() -> None:
    def row(value: float) -> dict[str, Any]:
        return {"value": value, "unit": "images/s", "p25": value, "p75": value}

    loaders = {"loader/dali/cuda/threads4": row(1500.0), "loader/dali/cuda/threads8": row(3000.0)}
    fed = {"end_to_end/a/synthetic": row(2000.0), "end_to_end/a/dali": row(1900.0)}
    lines = verdicts({"loaders": loaders, "fed": fed})
    assert lines == [
        "loader/dali/cuda/threads8 is 2.00 times loader/dali/cuda/threads4 "
        "(3,000 against 1,500 images/s)",
        "end_to_end/a: fed from files the step is at 95% of its rate",
    ]


@pytest.mark.parametrize(
    ("gpu", "goals"), [("NVIDIA H100 80GB HBM3", 2), ("NVIDIA H200", 2), ("", 0)]
)
def test_goals_are_those_of_the_card(gpu: str, goals: int) -> None:
    race = rows(rsfast_graph=2500.0, authors_amp=1500.0, authors_compile=2000.0)
    norm = {
        "kernel/switchable_bn_act/resnet50/bf16/forward/rsfast": {"share_of_copy_bandwidth": 0.9}
    }
    found = targets(gpu, {"race": race, "ops": norm})
    assert sum("images/s" in what for what, _, _ in found) == goals
    assert found[goals:] == [
        ("times the authors' way", 2500 / 1500, 1.4),
        ("times the best torch.compile", 1.25, 1.2),
        ("kernel/switchable_bn_act/resnet50/bf16/forward/rsfast, share of a copy", 0.9, 0.85),
    ]


def test_the_page_holds_goals_and_verdicts(tmp_path: Path) -> None:
    summary = {"gpu": "NVIDIA H200", "torch": "2.11.0", "rows": []}
    named = rows(rsfast_graph=2700.0, rsfast_eager=2500.0)
    summary["rows"] = [{"name": name, **row} for name, row in named.items()]
    (tmp_path / "race_large").mkdir()
    (tmp_path / "race_large" / "summary.json").write_text(json.dumps(summary))
    page = write_report([], tmp_path)
    assert "gpu NVIDIA H200, torch 2.11.0" in page
    assert "| train_step/resnet50/bf16/b256, images/s | 2,700.00 | 2,600.00 | yes |" in page
    assert "| train_step/resnet50/bf16/b256, images/s | 2,700.00 | 2,886.00 | no |" in page
    assert "- train_step/resnet50/bf16/b256: --graph is 1.08 times --no-graph" in page
