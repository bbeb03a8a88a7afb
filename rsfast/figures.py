"""`python -m rsfast.figures FOLDER`: draws figures anew from the CSV files beside them.

Evaluations, analyses and experiments write numbers, and call this to draw them; a picture can
therefore be made again wherever its numbers are.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator, ScalarFormatter

from rsfast.deploy.table import pareto
from rsfast.files.plots import accuracy_against_multiply_adds, main_figure, new_figure, write
from rsfast.files.tables import read_rows

__all__ = ["draw", "main"]

Rows = list[dict[str, str]]


def draw(folder: Path) -> list[Path]:
    """Draws what the CSV files of a folder allow; returns the pictures."""
    drawn = []
    for name, (sources, picture) in _FIGURES.items():
        if all((folder / source).exists() for source in sources):
            picture(folder / name, *(read_rows(folder / source) for source in sources))
            drawn.append(folder / name)
    return drawn


def _results(path: Path, results: Rows, comparisons: Rows) -> None:
    """Left: figures of every method against resolution; right: differences with intervals."""
    name, label = main_figure(results[0])
    pairs = list(dict.fromkeys(_pair(row) for row in comparisons))
    figure, (left, right) = new_figure(2, (12.0, max(5.0, 0.55 * len(pairs))))
    for number, (method, part) in enumerate(_grouped(results, "method").items()):
        found = {
            int(resolution): [float(row[name]) for row in rows]
            for resolution, rows in _grouped(part, "resolution").items()
        }
        means = [statistics.mean(values) for values in found.values()]
        spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in found.values()]
        left.errorbar(list(found), means, spreads, label=method, capsize=2, **_style(number))
    left.set_xlabel("tested resolution (px)")
    left.set_xticks(sorted({int(row["resolution"]) for row in results}))
    left.set_ylabel(f"{label} (%), mean and standard deviation")
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower left",
        frameon=False,
        fontsize=8,
        ncols=3,
    )

    points = sorted({row["resolution"] for row in comparisons}, key=_largest_first)
    colors = {point: f"C{number % 10}" for number, point in enumerate(points)} | {"mean": "black"}
    for row in comparisons:
        number, color = points.index(row["resolution"]), colors[row["resolution"]]
        y = pairs.index(_pair(row)) + 0.7 * ((number + 0.5) / len(points) - 0.5)
        right.plot(_ends(row, "images"), [y, y], color=color, linewidth=1, alpha=0.5)
        if not math.isnan(float(row["p"])):
            right.plot(_ends(row, "seeds"), [y, y], color=color, linewidth=2.5, alpha=0.5)
        right.plot([float(row["mean"])], [y], "o", color=color, markersize=4)
    for point in points:
        name = point if point == "mean" else f"{point} px"
        right.plot([], [], "o", color=colors[point], label=name)
    right.axvline(0.0, color="0.4", linewidth=1)
    reach = max(1.0, *(abs(end) for row in comparisons for end in _ends(row, "images")))
    right.set_xlim(-1.6 * reach, 1.6 * reach)  # intervals over two or three seeds may be wider
    right.set_yticks(range(len(pairs)), [f"{a} against {b}" for a, b in pairs], fontsize=8)
    right.invert_yaxis()
    right.set_xlabel(f"points of {label}\n95 % intervals: thick over seeds, thin over images")
    figure.legend(
        *right.get_legend_handles_labels(),
        loc="outside lower right",
        frameon=False,
        fontsize=8,
        ncols=len(points),
    )
    write(figure, path)


def _epochs(path: Path, rows: Rows) -> None:
    """Every method at each resolution after each epoch of training, means over the seeds."""
    name, label = main_figure(rows[0])
    methods = list(_grouped(rows, "method"))
    groups = _grouped(rows, "resolution")
    size = (2.6 * len(groups) + 1.0, 3.8)
    figure, panels = new_figure(len(groups), size, sharex=True, sharey=True)
    for axes, (resolution, part) in zip(panels, groups.items(), strict=True):
        for method, own in _grouped(part, "method").items():
            seeds = _grouped(own, "epoch")
            values = [statistics.mean(float(row[name]) for row in some) for some in seeds.values()]
            color = f"C{methods.index(method) % 10}"
            axes.plot([int(epoch) for epoch in seeds], values, color=color)
        axes.set_title(f"{resolution} px", fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for number, method in enumerate(methods):
        panels[0].plot([], [], color=f"C{number % 10}", label=method)
    panels[0].set_ylabel(f"{label} (%)")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        frameon=False,
        fontsize=8,
        ncols=min(5, len(methods)),
    )
    write(figure, path)


def _pair(row: dict[str, str]) -> tuple[str, str]:
    return row["ours"], row["theirs"]


def _ends(row: dict[str, str], of: str) -> list[float]:
    return [float(row[f"{of}_low"]), float(row[f"{of}_high"])]


def _largest_first(resolution: str) -> float:
    return math.inf if resolution == "mean" else -int(resolution)


def _alpha(path: Path, rows: Rows) -> None:
    """Learned shares of the resolutions over training."""
    figure, (axes,) = new_figure()
    for resolution, part in _grouped(rows, "resolution").items():
        epochs = [int(row["epoch"]) for row in part]
        shares = [float(row["share"]) for row in part]
        axes.plot(epochs, shares, marker=".", label=f"{resolution} px")
    axes.set_xlabel("epoch")
    axes.set_ylabel("share in the ensemble (softmax of alpha)")
    axes.set_ylim(0.0, 1.1 * max(float(row["share"]) for row in rows))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    write(figure, path)


def _batch_norm(path: Path, rows: Rows) -> None:
    """Means over the channels of each layer's batch-norm parameters, by resolution (Figure 6)."""
    names = ("gamma", "beta", "running_mean", "running_var")
    figure, panels = new_figure(4, (15.0, 3.8))
    for axes, name in zip(panels, names, strict=True):
        for resolution, part in _grouped(rows, "resolution").items():
            values = [float(row[name]) for row in part]
            axes.plot(range(1, len(part) + 1), values, marker=".", label=f"{resolution} px")
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("batch-norm layer")
        if name == "running_var" and all(float(row[name]) > 0 for row in rows):
            axes.set_yscale("log")
    panels[0].set_ylabel("mean over channels")
    panels[0].legend(frameon=False, fontsize=8)
    write(figure, path)


