"""Stands in for `python` in tests of experiments: makes up what trainings and evaluations leave.

Called as `python fake_module.py -m rsfast.train --config FILE ...`. A training whose name is in
$FAKE_FAILS exits with 1; with $FAKE_SLOW it waits to be stopped, and exits with 75. A test whose
training's name is in $FAKE_DIES leaves half a file and is killed.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from rsfast.files.tables import read_rows, write_rows

IMAGES = 60


def train(config: Path) -> int:
    settings = tomllib.loads(config.read_text())
    folder = Path(settings["output"])
    if folder.parent.name in os.environ.get("FAKE_FAILS", "").split():
        print("fake: error: no luck")
        return 1
    if "FAKE_SLOW" in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (folder / "started").touch()
        time.sleep(60)
    (folder / "config.toml").write_text(config.read_text())
    write_rows(folder / "summary.csv", [{"epoch": settings["epochs"]}])
    facts = {"torch": "2.13", "train_images": 10, "val_images": IMAGES, "classes": 3}
    facts["total_batch"] = int(os.environ.get("FAKE_BATCH", 8))
    start = {"event": "start", "step": 0, **facts}
    start["config"] = {**settings, "precision": "fp32"}
    steps = [{"event": "step", "step": n, "images_per_s": 40.0} for n in (5, 10)]
    name = "miou" if settings.get("task") == "segmentation" else "top1"
    found = {f"{name}_{r}": float(r) for r in settings["resolutions"]}
    alphas = {f"alpha_{r}": 1.0 for r in settings["resolutions"]}
    ce = 0.5 * len(alphas)
    epochs = [{"event": "epoch", "epoch": n, "ce": ce, **found, **alphas} for n in (1, 2)]
    lines = [start, steps[0], epochs[0], steps[1], epochs[1]]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "last.pt").touch()
    return 0


def evaluate(checkpoint: Path, arguments: list[str]) -> int:
    folder = Path(arguments[arguments.index("--output") + 1])
    first = arguments.index("--resolutions") + 1
    asked = [int(r) for r in itertools.takewhile(str.isdecimal, arguments[first:])]
    settings = tomllib.loads((checkpoint.parent / "config.toml").read_text())
    known = {int(r) for r in read_known(folder)} | set(settings["resolutions"]) | set(asked)
    resolutions = sorted(known, reverse=True)
    # More of the images are right with more resolutions in training, and at larger ones.
    rng = np.random.default_rng(settings["seed"])
    luck = rng.random(IMAGES)
    rows = []
    for image in range(IMAGES):
        row: dict[str, Any] = {"image": f"{image}.jpg", "label": image % 3}
        for r in resolutions:
            hit = luck[image] < 0.4 + 0.1 * len(settings["resolutions"]) + r / 1000
            row[str(r)] = 1 if hit else 2
        rows.append(row)
    folder.mkdir(exist_ok=True)
    figures = {"top1": 1.0}
    if settings.get("task") == "segmentation":
        rows, figures = pixels_of(rows, resolutions), {"pixel": 1.0, "mean": 1.0, "iou": 1.0}
    if checkpoint.parent.parent.name in os.environ.get("FAKE_DIES", "").split():
        (folder / "per_image.csv").write_text("image,label,48,32\n0.jpg,0")
        os.kill(os.getpid(), signal.SIGKILL)
    write_rows(folder / "per_image.csv", rows)
    costs = [
        {"resolution": r, "multiply_adds": r * r, "parameters": 9, **figures} for r in resolutions
    ]
    write_rows(folder / "accuracy.csv", costs)
    return 0


def pixels_of(rows: list[dict[str, Any]], resolutions: list[int]) -> list[dict[str, Any]]:
    """The same as a segmentation: every image is a class's but for 10 pixels of another one."""
    found = []
    for row in rows:
        for r in resolutions:
            right = 90 if row[str(r)] == 1 else 40
            common = {"image": row["image"], "resolution": r}
            classes = (("ground", 90, right), ("sky", 10, 10))
            wrong = 90 - right
            for name, pixels, hits in classes:
                predicted = hits + (wrong if name == "sky" else 0)
                counts = {"pixels": pixels, "predicted": predicted, "right": hits}
                found.append({**common, "class": name, **counts})
    return found


def read_known(folder: Path) -> list[str]:
    file = folder / "accuracy.csv"
    return [row["resolution"] for row in read_rows(file)] if file.exists() else []


if __name__ == "__main__":
    module, *rest = sys.argv[2:]
    with open(os.environ["FAKE_CALLS"], "a") as calls:
        calls.write(" ".join([module, *rest]) + "\n")
    if module == "rsfast.train":
        sys.exit(train(Path(rest[rest.index("--config") + 1])))
    sys.exit(evaluate(Path(rest[0]), rest))
