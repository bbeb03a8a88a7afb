"""Networks of torchvision and timm as one ONNX file, against PyTorch at every kind of size."""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision", reason="needs torchvision and timm: make check-networks")
pytest.importorskip("timm", reason="needs torchvision and timm: make check-networks")

import numpy as np
import onnxruntime
import torch

import rsfast
from deploy_helpers import pixels, unlike_banks
from rsfast.export.graph import sizes_of, to_onnx

NETWORKS = (
    "torchvision/mobilenet_v3_small",  # squeeze and excitation, hardswish
    "torchvision/densenet121",  # norms in front of their convolutions
    "timm/tf_efficientnet_b0",  # pads by the size of its maps; activations inside of norms
    "timm/ecaresnet26t",
    "timm/ghostnet_050",
)


@pytest.mark.filterwarnings("default")  # of packages that are not ours
@torch.inference_mode()
@pytest.mark.parametrize("arch", NETWORKS)
def test_one_file_equals_the_network_of_each_size(arch: str) -> None:
    torch.manual_seed(0)
    model = rsfast.create_model(arch, (96, 64), num_classes=10)
    unlike_banks(model)
    session = onnxruntime.InferenceSession(to_onnx(model).SerializeToString())
    smallest, largest = sizes_of(model)
    for size in (96, 64, 80, 73, smallest, largest):
        images = pixels(2, size)
        (logits,) = session.run(["logits"], {"images": images})
        wanted = model.at(size)(torch.from_numpy(images)).numpy()
        assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max(), size
