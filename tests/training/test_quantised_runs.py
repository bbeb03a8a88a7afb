"""Commands that are given a quantised network where another one belongs: one line each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lq_helpers import quantised_network
from rsfast import checkpoint, evaluate, train

SMALL = """--arch resnet18_lq --resolutions 32 16 --batch-size 2 --epochs 1 --steps-per-epoch 1
    --workers 0 --loader synthetic --weight-bits 1 --output""".split()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ended") / "run"
    assert train.main([*SMALL, str(output)]) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resume auto --weight-bits 2", "was trained with weight_bits = 1, this run has 2"),
        ("--resume auto --activation-bits 2", "was trained with activation_bits = 32"),
        ("--resume auto --arch resnet18", "weight_bits is of resnet18_lq and resnet50_lq"),
        (
            "--continue-from RUN --epochs 2 --weight-bits 2",
            "arch, task, weight_bits, activation_bits",
        ),
        ("--continue-from RUN --epochs 2 --activation-bits 2", "with activation_bits = 32"),
        ("--pretrained RUN/last.pt --weight-bits 2", "of 2 bits cannot take the state of one with"),
        ("--pretrained RUN/model_best.safetensors --weight-bits 3", "of 3 bits cannot take"),
    ],
)
def test_other_bits_than_a_runs_are_one_line(
    ended: Path, tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ended if "--resume" in flags else tmp_path / "run"
    given = flags.replace("RUN", str(ended)).split()
    try:
        code = train.main([*SMALL, str(output), *given])
    except SystemExit as done:
        code = done.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_evaluation_names_what_a_packed_file_is_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save_packed(quantised_network(), torch.ones(2), path)
    assert evaluate.main([str(path), "--arch", "resnet18"]) == 2
    error = capsys.readouterr().err
    assert f"checkpoint {path} is of resnet18_lq, got --arch resnet18" in error
    assert error.count("\n") == 1
