"""Table 7: a set of segmentation from the command to its report."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import environment
from mask_helpers import make_mask_folder
from rsfast.config import parse_args
from rsfast.data import val_loader
from rsfast.experiments.__main__ import _data_set, main
from rsfast.experiments.measures import MEASURES
from rsfast.files.tables import read_rows, write_rows

FAKE = f"{shlex.quote(sys.executable)} {Path(__file__).with_name('fake_module.py')}"
PIXELS = MEASURES["segmentation"]


def run(output: Path, *arguments: str) -> int:
    data = output.parent / "masks"
    if not data.exists():
        make_mask_folder(data)
    where = ["--output", str(output), "--launch", FAKE, "--data", str(data)]
    return main(["table7", *where, *arguments])


def test_table_7_is_compared_in_mean_iou_beside_the_papers(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "--seeds", "2") == 0
    made = [line.split() for line in calls.read_text().splitlines()]
    assert sum(line[0] == "rsfast.train" for line in made) == 4 * 2
    tests = [line for line in made if line[0] == "rsfast.evaluate"]
    assert all("--per-image" in line and "refinenet101" in line for line in tests)
    assert "rs_net, seed 0: mean IoU 352: 1.0  224: 1.0  96: 1.0" in capsys.readouterr().out
    report = tmp_path / "out" / "table7"
    rows = read_rows(report / "results.csv")
    assert list(rows[0]) == [
        *("method", "training", "resolution", "seed", "pixel", "mean", "iou"),
        *("multiply_adds", "parameters"),
    ]
    assert len(rows) == 2 * 3 * 2
    best = {(row["method"], row["resolution"], row["seed"]): row for row in rows}
    assert float(best["RS-Net", "96", "0"]["iou"]) > float(best["I-Nets", "96", "0"]["iou"])
    comparisons = read_rows(report / "comparisons.csv")
    assert [row["resolution"] for row in comparisons] == ["352", "224", "96", "mean"]
    assert [float(row["paper"]) for row in comparisons] == pytest.approx([0.2, 2.1, 14.0, 5.43])
    assert all(
        float(row["images_low"]) <= float(row["mean"]) <= float(row["images_high"])
        for row in comparisons
    )
    text = (report / "README.md").read_text()
    for line in (
        "## Mean IoU",
        "## Pixel accuracy",
        "## Mean accuracy",
        "The paper's (refinenet101, NYUDv2):",
        "| RS-Net | 44.1 | 42.6 | 32.1 | 39.6 |",
        "| I-Nets | 72.3 | 69.6 | 50.4 | 64.1 |",
        "| rs_net | 352 224 96 | full | private |",
        "In points of mean IoU,",
        "images (bootstrap)",
        "decoder_lr 10.0",
    ):
        assert line in text
    for other in ("crop", "copies", "top-1", "ImageNet", "Table 1"):
        assert other not in text
    assert (report / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not (report / "shares.csv").exists(), "networks of their own have no pixels in common"


def test_images_of_a_report_have_the_pixels_of_each_network(tmp_path: Path, calls: Path) -> None:
    assert run(tmp_path / "out", "--arch", "refinenet18", "--resolutions", "64", "32") == 0
    report = tmp_path / "out" / "table7"
    found = PIXELS.read(report / "per_image.csv")
    assert set(found) == {
        "inet_64/seed0/64",
        "inet_32/seed0/32",
        *(f"rs_net/seed0/{r}" for r in (64, 32)),
    }
    counts = found["rs_net/seed0/32"]
    assert counts.shape == (60, 2, 3)
    assert (counts[..., 0] == [90, 10]).all(), "pixels"
    assert (counts[..., 1].sum(-1) == 100).all(), "every pixel is taken for a class"
    assert set(counts[:, 0, 2].tolist()) <= {90, 40}
    assert "The paper's" not in (report / "README.md").read_text()


def test_counts_of_networks_that_predict_other_classes_are_put_together(tmp_path: Path) -> None:
    names = ("image", "resolution", "class", "pixels", "predicted", "right")
    tests = {
        "a": [("1", 64, "sky", 4, 3, 3), ("1", 64, "road", 0, 1, 0), ("0", 64, "sky", 1, 1, 1)],
        "b": [("0", 64, "tree", 0, 1, 0), ("0", 64, "sky", 1, 0, 0), ("1", 64, "sky", 4, 4, 4)],
        "c": [("0", 64, "sky", 2, 2, 2), ("1", 64, "sky", 4, 4, 4)],
    }
    for name, lines in tests.items():
        (tmp_path / name).mkdir()
        rows = (dict(zip(names, line, strict=True)) for line in lines)
        write_rows(tmp_path / name / "per_image.csv", rows)
    images = PIXELS.images()
    assert images.add("first", tmp_path / "a", 64) == {
        "pixel": 80.0,
        "mean": 80.0,
        "iou": 40.0,  # sky 4 of 5, road 0 of 1
    }
    figures = images.add("second", tmp_path / "b", 64)
    assert figures["iou"] == 40.0
    with pytest.raises(ValueError, match="c is of other images than the tests before it"):
        images.add("third", tmp_path / "c", 64)
    write_rows(tmp_path / "all.csv", images.rows())
    found = PIXELS.read(tmp_path / "all.csv")
    # Images "0" and "1"; road, sky and tree.
    assert found["first"].tolist() == [
        [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
        [[0, 1, 0], [4, 3, 3], [0, 0, 0]],
    ]
    assert found["second"].tolist() == [
        [[0, 0, 0], [1, 0, 0], [0, 1, 0]],
        [[0, 0, 0], [4, 4, 4], [0, 0, 0]],
    ]
    assert np.array_equal(found["first"][..., 0], found["second"][..., 0])


def test_images_and_masks_are_named_as_a_run_names_them(tmp_path: Path) -> None:
    data = make_mask_folder(tmp_path / "masks")
    base = parse_args(["--arch", "refinenet18", "--data", str(data)])
    loader = val_loader(data, (32,), 2, task="segmentation", backend="pil", workers=0)
    assert _data_set(base)["val_set"] == loader.plan.digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table7", "--arch", "resnet18"], "table7 is of segmentation, and resnet18 of classifica"),
        (["table2", "--arch", "refinenet18"], "table2 is of classification, and refinenet18 of se"),
        (["table2", "table7"], "name an --arch of segmentation, and no sets of another task"),
        (["table7", "--crop-area", "0.5", "1"], "crop_area is a setting of classification"),
    ],
)
def test_networks_of_another_task_are_refused_in_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    try:
        code = main([*arguments, "--data", str(tmp_path), "--output", str(output)])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_real_networks_from_training_to_report(tmp_path: Path) -> None:
    data = make_mask_folder(tmp_path / "masks", train=4, val=3)
    flags = "--arch refinenet18 --resolutions 64 32 --batch-size 4 --epochs 1 --lr 0.01".split()
    flags += ["--warmup-epochs", "0", "--loader", "pil", "--workers", "0", "--data", str(data)]
    command = [sys.executable, "-m", "rsfast.experiments", "table7", *flags]
    command += ["--output", str(tmp_path / "out"), "--jobs", str(os.cpu_count())]
    subprocess.run(command, env=environment(), check=True)
    report = tmp_path / "out" / "table7"
    assert "# table7" in (report / "README.md").read_text()
    about = json.loads((report / "run.json").read_text())
    assert about["environment"]["train_set"].startswith("4:")
    summary = read_rows(tmp_path / "out" / "runs" / "rs_net" / "seed0" / "summary.csv")[-1]
    rows = [row for row in read_rows(report / "results.csv") if row["method"] == "RS-Net"]
    assert [row["resolution"] for row in rows] == ["64", "32"]
    for row in rows:
        for name, column in (("iou", "miou"), ("pixel", "pixel"), ("mean", "mean")):
            expected = float(summary[f"{column}_{row['resolution']}"])
            assert float(row[name]) == pytest.approx(expected)
