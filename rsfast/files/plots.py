"""Pictures of a run, drawn without a display."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

__all__ = [
    "accuracy_against_multiply_adds",
    "accuracy_over_epochs",
    "main_figure",
    "new_figure",
    "write",
]


_MOST_NAMED = 12  # points of a curve


def main_figure(columns: Collection[str]) -> tuple[str, str]:
    """Which figure of a file is drawn, and what it is called: mean IoU where there is one.

    Args:
        columns: of a CSV file with top1 or iou.
    """
    return ("iou", "mean IoU") if "iou" in columns else ("top1", "top-1")


def accuracy_over_epochs(
    rows: Sequence[Mapping[str, Any]],
    resolutions: Sequence[int],
    path: Path,
    figure_name: str = "top1",
    label: str = "validation top-1 (%)",
) -> None:
    """A figure of every resolution after each epoch.

    Args:
        rows: of summary.csv.
        resolutions: of the columns <figure_name>_<resolution>.
        path: of the PNG.
        figure_name: which figure it is.
        label: of the axis.
    """
    figure, (axes,) = new_figure()
    epochs = [int(row["epoch"]) for row in rows]
    for resolution in resolutions:
        values = [float(row[f"{figure_name}_{resolution}"]) for row in rows]
        axes.plot(epochs, values, marker="." if len(rows) < 30 else None, label=f"{resolution} px")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    write(figure, path)


def accuracy_against_multiply_adds(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Accuracy against multiply-adds; trained resolutions filled, others hollow (Figure 1).

    Args:
        path: of the PNG.
        rows: of a CSV file with resolution, trained, multiply_adds, and top1 or iou.
    """
    figure, (axes,) = new_figure()
    rows = [row for row in rows if row["resolution"] != "ensemble"]
    rows = sorted(rows, key=lambda row: int(row["multiply_adds"]))
    costs = [int(row["multiply_adds"]) / 1e6 for row in rows]
    name, label = main_figure(rows[0])
    values = [float(row[name]) for row in rows]
    axes.plot(costs, values, color="0.7", zorder=1)
    for trained, kind, face in (("True", "trained", "C0"), ("False", "not trained", "white")):
        points = zip(costs, values, rows, strict=True)
        part = [(cost, value) for cost, value, row in points if row["trained"] == trained]
        if part:
            axes.scatter(
                *zip(*part, strict=True), facecolor=face, edgecolor="C0", label=kind, zorder=2
            )
    for cost, value, row in zip(costs, values, rows, strict=True):
        if len(rows) > _MOST_NAMED and row["trained"] == "False":
            continue
        axes.annotate(
            row["resolution"],
            (cost, value),
            textcoords="offset points",
            xytext=(4, -11),
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.margins(x=0.06, y=0.12)  # room for the resolutions beside the points
    axes.set_xlabel("multiply-adds per image (millions)")
    axes.set_ylabel(f"{label} (%)")
    axes.legend(frameon=False)
    write(figure, path)


def new_figure(
    columns: int = 1, size: tuple[float, float] = (6.4, 4.2), **options: Any
) -> tuple[Figure, list[Any]]:
    """A figure and its axes, side by side.

    Args:
        columns: of axes.
        size: width and height in inches.
        options: of `Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def write(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    figure.savefig(path, dpi=150)