def _features(path: Path, rows: Rows) -> None:
    """Density of the pooled features under training and test preprocessing (Figure 3)."""
    groups = _grouped(rows, "resolution")
    figure, panels = new_figure(len(groups), (3.0 * len(groups) + 1.0, 3.4), sharey=True)
    for axes, (resolution, part) in zip(panels, groups.items(), strict=True):
        for preprocessing, bins in _grouped(part, "preprocessing").items():
            edges = [float(row["low"]) for row in bins] + [float(bins[-1]["high"])]
            densities = [float(row["density"]) for row in bins]
            mean = float(bins[0]["mean"])
            axes.stairs(densities, edges, label=f"{preprocessing}, mean {mean:.3f}")
        axes.set_title(f"{resolution} px", fontsize=10)
        axes.set_yscale("log")
        axes.set_xlabel("pooled feature")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("density")
    write(figure, path)


def _shares(path: Path, rows: Rows) -> None:
    """Table 1: images or pixels wrong at the row's resolution and right at the column's."""
    groups = _grouped(rows, "method")
    figure, panels = new_figure(len(groups), (3.4 * len(groups) + 1.2, 3.9))
    highest = max(1.0, *(float(row["share"]) for row in rows))
    for axes, (method, part) in zip(panels, groups.items(), strict=True):
        names = list(dict.fromkeys(row["wrong_at"] for row in part))
        table = [[math.nan] * len(names) for _ in names]
        for row in part:
            table[names.index(row["wrong_at"])][names.index(row["right_at"])] = float(row["share"])
        picture = axes.imshow(table, cmap="Blues", vmin=0.0, vmax=highest, aspect="auto")
        for line, values in enumerate(table):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    color = "white" if value > 0.6 * highest else "black"
                    axes.text(column, line, f"{value:.1f}", ha="center", va="center", color=color)
        axes.set_title(method, fontsize=10)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("right at (px)")
        axes.grid(False)
    panels[0].set_ylabel("wrong at (px)")
    figure.colorbar(picture, ax=panels, label="share of all (%)", shrink=0.8)
    write(figure, path)


