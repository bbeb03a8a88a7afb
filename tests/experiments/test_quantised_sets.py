"""Sets of quantised networks, whose rows differ in network and bits."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from helpers import make_image_folder
from rsfast.experiments.__main__ import main
from rsfast.files.tables import read_rows

FAKE = f"{shlex.quote(sys.executable)} {Path(__file__).with_name('fake_module.py')}"
SETTINGS = "--resolutions 48 32 --batch-size 8 --lr 0.01".split()


def run(output: Path, name: str, *flags: str) -> int:
    data = make_image_folder(output.parent / "images", train=1, val=1)
    where = ["--output", str(output), "--launch", FAKE, "--data", str(data)]
    return main([name, *where, *SETTINGS, *flags])


def test_a_report_says_of_each_training_which_network_and_bits_it_has(
    tmp_path: Path, calls: Path
) -> None:
    assert run(tmp_path / "out", "bits", "--arch", "resnet18_lq") == 0
    report = tmp_path / "out" / "bits"
    text = (report / "README.md").read_text()
    names = "distill | bn | crop | copies | arch | weight_bits | activation_bits"
    assert f"| network | resolutions | {names} |" in text
    assert "| inet_48_w32a32 | 48 | none | private | single | 1 | resnet18 |  |  |" in text
    assert "| rs_net_w2a2 | 48 32 | full | private | single | 1 | resnet18_lq | 2 | 2 |" in text
    settings = json.loads((report / "run.json").read_text())["settings"]
    assert settings["arch"] == ["resnet18", "resnet18_lq"]
    assert settings["activation_bits"] == [None, 32, 2]
    assert settings["lr"] == 0.01
    pairs = {(row["ours"], row["theirs"]) for row in read_rows(report / "comparisons.csv")}
    assert ("2/32 RS-Net", "2/2 RS-Net") in pairs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnet50"], "take --arch resnet18_lq or resnet50_lq, got resnet50"),
        (
            ["--arch", "resnet18_lq", "--weight-bits", "3"],
            "weight_bits cannot be given: it is what",
        ),
        (["--arch", "resnet18_lq", "--activation-bits", "4"], "those of table3 have 2 and 32"),
    ],
    ids=["full precision", "weights", "activations"],
)
def test_other_networks_and_bits_than_the_rows_are_refused(
    flags: list[str], message: str, tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "table3", *flags) == 2
    assert message in capsys.readouterr().err
    assert not calls.read_text()
