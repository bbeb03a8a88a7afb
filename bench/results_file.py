"""summary.json and samples.json: the rows of a benchmark and what they were measured on."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rsfast.environment import describe

__all__ = ["Results"]


class Results:
    """Rows as they come, on disk after each.

    Args:
        folder: is created; holds summary.json (medians, quartiles, versions, date, device) and
            samples.json (every single measurement by row name).
        device: that is measured.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._about = {
            **describe(device),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        self.rows: list[dict[str, Any]] = []
        self._samples: dict[str, list[float]] = {}

    def add(self, name: str, samples: Sequence[float], unit: str, **more: Any) -> None:
        """Adds a row, writes both files and prints the row."""
        low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
        value = statistics.median(samples)
        row = {"name": name, "value": value, "unit": unit, "p25": low, "p75": high}
        self.rows.append({**row, "n": len(samples), **more})
        self._samples[name] = list(samples)
        self._write("summary.json", {**self._about, "rows": self.rows})
        self._write("samples.json", self._samples)
        share = more.get("share_of_copy_bandwidth")
        shown = "" if share is None else f"{share:7.1%} of a copy"
        print(f"{name:80s} {value:12.1f} {unit:8s} {shown}", flush=True)

    def _write(self, name: str, content: Any) -> None:
        (self._folder / name).write_text(json.dumps(content, indent=1) + "\n")
