"""One page of bars from the rows of a result: `python -m bench.support.plots FOLDER`.

A panel holds what competes: rows whose names differ in the implementation, or the precision, only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.support.shapes import ARCHITECTURES

__all__ = ["draw", "main"]

_PRECISIONS = ("bf16", "fp16", "fp32")
_COLUMNS = 3
_OURS = "rsfast"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Medians as bars, quartiles as whiskers; what competes with nothing is left out.

    Args:
        rows: of summary.json.
        path: of the PNG.
    """
    panels = _panels(rows)
    if not panels:
        return
    lines = math.ceil(len(panels) / _COLUMNS)
    tallest = max(len(panel) for panel in panels.values())
    size = 5.2 * min(_COLUMNS, len(panels)), lines * (0.9 + 0.28 * tallest)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, min(_COLUMNS, len(panels)), squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, (title, bars) in zip(grid.flat, panels.items(), strict=False):
        axes.set_visible(True)
        _draw_panel(axes, title, bars)
    figure.savefig(path, dpi=110)


def _panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Title -> label -> row. Of kernels, the sums over whole networks rather than each layer."""
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        kind, *middle, impl = row["name"].split("/")
        if kind == "latency":  # its rows name the resolution last
            middle, impl = [*middle[:-1], impl], middle[-1]
        is_layer = kind == "kernel" and middle[0] in ("conv2d", "switchable_bn_act")
        if kind in ("accuracy", "card", "conv", "switch") or (
            is_layer and middle[1] not in ARCHITECTURES
        ):
            continue
        label = impl
        if kind == "train_step":  # float32 and 16 bits race each other
            label = " ".join([impl, *(part for part in middle if part in _PRECISIONS)])
            middle = [part for part in middle if part not in _PRECISIONS]
        panels.setdefault("/".join([kind, *middle]), {})[label] = row
    return {title: bars for title, bars in panels.items() if len(bars) > 1}


def _draw_panel(axes: Any, title: str, bars: Mapping[str, Mapping[str, Any]]) -> None:
    labels, rows = list(bars), list(bars.values())
    values = [row["value"] for row in rows]
    whiskers = [
        [max(row["value"] - row["p25"], 0) for row in rows],
        [max(row["p75"] - row["value"], 0) for row in rows],
    ]
    colors = ["C0" if label.startswith(_OURS) else "0.75" for label in labels]
    axes.barh(labels, values, xerr=whiskers, color=colors, error_kw={"elinewidth": 1})
    for index, value in enumerate(values):
        axes.annotate(
            f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
            (0, index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(rows[0]["unit"], fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.support.plots", description=__doc__)
    parser.add_argument("folder", type=Path, help="with a summary.json; gets plots.png")
    folder = parser.parse_args(argv).folder
    draw(json.loads((folder / "summary.json").read_text())["rows"], folder / "plots.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
