"""From a checkpoint to the choice of a resolution, as a deployer goes: export, measure, run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import make_image_folder
from lifelike import lifelike
from rsfast import latency
from rsfast.deploy import Chooser, Table, load
from rsfast.export.__main__ import main
from rsfast.training.checkpoint import save_weights

RESOLUTIONS = (64, 48, 32)
CLASSES = [f"class_{k}" for k in range(10)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("photographs"), CLASSES, train=8, val=2)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2", "lifelike:Excited"])
def test_a_checkpoint_becomes_a_network_that_is_run_without_pytorch(
    arch: str, photographs: Path, tmp_path: Path
) -> None:
    model = lifelike(arch, RESOLUTIONS)
    model.input_mean, model.input_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model.class_names = tuple(CLASSES)
    save_weights(model, torch.ones(len(RESOLUTIONS)), tmp_path / "weights.safetensors")
    folder = tmp_path / "exported"
    flags = ["--output", str(folder), "--arch", arch, "--runtime", "onnxruntime", "openvino"]
    flags += ["--int8", "--data", str(photographs), "--calibration-images", "64"]
    # Of a network that was not trained, labels say nothing: the loss is computed, not limited.
    assert main([str(tmp_path / "weights.safetensors"), *flags, "--max-loss", "100"]) == 0
    found = json.loads((folder / "validation.json").read_text())
    assert found["passed"]
    assert set(found["top1"]) == {"fp32", "int8"}

    measure = [str(folder), "--precision", "fp32", "int8", "--mode", "small", "--rounds", "3"]
    assert latency.main(measure) == 0
    table = Table.read(folder / "latency.csv", precision="int8")
    assert [row.top1 for row in table.rows] == [found["top1"]["int8"][str(r)] for r in RESOLUTIONS]
    resolution = Chooser(table, objective_ms=1000).resolution

    pictures = [Image.open(path) for path in sorted(photographs.glob("val/*/*.jpg"))]
    labels = np.repeat(np.arange(10), 2)
    for precision in ("fp32", "int8"):
        net = load(folder, mode="small", precision=precision)
        hits = net(net.preprocess(pictures, resolution)).argmax(1) == labels
        assert 100 * hits.mean() == pytest.approx(found["top1"][precision][str(resolution)])