def _dense(path: Path, rows: Rows) -> None:
    """Figures at many resolutions, by where the batch norm comes from (Figure 4, right)."""
    name, ylabel = main_figure(rows[0])
    figure, (axes,) = new_figure(size=(7.0, 4.2))
    for between, part in _grouped(rows, "between").items():
        part = sorted(part, key=lambda row: int(row["resolution"]))
        resolutions = [int(row["resolution"]) for row in part]
        values = [float(row[name]) for row in part]
        line = "--" if between == "nearest" else "-"
        label = f"{between} between trained ones"
        axes.plot(resolutions, values, marker=".", linestyle=line, label=label)
    trained = {int(row["resolution"]): float(row[name]) for row in rows if row["trained"] == "True"}
    axes.plot(list(trained), list(trained.values()), "o", color="black", label="trained", zorder=3)
    axes.set_xlabel("resolution (px)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"{ylabel} (%)")
    axes.legend(frameon=False)
    write(figure, path)


def _multiply_adds(path: Path, rows: Rows) -> None:
    """Accuracy against the cost of one image (Figure 1)."""
    part = [row for row in rows if row["between"] == "interpolate"]
    accuracy_against_multiply_adds(path, part)


def _latency(path: Path, rows: Rows) -> None:
    """Top-1 against the time of a call, a panel for each number of threads and batch size."""
    worth = "top1" if any(row["top1"] for row in rows) else "resolution"
    rows = [row for row in rows if row[worth]]
    panels = [
        (f"{_several(threads, 'thread')}, batch {batch}", part)
        for threads, some in _grouped(rows, "threads").items()
        for batch, part in _grouped(some, "batch").items()
    ]
    figure, all_axes = new_figure(len(panels), (5.2 * len(panels) + 1.2, 4.2), sharey=True)
    for axes, (title, part) in zip(all_axes, panels, strict=True):
        points = [(float(row["p50_ms"]), float(row[worth])) for row in part]
        best = pareto(*zip(*points, strict=True))
        chosen = sorted(point for point, keep in zip(points, best, strict=True) if keep)
        label = "Pareto set"
        axes.plot(*zip(*chosen, strict=True), "o", mfc="none", color="black", ms=9, label=label)
        lines: dict[str, list[tuple[float, float]]] = {}
        for row, point in zip(part, points, strict=True):
            name = f"{row['runtime']} {row['precision']} {row['mode']}"
            lines.setdefault(name, []).append(point)
        for number, (name, line) in enumerate(lines.items()):
            axes.plot(*zip(*sorted(line), strict=True), label=name, **_style(number))
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(ScalarFormatter())
        axes.set_xlabel("median of a call (ms)")
        axes.legend(frameon=False, fontsize=8)
    all_axes[0].set_ylabel("top-1 (%)" if worth == "top1" else "resolution (px)")
    write(figure, path)


def _several(count: str, noun: str) -> str:
    return f"{count} {noun}" if count == "1" else f"{count} {noun}s"


def _grouped(rows: Rows, name: str) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def _style(number: int) -> dict[str, Any]:
    """Tells apart more lines than there are colours."""
    line = ("-", "--", ":")[number // 10 % 3]
    marker = "osD^v"[number % 5]
    return {"color": f"C{number % 10}", "linestyle": line, "marker": marker, "markersize": 4}


_FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., None]]] = {
    "results.png": (("results.csv", "comparisons.csv"), _results),
    "epochs.png": (("epochs.csv",), _epochs),
    "accuracy.png": (("accuracy.csv",), accuracy_against_multiply_adds),
    "alpha.png": (("alpha.csv",), _alpha),
    "batch_norm.png": (("batch_norm.csv",), _batch_norm),
    "features.png": (("features.csv",), _features),
    "shares.png": (("shares.csv",), _shares),
    "dense.png": (("dense.csv",), _dense),
    "multiply_adds.png": (("dense.csv",), _multiply_adds),
    "latency.png": (("latency.csv",), _latency),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Exit codes: 0 done, 1 a picture cannot be written, 2 a folder holds nothing to draw, 130
    interrupted.
    """
    parser = argparse.ArgumentParser(prog="rsfast.figures", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="searched with all below them")
    folders = parser.parse_args(argv).folders
    try:
        return _draw_all(folders)
    except ValueError as error:
        print(f"rsfast.figures: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"rsfast.figures: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rsfast.figures: interrupted; the pictures so far are whole", file=sys.stderr)
        return 130


def _draw_all(folders: Sequence[Path]) -> int:
    for folder in folders:
        files = folder.rglob("*.csv")
        drawn = [path for place in sorted({f.parent for f in files}) for path in draw(place)]
        if not drawn:
            reason = "holds no known CSV files" if folder.exists() else "does not exist"
            print(f"rsfast.figures: error: {folder} {reason}", file=sys.stderr)
            return 2
        print("\n".join(map(str, drawn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
