"""What a run of segmentation is not begun with, or leaves out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mask_helpers import PIL, SMALL, make_mask_folder
from rsfast import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mask_folder(tmp_path_factory.mktemp("masks"))


def start(folder: Path, output: Path, *flags: str) -> int:
    return train.main([*SMALL, *PIL, "--data", str(folder), "--output", str(output), *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixup", "0.2"], "mixup is a setting of classification, got 0.2 for the task seg"),
        (["--crop-area", "0.5", "1"], "crop_area is a setting of classification"),
        (["--val-crop", "none"], "val_crop is a setting of classification, got 'none'"),
        (["--copies", "2"], "copies is a setting of classification"),
        (["--val-list", "labels.txt"], "val_list is a setting of classification"),
        (["--scale-lr"], "scale_lr is a setting of classification"),
        (["--flip", "independent"], "flip must be shared or none for segmentation"),
        (
            ["--scale", "2", "1"],
            r"scale must be a range within 0.1 to 10.0, such as 0.5 2.0, got \(2.0, 1.0\)",
        ),
        (["--scale", "0.01", "1"], "scale must be a range within 0.1 to 10"),
        (["--decoder-lr", "0"], "decoder_lr must be above 0, got 0.0: --freeze keeps parts"),
        (["--ignore-label", "256"], r"ignore_label must be in \[0, 256\), got 256"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_mean_nothing_are_refused(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        start(tmp_path, tmp_path / "run", *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_network_of_other_classes_than_the_data_s_is_refused_before_a_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(folder, tmp_path / "run", "--arch", "mask_helpers:five_classes") == 2
    assert (
        "arch mask_helpers:five_classes must make a network with as many outputs as there are "
        "classes, 3, got one with 5"
    ) in capsys.readouterr().err


def test_a_network_of_another_task_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        ("--arch resnet18 --task segmentation", "task must be classification, which resnet18 is"),
        ("--arch refinenet18 --task classification", "task must be segmentation, which refinenet"),
        ("--arch resnet18 --scale 1 2", "scale is a setting of segmentation, got (1.0, 2.0)"),
        ("--arch resnet18 --decoder-lr 10", "decoder_lr is a setting of segmentation, got 10.0"),
    ):
        with pytest.raises(SystemExit):
            train.main([*flags.split(), "--data", str(tmp_path)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (None, "no mask trainannot/0001.png"),
        (np.zeros((4, 5)), "its mask has 5 x 4 pixels, and the image"),
        (np.zeros((4, 5, 3)), "its mask: RGB PNG, must be class numbers in 8-bit grey"),
        (3, "its mask has label 3, which must be below 3, the number of classes, or 255"),
    ],
    ids=["missing", "size", "colours", "label"],
)
def test_a_run_leaves_bad_masks_out_and_a_strict_one_does_not_begin(
    folder: Path,
    tmp_path: Path,
    mask: np.ndarray | int | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    file = data / "trainannot" / "0001.png"
    if mask is None:
        file.unlink()
    else:
        labels = np.array(Image.open(file))
        labels[-1] = mask if isinstance(mask, int) else 0
        Image.fromarray(labels if isinstance(mask, int) else mask.astype(np.uint8)).save(file)
    assert start(data, tmp_path / "run", "--strict") == 2
    error = capsys.readouterr().err
    assert f"found 1 without, the first is 0001.jpg ({said}" in error
    assert start(data, tmp_path / "run", "--epochs", "1", "--steps-per-epoch", "1") == 0
    assert f"1 of 6 images in {data / 'train'} are left out for their masks" in caplog.text
    for image in (data / "val").iterdir():
        image.unlink()
    assert start(data, tmp_path / "other") == 2
    assert f"data folder {data / 'val'} must hold images" in capsys.readouterr().err


def test_a_map_of_one_pixel_in_a_batch_of_one_image_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--arch", "refinenet18", "--resolutions", "64", "32", "--batch-size", "1"]
    flags += ["--warmup-epochs", "0"]
    assert start(folder, tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert "in front of network.trunk.layer4.0" in error
    assert "at resolution 32" in error


def test_a_network_without_a_trunk_has_one_rate(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("rsfast.models.parts._TRUNKS", ("encoder",))
    assert start(folder, tmp_path / "run") == 2
    assert "mask_helpers:network has none: leave it away" in capsys.readouterr().err
