"""A set's table, comparisons and training times, out of its raw files."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from rsfast import figures
from rsfast.analyze import wrong_and_right
from rsfast.config import TrainConfig, shown
from rsfast.config.rules import rules_of
from rsfast.experiments.compare import Difference, spread
from rsfast.experiments.costs import RUNNING, costs_of
from rsfast.experiments.measures import MEASURES, Measure
from rsfast.experiments.results import column_name
from rsfast.experiments.sets import Comparison, ExperimentSet, Method
from rsfast.files.plots import main_figure
from rsfast.files.tables import read_rows, write_rows

__all__ = ["reading", "write_report"]

MEAN = "mean"  # over the resolutions
_SHOWN_SETTINGS = (
    *("arch", "epochs", "lr", "decoder_lr", "warmup_epochs", "weight_decay", "crop_area", "scale"),
    *("val_crop", "normalize", "precision"),
)
_SETTINGS_OF_ROWS = ("resolutions", "distill", "bn", "crop", "copies")

Paper = dict[str, dict[str, list[float]]]  # figure -> method -> by resolution


def write_report(which: ExperimentSet, seeds: Sequence[int], folder: Path) -> None:
    """Writes comparisons.csv, README.md and the figures of a folder that holds the raw files."""
    about = json.loads((folder / "run.json").read_text())
    measure = MEASURES[which.task]
    arch, paper = _paper(which, about["settings"]["arch"])
    images = measure.read(folder / "per_image.csv")

    def images_of(method: Method, resolution: int) -> Any:
        cell = method.cells[resolution]
        return np.stack([images[column_name(cell, seed, resolution)] for seed in seeds])

    methods = {method.name: method for method in which.methods}
    rows = []
    for pair in which.comparisons:
        ours, theirs = methods[pair.ours], methods[pair.theirs]
        common = [r for r, cell in ours.cells.items() if theirs.cells.get(r, cell) != cell]
        for name, part in [*((str(r), [r]) for r in common), (MEAN, common)]:
            difference = measure.difference(
                [images_of(ours, r) for r in part], [images_of(theirs, r) for r in part]
            )
            levels = [list(ours.cells).index(r) for r in part]
            expected = _paper_difference(paper, which, pair, levels)
            rows.append(
                {
                    "ours": pair.ours,
                    "theirs": pair.theirs,
                    "resolution": name,
                    **asdict(difference),
                    "paper": expected,
                    "reading": reading(difference, expected),
                }
            )
    write_rows(folder / "comparisons.csv", rows)
    shares = []
    for method in which.methods:
        if measure.has_shares and len(method.cells) > 2:
            right = {r: images_of(method, r) for r in method.cells}
            shares += wrong_and_right(right, method.name)
    if shares:
        write_rows(folder / "shares.csv", shares)
    figures.draw(folder)
    main = measure.figures[measure.main]
    text = [
        f"# {which.name}: {which.about}\n",
        _description(about),
        _training_table(which),
        *_figures(which, read_rows(folder / "results.csv"), paper, arch),
        f"![{main} and differences](results.png)\n",
        f"![{main} after each epoch](epochs.png)\n",
        "## Differences\n",
        _about_differences(measure),
        _difference_table(rows, len(which.methods[0].cells)),
        "## Training time\n",
        _about_times(about),
        _time_table(which, read_rows(folder / "times.csv")),
        "## Until as good as the first method\n",
        *_costs(measure, read_rows(folder / "epochs.csv")),
    ]
    if shares:
        text += [
            "## Wrong at one resolution, right at another (Table 1)\n",
            "![Shares](shares.png)",
        ]
    (folder / "README.md").write_text("\n".join(text).rstrip() + "\n")


_ABOUT_DIFFERENCES = """\
In points of {figure}, on the same seeds and images, with two 95 % intervals. That over the seeds
(paired t-test, with its p) says whether other seeds would show the same; it is empty for one seed,
and where all seeds differ by the same. That over the images ({over_images}) says whether other
validation images would, with these networks. A difference is "decided" if neither interval holds
zero. It is "reproduced" if it is decided and has the sign of the paper's, which is of the same
methods on {data}, the largest resolution beside the largest and so on; without a paper's figure it
is "higher" or "lower". Where a method is the same network as the other one, there is no row, and
the mean is over the rest.

