"""The folder of a benchmark's result: rows, samples, plots, and what they were measured on."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.support import plots
from rsfast.runtime.environment import describe

__all__ = ["Results"]

_RESULTS = Path(__file__).parents[1] / "results"


class Results:
    """Rows as they come, on disk after each.

    Args:
        folder: is created; by default bench/results/<date>_<topic>_<gpu>. It gets summary.json
            (medians, quartiles, versions, date, device), samples.json (every single measurement by
            row name) and, at the end, plots.png and README.md.
        topic: of the default folder.
        device: that is measured.
    """

    def __init__(self, folder: Path | None, topic: str, device: torch.device) -> None:
        facts = describe(device)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        place = re.sub(r"\W+", "-", str(facts.get("gpu", "cpu"))).lower()
        self.folder = folder or _RESULTS / f"{today}_{topic}_{place}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._about = {
            **facts,
            "date": today,
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

    def finish(self, command: Sequence[str], about: str) -> None:
        """Draws plots.png and writes README.md.

        Args:
            command: that made the rows, after `python -m`.
            about: what was measured, in a paragraph.
        """
        plots.draw(self.rows, self.folder / "plots.png")
        lines = [
            f"# {self.folder.name}\n",
            f"`python -m {shlex.join(command)}`\n",
            f"On {self._about.get('gpu', 'a CPU')}, torch {self._about['torch']}.\n",
            f"{about}\n",
            "Medians, quartiles and versions: `summary.json`; every sample: `samples.json`.\n",
        ]
        if (self.folder / "plots.png").exists():
            lines.append("![Medians and quartiles](plots.png)\n")
        lines.append("| row | median | quartiles | unit | n |\n|---|---|---|---|---|")
        lines += [
            f"| {r['name']} | {r['value']:.4g} | {r['p25']:.4g} to {r['p75']:.4g} | {r['unit']} | "
            f"{r['n']} |"
            for r in self.rows
        ]
        (self.folder / "README.md").write_text("\n".join(lines) + "\n")

    def _write(self, name: str, content: Any) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=1) + "\n")
