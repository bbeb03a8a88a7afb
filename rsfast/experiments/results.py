"""What the runs of a set have found: raw files that travel without the runs.

A report folder gets per_image.csv (for every network and resolution: of each validation image the
place of its class among all, from 1; of segmentation the pixels of each class and those that are
right), results.csv (the figures of each), epochs.csv (how training got there), times.csv (training
time of each run) and run.json (settings and environment).
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rsfast.experiments.measures import MEASURES
from rsfast.experiments.runs import run_folder_of, test_folder
from rsfast.experiments.sets import Cell, ExperimentSet
from rsfast.files.tables import read_log, read_rows, write_rows

__all__ = ["collect", "column_name"]

_OF_A_ROW = {"resolutions", "distill", "bn", "crop", "copies", "seed"}
_OF_A_MACHINE = {
    *(
        "data",
        "train_data",
        "val_data",
        "val_list",
        "output",
        "resume",
        "workers",
        "hw_decoder_load",
        "dont_use_mmap",
    ),
    *("log_every", "keep", "checkpoint_every"),
}
# What a run says when it starts that must be the same for all rows.
_ALIKE = (
    *("total_batch", "world_size", "train_images", "val_images", "classes"),
    *("train_set", "val_set", "kernels", "device", "precision"),
)
_NOT_ENVIRONMENT = {"event", "step", "config", "config_hash", "steps_per_epoch"}


def column_name(cell: Cell, seed: int, resolution: int) -> str:
    """Of per_image.csv."""
    suffix = "" if cell.between == "interpolate" else f"/{cell.between}"
    return f"{cell.training.name}/seed{seed}/{resolution}{suffix}"


def collect(
    which: ExperimentSet,
    seeds: Sequence[int],
    output: Path,
    folder: Path,
    jobs: int,
    launch: str,
) -> None:
    """Writes the raw files of a set whose runs are all done into `folder`.

    Args:
        which: the set.
        seeds: of its runs.
        output: folder of all runs.
        folder: of the report.
        jobs: how many trainings shared the machine, for the record.
        launch: what started them.

    Raises:
        ValueError: if the runs were not alike in what all rows share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = [run_folder_of(output, t.name, seed) for t in which.trainings for seed in seeds]
    starts = [_start_of(run) for run in runs]
    _check_alike(runs, starts)
    read_costs = functools.cache(read_rows)
    images = MEASURES[which.task].images()
    rows = []
    for method in which.methods:
        for resolution, cell in method.cells.items():
            for seed in seeds:
                run = run_folder_of(output, cell.training.name, seed)
                test = test_folder(run, cell.between)
                name = column_name(cell, seed, resolution)
                costs = {row["resolution"]: row for row in read_costs(test / "accuracy.csv")}
                rows.append(
                    {
                        "method": method.name,
                        "training": cell.training.name,
                        "resolution": resolution,
                        "seed": seed,
                        **images.add(name, test, resolution),
                        "multiply_adds": costs[str(resolution)]["multiply_adds"],
                        "parameters": costs[str(resolution)]["parameters"],
                    }
                )
    write_rows(folder / "per_image.csv", images.rows())
    write_rows(folder / "results.csv", rows)
    write_rows(folder / "epochs.csv", _epochs(which, seeds, output))
    write_rows(folder / "times.csv", _times(which, seeds, output))
    about = {
        "set": which.name,
        "about": which.about,
        "seeds": list(seeds),
        "data": _images(starts[0]["config"]),
        "jobs": jobs,
        "launch": " ".join(_name(part) for part in shlex.split(launch)),
        **_about(starts),
    }
    (folder / "run.json").write_text(json.dumps(about, indent=1) + "\n")


def _check_alike(runs: Sequence[Path], starts: Sequence[dict[str, Any]]) -> None:
    """Refuses rows that are not comparable."""
    facts = [start | {"precision": start["config"]["precision"]} for start in starts]
    for run, own in zip(runs, facts, strict=True):
        for name in _ALIKE:
            value, first = own.get(name), facts[0].get(name)
            if value != first:
                raise ValueError(
                    f"all runs of a set must be alike, but {run} has {name} = {value!r} and "
                    f"{runs[0]} has {first!r}: repeat one of them in another --output"
                )