Figures are of the last epoch; no network was chosen by its validation accuracy.
"""


def _about_differences(measure: Measure) -> str:
    name = main_figure(measure.figures)[1]
    return _ABOUT_DIFFERENCES.format(
        figure=name, over_images=measure.over_images, data=measure.papers_data
    )


def _figures(
    which: ExperimentSet, rows: Sequence[dict[str, str]], paper: Paper, arch: str
) -> list[str]:
    """The tables of each figure, each beside the paper's."""
    measure, text = MEASURES[which.task], []
    for figure, heading in measure.figures.items():
        text += [f"## {heading}\n", _accuracy_table(which, rows, figure)]
        text.append(_paper_table(measure, paper.get(figure, {}), arch))
    return text


def _paper(which: ExperimentSet, archs: str | Sequence[str]) -> tuple[str, Paper]:
    """The architecture, and its rows in the paper; of several that the one which has some."""
    text = (resources.files("rsfast.experiments") / "paper.toml").read_text()
    tables: dict[str, Paper] = tomllib.loads(text).get(which.name, {})
    if len(which.methods[0].cells) == len(MEASURES[which.task].papers_resolutions):
        for arch in [archs] if isinstance(archs, str) else archs:
            if arch in tables:
                return arch, tables[arch]
    return "", {}


def _paper_difference(
    paper: Paper, which: ExperimentSet, pair: Comparison, levels: Sequence[int]
) -> float | None:
    measure = MEASURES[which.task]
    largest = f"I-{next(iter(which.methods[0].cells))}"
    papers = f"I-{measure.papers_resolutions[0]}"
    names = (papers if name == largest else name for name in (pair.ours, pair.theirs))
    ours, theirs = (paper.get(measure.main, {}).get(name) for name in names)
    if ours is None or theirs is None:
        return None
    return round(statistics.mean(ours[level] - theirs[level] for level in levels), 2)


def reading(difference: Difference, paper: float | None) -> str:
    """What a difference says, beside that of the paper where it has one."""
    if not difference.is_decided:
        return "not decided"
    if not paper:
        return "higher" if difference.mean > 0 else "lower"
    return "reproduced" if (difference.mean > 0) == (paper > 0) else "not reproduced"


def _description(about: dict[str, Any]) -> str:
    names = _of_task(_SHOWN_SETTINGS, about["settings"].get("task", "classification"))
    settings = ", ".join(f"{name} {shown(about['settings'][name])}" for name in names)
    environment = about["environment"]
    threads = f"a CPU, threads of a process: {environment.get('cpu_threads')}"
    machine = environment.get("gpu", threads)
    return (
        f"Data: {about['data']}; "
        f"seeds {', '.join(map(str, about['seeds']))}; {environment['train_images']} training and "
        f"{environment['val_images']} validation images in {environment['classes']} classes; "
        f"{machine}, torch {environment['torch']}.\n\n"
        f"All rows: total batch {environment['total_batch']}, {settings}. Everything else is in "
        f"run.json.\n"
    )


def _of_task(settings: Sequence[str], task: str) -> list[str]:
    """Those of a training that mean something for the task."""
    rules = rules_of(TrainConfig)
    return [name for name in settings if rules[name].only in (None, task)]


def _accuracy_table(which: ExperimentSet, rows: Sequence[dict[str, str]], figure: str) -> str:
    """Methods by resolutions: mean and standard deviation over the seeds, in percent."""
    resolutions = sorted({r for method in which.methods for r in method.cells}, reverse=True)
    lines = [_line("method", *resolutions, MEAN), _rule(len(resolutions) + 2)]
    for method in which.methods:
        found = {
            r: [
                float(row[figure])
                for row in rows
                if row["method"] == method.name and row["resolution"] == str(r)
            ]
            for r in method.cells
        }
        means = [statistics.mean(values) for values in zip(*found.values(), strict=True)]
        cells = [_spread(found[r]) if r in found else "" for r in resolutions]
        # A mean over other resolutions is not to be read beside these.
        comparable = set(method.cells) == set(which.methods[0].cells)
        lines.append(_line(method.name, *cells, _spread(means) if comparable else ""))
    return "\n".join(lines) + "\n"


def _paper_table(measure: Measure, rows: Mapping[str, Sequence[float]], arch: str) -> str:
    if not rows:
        return ""
    header = _line("method", *measure.papers_resolutions, MEAN)
    title = f"The paper's ({arch}, {measure.papers_data}):\n"
    lines = [title, header, _rule(len(measure.papers_resolutions) + 2)]
    for name, values in rows.items():
        lines.append(_line(name, *values, f"{statistics.mean(values):.1f}"))
    return "\n".join(lines) + "\n"


