"""What cannot be run is refused in one sentence, or warned of once."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deploy_helpers import Exported, pixels
from rsfast.deploy import Network, load, network
from rsfast.deploy.manifest import FP32_FILE, INT8_FILE
from rsfast.deploy.runtimes import RUNTIMES

IMAGES = pixels(1, 48)


@pytest.fixture(scope="module")
def net(exported: Exported) -> Network:
    return load(exported.folder)


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(exported.folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[0], r"images must be \[N, 3, r, r\]: a batch, .* got \[3, 48, 48\]"),
        (IMAGES[:, :1], r"RGB before height and width, square, got \[1, 1, 48, 48\]"),
        (IMAGES.transpose(0, 2, 3, 1), r"got \[1, 48, 48, 3\]"),
        (IMAGES[..., :40], r"square, got \[1, 3, 48, 40\]"),
        (IMAGES.astype(np.float64), "images must be float32, got float64"),
        ((IMAGES * 50).astype(np.int8).view(np.uint8), "images must be float32, got uint8"),
        (IMAGES.astype(">f4"), "images must be float32, got >f4"),
        (IMAGES[..., :8, :8], "resolution must be from 16 to 128 pixels, got 8"),
        (pixels(1, 129), "resolution must be from 16 to 128 pixels, got 129"),
        (IMAGES[:0], r"images must hold at least one, got \[0, 3, 48, 48\]"),
        (IMAGES.tolist(), "images must be a NumPy array .* got list"),
        (torch.from_numpy(IMAGES), "images must be a NumPy array .* got Tensor"),
    ],
    ids=[
        *"unbatched grey channels_last oblong float64 uint8 big_endian".split(),
        *"tiny huge empty list tensor".split(),
    ],
)
def test_input_of_another_kind_is_refused(images: Any, message: str, net: Network) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        net(images)
    assert "\n" not in str(refusal.value)


def test_floats_are_refused_where_the_graph_normalises(folder: Path) -> None:
    manifest = dataclasses.replace(load(folder).manifest, input_dtype="uint8")
    manifest.write(folder)
    with pytest.raises(ValueError, match="images must be uint8, got float32"):
        load(folder)(IMAGES)


def test_outside_of_the_trained_range_there_is_one_warning_per_size(exported: Exported) -> None:
    net = load(exported.folder)
    for size in (96, 24):
        with pytest.warns(UserWarning, match=f"{size} pixels are outside of the trained 32 to 64"):
            net(pixels(1, size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (96, 24, *net.resolutions, 57):
            net(pixels(1, size))


@pytest.mark.parametrize("resolution", [15, 129])
def test_resolutions_out_of_range_are_refused(resolution: int, net: Network) -> None:
    message = f"resolution must be from 16 to 128 pixels, got {resolution}"
    with pytest.raises(ValueError, match=message):
        net.preprocess([Image.new("RGB", (9, 9))], resolution)
    with pytest.raises(ValueError, match=message):
        net.prepare(resolution)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runtime": "tensorrt"}, "runtime must be one of .* got 'tensorrt'"),
        ({"mode": "slow"}, "mode must be one of .* got 'slow'"),
        ({"precision": "fp8"}, "precision must be one of .* got 'fp8'"),
        ({"precision": "bf16"}, "precision bf16 needs runtime openvino, got onnxruntime"),
        ({"runtime": "openvino", "precision": "int8", "mode": "small"}, "mode must be fast"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"batch_sizes": (0,)}, "batch_size must be at least 1, got 0"),
        ({"precision": "int8"}, r"precision int8 needs .*int8.onnx, .* export with --int8"),
    ],
    ids="runtime mode precision bf16 openvino_int8 threads batch_size int8".split(),
)
def test_loading_what_there_is_not_is_refused(
    arguments: dict[str, Any], message: str, exported: Exported
) -> None:
    with pytest.raises(ValueError, match=message):
        load(exported.folder, **arguments)


def test_a_folder_that_is_none_of_the_exporters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a folder of rsfast\.export"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["crop", "filter", "input_dtype"])
def test_a_preprocessing_that_is_not_known_is_refused(name: str, folder: Path) -> None:
    dataclasses.replace(load(folder).manifest, **{name: "other"}).write(folder)
    with pytest.raises(ValueError, match=f"{name} must be one of .* got 'other'"):
        load(folder)


def test_openvino_takes_int8_only_where_it_is_pinned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs openvino")
    shutil.copy(folder / FP32_FILE, folder / INT8_FILE)
    monkeypatch.setattr(network, "open_session", lambda *_, **__: lambda images: images)
    net = load(folder, "openvino", precision="int8")
    net(pixels(1, 48))
    with pytest.raises(ValueError, match=r"only for what is prepared .* 1 of 64 pixels, 1 of 48"):
        net(pixels(2, 48))
    net.prepare(48, 2)
    net(pixels(2, 48))


def test_an_onnx_runtime_that_computes_int8_wrongly_is_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.0")
    with pytest.raises(ImportError, match=r"1\.31\.1 or later, .* got 1\.31\.0: pip install"):
        load(exported.folder)


@pytest.mark.parametrize(("name", "extra"), RUNTIMES.items())
def test_a_runtime_that_is_absent_is_named_with_its_installation(
    name: str, extra: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} .* pip install 'rsfast\[{extra}\]'"):
        load(exported.folder, name)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_damaged_file_is_one_sentence(runtime: str, folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"model.onnx cannot be opened by {runtime}: ") as caught:
        load(folder, runtime)
    assert "\n" not in str(caught.value)