def _epochs(which: ExperimentSet, seeds: Sequence[int], output: Path) -> list[dict[str, Any]]:
    """Validation after each epoch, at what a network was trained at, and what it took till there.

    `ce` is the training's mean cross entropy in the epoch, of one resolution on average.
    """
    measure = MEASURES[which.task]
    cells = [(m.name, cell, r) for m in which.methods for r, cell in m.cells.items()]
    known, rows = set(), []
    for method, cell, resolution in cells:
        if (cell.training.name, resolution) in known:
            continue  # the same network in another method's name
        known.add((cell.training.name, resolution))
        for seed in seeds:
            for line, seconds, _ in _progress(run_folder_of(output, cell.training.name, seed)):
                value = line.get(f"{measure.after_epochs}_{resolution}")
                if line["event"] == "epoch" and value is not None:
                    rows.append(
                        {
                            "method": method,
                            "training": cell.training.name,
                            "resolution": resolution,
                            "seed": seed,
                            "epoch": line["epoch"],
                            "train_s": round(seconds, 1),
                            measure.main: value,
                            "ce": line["ce"] / len(_trained_at(line)),
                        }
                    )
    return rows


def _trained_at(line: dict[str, Any]) -> list[str]:
    """Resolutions of a network, of the line of an epoch."""
    return [name for name in line if name.startswith("alpha_")]


def _times(which: ExperimentSet, seeds: Sequence[int], output: Path) -> list[dict[str, Any]]:
    """Seconds in training steps, loading included, of each run."""
    rows = []
    for training in which.trainings:
        for seed in seeds:
            *_, (_, seconds, images) = _progress(run_folder_of(output, training.name, seed))
            row = {"training": training.name, "seed": seed, "train_s": round(seconds, 1)}
            rows.append({**row, "images_per_s": round(images / seconds, 1)})
    return rows


def _progress(run: Path) -> Iterator[tuple[dict[str, Any], float, int]]:
    """Lines of a log, each with the seconds and images in training steps up to it."""
    seconds, images, done, batch = 0.0, 0, 0, 0
    for line in _log(run):
        if line["event"] == "start":
            batch = line["total_batch"]
        elif line["event"] == "step":
            new = (line["step"] - done) * batch
            seconds, images, done = seconds + new / line["images_per_s"], images + new, line["step"]
        yield line, seconds, images


def _about(starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Settings that rows share, and what they ran on; a list where that differed."""
    unshared = _OF_A_ROW | _OF_A_MACHINE
    configs = [start["config"] for start in starts]
    names = dict.fromkeys(name for config in configs for name in config)
    settings = {name: _alike(name, configs) for name in names if name not in unshared}
    environment = {
        name: _alike(name, starts)
        for name in starts[0]
        if name not in _NOT_ENVIRONMENT and not name.startswith("parameters")
    }
    return {"settings": settings, "environment": environment}


def _alike(name: str, facts: Sequence[dict[str, Any]]) -> Any:
    """The value that all have, or the list of their values."""
    values: list[Any] = []
    for own in facts:
        if own.get(name) not in values:
            values.append(own.get(name))
    return values[0] if len(values) == 1 else values


def _images(config: dict[str, Any]) -> str:
    """What the images are called, of the settings in a log."""
    named = [config[name] for name in ("data", "train_data", "val_data") if config.get(name)]
    return " and ".join(map(_name, named)) or "the built-in set"


def _name(path: str) -> str:
    """Without the folders, which are those of one machine."""
    return Path(path).name


def _start_of(run: Path) -> dict[str, Any]:
    """What a run said when it first started."""
    return next(line for line in _log(run) if line["event"] == "start")


def _log(run: Path) -> list[dict[str, Any]]:
    return [line for _, line in read_log(run / "log.jsonl")]
