"""The picture: accuracy against latency, a curve per implementation, a panel per race."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from bench.deploy.implementations import IMPLEMENTATIONS, Implementation

__all__ = ["draw"]

_COLORS = {
    ("onnxruntime", "fp32"): "C0",
    ("onnxruntime", "int8"): "C1",
    ("openvino", "fp32"): "C2",
    ("openvino", "bf16"): "C3",
    ("openvino", "int8"): "C4",
    ("pytorch", "fp32"): "0.4",
}
_LINES = {"fast": "-", "small": "--", "separate": ":"}
_KNOWN = {impl.name: impl for impl in IMPLEMENTATIONS}

Points = Sequence[tuple[float, float]]  # milliseconds; percent or pixels


def draw(panels: Mapping[int, Mapping[str, Points]], label: str, path: Path) -> None:
    """Writes a PNG.

    Args:
        panels: threads -> implementation -> a point per resolution.
        label: of the vertical axis.
        path: of the PNG.
    """
    figure = Figure(figsize=(1.5 + 5.5 * len(panels), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (threads, curves) in zip(grid, panels.items(), strict=True):
        for name, points in curves.items():
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker="." if _KNOWN[name].family == "rsfast" else "x",
                markersize=6,
                linewidth=1.3,
                color=_COLORS[_KNOWN[name].runtime, _KNOWN[name].precision],
                linestyle=_line(_KNOWN[name]),
                label=name,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("median latency at batch 1, ms")
        axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", fontsize=10, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel(label)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def _line(impl: Implementation) -> str:
    if impl.family == "pytorch":
        return "--" if impl.mode else "-"
    return _LINES[impl.mode or impl.family]
