"""A network of torchvision as one ONNX file, against PyTorch at every kind of size."""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision", reason="needs torchvision and timm: make check-networks")

import numpy as np
import onnxruntime
import torch

from lifelike import images, lifelike
from rsfast.export.graph import sizes_of, to_onnx


@pytest.mark.filterwarnings("default")  # of packages that are not ours
@torch.inference_mode()
def test_one_file_equals_the_network_of_each_size() -> None:
    model = lifelike("torchvision/mobilenet_v3_small", (96, 64))
    session = onnxruntime.InferenceSession(to_onnx(model).SerializeToString())
    smallest, largest = sizes_of(model)
    for size in (96, 64, 73, smallest, largest):
        batch = images(2, size)
        (logits,) = session.run(["logits"], {"images": batch.numpy()})
        wanted = model.at(size)(batch).numpy()
        assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max(), size
