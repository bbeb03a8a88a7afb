"""summary.json: the rows of a benchmark and what they were measured on."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rsfast.environment import describe

__all__ = ["make_row", "write_summary"]


def make_row(name: str, values: Sequence[float], unit: str, **more: Any) -> dict[str, Any]:
    """Median and quartiles of repeated measurements."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    value = statistics.median(values)
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "p25": low,
        "p75": high,
        "n": len(values),
    } | (more)


def write_summary(folder: Path, rows: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Writes rows, versions, date and device."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = {
        **describe(device),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "rows": list(rows),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