def _about_times(about: dict[str, Any]) -> str:
    sharing = f"{about['jobs']} trainings at a time shared the machine"
    alone = "One training at a time had the machine" if about["jobs"] == 1 else sharing
    return f"{alone}; validation and start-up are not in it.\n"


def _spread(values: Sequence[float]) -> str:
    found = spread(np.array(values))
    return f"{found.mean:.1f}" if math.isnan(found.sd) else f"{found.mean:.1f} ± {found.sd:.1f}"


def _difference_table(rows: Sequence[dict[str, Any]], all_resolutions: int) -> str:
    names = ("", "at", "difference", "over seeds", "p", "over images", "paper", "reading")
    lines = [_line(*names), _rule(len(names))]
    levels = Counter(_pair(row) for row in rows if row["resolution"] != MEAN)
    for row in rows:
        alone = math.isnan(row["p"])
        bold = row["resolution"] == MEAN
        part = f" of {levels[_pair(row)]}" if bold and levels[_pair(row)] < all_resolutions else ""
        cells = (
            f"{row['ours']} against {row['theirs']}",
            f"{row['resolution']}{part}",
            f"{row['mean']:+.1f}",
            "" if alone else f"{row['seeds_low']:+.1f} to {row['seeds_high']:+.1f}",
            "" if alone else f"{row['p']:.3f}",
            f"{row['images_low']:+.1f} to {row['images_high']:+.1f}",
            "" if row["paper"] is None else f"{row['paper']:+.1f}",
            row["reading"],
        )
        lines.append(_line(*(f"**{cell}**" if bold and cell else cell for cell in cells)))
    return "\n".join(lines) + "\n"


def _pair(row: dict[str, Any]) -> tuple[str, str]:
    return row["ours"], row["theirs"]


def _training_table(which: ExperimentSet) -> str:
    """What each network is, besides what all have in common."""
    names = ["network", *_of_task(_SETTINGS_OF_ROWS, which.task)]
    settings_of = [training.settings for training in which.trainings]
    for name in dict.fromkeys(name for settings in settings_of for name in settings):
        values = {str(settings[name]) for settings in settings_of if name in settings}
        if name not in (*names, *_SETTINGS_OF_ROWS) and len(values) > 1:
            names.append(name)
    lines = [_line(*names), _rule(len(names))]
    for training in which.trainings:
        settings = training.settings
        lines.append(_line(training.name, *(_cell(settings.get(name)) for name in names[1:])))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else shown(value)


def _time_table(which: ExperimentSet, rows: Sequence[dict[str, str]]) -> str:
    """Seconds in training steps; what several networks of one method cost together."""
    lines = [_line("trainings", "seconds in training steps", "images/s"), _rule(3)]
    for training in which.trainings:
        own = [row for row in rows if row["training"] == training.name]
        rates = [float(row["images_per_s"]) for row in own]
        seconds = [float(row["train_s"]) for row in own]
        lines.append(_line(training.name, _spread(seconds), _spread(rates)))
    for method in which.methods:
        names = {cell.training.name for cell in method.cells.values()}
        if len(names) > 1:
            totals: dict[str, float] = {}
            for row in rows:
                if row["training"] in names:
                    totals[row["seed"]] = totals.get(row["seed"], 0.0) + float(row["train_s"])
            label = f"the {len(names)} networks of {method.name} together"
            lines.append(_line(label, _spread(list(totals.values())), ""))
    return "\n".join(lines) + "\n"


def _costs(measure: Measure, rows: Sequence[dict[str, str]]) -> list[str]:
    """A table of `costs_of`, and what it is."""
    costs = costs_of(rows, measure.main)
    name = main_figure(measure.figures)[1]
    text = (
        f"{name}, mean over resolutions, seeds and the last {RUNNING} epochs; epochs and seconds "
        f"in training steps until it is that of {costs[0].method} at the end, "
        f"{costs[0].figure:.1f} %. A schedule that ended there might have needed less.\n"
    )
    lines = [_line("method", f"{name} at the end", "epochs", "seconds"), _rule(4)]
    for cost in costs:
        seconds = "" if cost.seconds is None else f"{cost.seconds:.0f}"
        cells = cost.method, f"{cost.figure:.1f}", _cell(cost.epochs) or "not reached", seconds
        lines.append(_line(*cells))
    return [text, "\n".join(lines) + "\n"]


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
