"""A set's table, comparisons and training times, out of its raw files."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from rsfast import figures
from rsfast.analyze import wrong_and_right
from rsfast.config import shown
from rsfast.experiments.compare import Difference, paired_difference, spread
from rsfast.experiments.results import column_name, read_hits
from rsfast.experiments.sets import Comparison, ExperimentSet, Method
from rsfast.files.tables import read_rows, write_rows

__all__ = ["reading", "write_report"]

MEAN = "mean"  # over the resolutions
_PAPERS_LARGEST = "I-224"
_PAPERS_RESOLUTIONS = (224, 192, 160, 128, 96)
_SHOWN_SETTINGS = (
    *("arch", "epochs", "lr", "warmup_epochs", "weight_decay", "crop_area"),
    *("val_crop", "normalize", "precision"),
)

Paper = dict[str, list[float]]  # method -> top-1 by resolution


def write_report(which: ExperimentSet, seeds: Sequence[int], folder: Path) -> None:
    """Writes comparisons.csv, README.md and the figures of a folder that holds the raw files."""
    about = json.loads((folder / "run.json").read_text())
    arch, paper = _paper(which, about["settings"]["arch"])
    hits = read_hits(folder)

    def hits_of(method: Method, resolution: int) -> Any:
        cell = method.cells[resolution]
        return np.stack([hits[column_name(cell, seed, resolution)] for seed in seeds])

    methods = {method.name: method for method in which.methods}
    rows = []
    for pair in which.comparisons:
        ours, theirs = methods[pair.ours], methods[pair.theirs]
        common = [r for r, cell in ours.cells.items() if theirs.cells.get(r, cell) != cell]
        for name, part in [*((str(r), [r]) for r in common), (MEAN, common)]:
            difference = paired_difference(
                [hits_of(ours, r) for r in part], [hits_of(theirs, r) for r in part]
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
        if len(method.cells) > 2:
            right = {r: hits_of(method, r) for r in method.cells}
            shares += wrong_and_right(right, method.name)
    if shares:
        write_rows(folder / "shares.csv", shares)
    figures.draw(folder)
    text = [
        f"# {which.name}: {which.about}\n",
        _description(about),
        _training_table(which),
        "## Top-1\n",
        _accuracy_table(which, read_rows(folder / "results.csv")),
        _paper_table(paper, arch),
        "![Top-1 and differences](results.png)\n",
        "## Differences\n",
        _ABOUT_DIFFERENCES,
        _difference_table(rows, len(which.methods[0].cells)),
        "## Training time\n",
        _about_times(about),
        _time_table(which, read_rows(folder / "times.csv")),
    ]
    if shares:
        text += [
            "## Wrong at one resolution, right at another (Table 1)\n",
            "![Shares](shares.png)",
        ]
    (folder / "README.md").write_text("\n".join(text).rstrip() + "\n")


_ABOUT_DIFFERENCES = """\
In points of top-1, on the same seeds and images, with two 95 % intervals. That over the seeds
(paired t-test, with its p) says whether other seeds would show the same; it is empty for one seed,
and where all seeds differ by the same. That over the images says whether other validation images
would, with these networks. A difference is "decided" if neither interval holds zero. It is
"reproduced" if it is decided and has the sign of the paper's, which is of the same methods on
ImageNet, the largest resolution beside the largest and so on; without a paper's figure it is
"higher" or "lower". Where a method is the same network as the other one, there is no row, and the
mean is over the rest.

Figures are of the last epoch; no network was chosen by its validation accuracy.
"""


def _paper(which: ExperimentSet, archs: str | Sequence[str]) -> tuple[str, Paper]:
    """The architecture, and its rows in the paper; of several that the one which has some."""
    text = (resources.files("rsfast.experiments") / "paper.toml").read_text()
    tables: dict[str, Paper] = tomllib.loads(text).get(which.name, {})
    if len(which.methods[0].cells) == len(_PAPERS_RESOLUTIONS):
        for arch in [archs] if isinstance(archs, str) else archs:
            if arch in tables:
                return arch, tables[arch]
    return "", {}


def _paper_difference(
    paper: Paper, which: ExperimentSet, pair: Comparison, levels: Sequence[int]
) -> float | None:
    largest = f"I-{next(iter(which.methods[0].cells))}"
    names = (_PAPERS_LARGEST if name == largest else name for name in (pair.ours, pair.theirs))
    ours, theirs = (paper.get(name) for name in names)
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
    settings = ", ".join(f"{name} {shown(about['settings'][name])}" for name in _SHOWN_SETTINGS)
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


def _accuracy_table(which: ExperimentSet, rows: Sequence[dict[str, str]]) -> str:
    """Methods by resolutions: mean and standard deviation over the seeds, in percent."""
    resolutions = sorted({r for method in which.methods for r in method.cells}, reverse=True)
    lines = [_line("method", *resolutions, MEAN), _rule(len(resolutions) + 2)]
    for method in which.methods:
        found = {
            r: [
                float(row["top1"])
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


def _paper_table(paper: Paper, arch: str) -> str:
    if not paper:
        return ""
    header = _line("method", *_PAPERS_RESOLUTIONS, MEAN)
    lines = [f"The paper's ({arch}, ImageNet):\n", header, _rule(len(_PAPERS_RESOLUTIONS) + 2)]
    for name, values in paper.items():
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
    names = ["network", "resolutions", "distill", "bn", "crop", "copies"]
    settings_of = [training.settings for training in which.trainings]
    for name in dict.fromkeys(name for settings in settings_of for name in settings):
        values = {str(settings[name]) for settings in settings_of if name in settings}
        if name not in names and len(values) > 1:
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


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
