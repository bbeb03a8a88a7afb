"""A small exported network for the tests of what runs it."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import rsfast
from rsfast.deploy import Manifest
from rsfast.deploy.manifest import FP32_FILE
from rsfast.models import RSNet
from rsfast.pyramid import SwitchableBatchNorm2d

__all__ = [
    "RESOLUTIONS",
    "SIZES",
    "Exported",
    "export_small",
    "manifest",
    "pixels",
    "small_network",
]

RESOLUTIONS = (64, 48, 32)
SIZES = (16, 128)


class Exported(NamedTuple):
    """A network and the folder that it was exported to."""

    folder: Path
    model: RSNet


def small_network(seed: int = 0) -> RSNet:
    """Whose banks differ so much that a wrong one shows."""
    torch.manual_seed(seed)
    model = rsfast.create_model("tiny:network", RESOLUTIONS, num_classes=5)
    for norm in model.batch_norms():
        for part in (norm.weight, norm.running_var):
            nn.init.uniform_(part, 0.5, 2.0)
        for part in (norm.bias, norm.running_mean):
            nn.init.normal_(part, 0.0, 0.5)
    model.input_mean, model.input_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return model.eval()


class _Mixed(nn.Module):
    def __init__(self, norm: SwitchableBatchNorm2d, share: list) -> None:
        super().__init__()
        parts = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        self.register_buffer("table", torch.cat([p.detach() for p in parts], 1))
        self.eps, self.share = norm.eps, share

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta, mean, var = (self.share[0] @ self.table).reshape(4, 1, -1, 1, 1).unbind(0)
        scale = gamma / torch.sqrt(var + self.eps)
        return x * scale + (beta - mean * scale)


class _Graph(nn.Module):
    def __init__(self, model: RSNet) -> None:
        super().__init__()
        self.net = model.at(model.resolutions[0]).to(memory_format=torch.contiguous_format)
        r = [float(x) for x in model.resolutions]
        gaps = [a - b for a, b in itertools.pairwise(r)]
        self.register_buffer("below", torch.tensor([*r[1:], r[-1] - 1e9]))
        self.register_buffer("gap_below", torch.tensor([*gaps, 1.0]))
        self.register_buffer("above", torch.tensor([r[0] + 1e9, *r[:-1]]))
        self.register_buffer("gap_above", torch.tensor([1.0, *gaps]))
        self.share: list = [None]
        norms = dict(model.network.named_modules())
        for name, module in list(self.net.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                self.net.set_submodule(name, _Mixed(norms[name], self.share))

    def forward(self, images: Tensor) -> Tensor:
        size = torch.scalar_tensor(images.shape[2], dtype=torch.float32)
        below = (size - self.below) / self.gap_below
        above = (self.above - size) / self.gap_above
        self.share[0] = torch.minimum(below, above).clamp(0.0, 1.0)[None]
        return self.net(images)


def export_small(folder: Path) -> RSNet:
    """Writes the files of a small network, and returns it."""
    model = small_network()
    size = torch.export.Dim("size", min=SIZES[0], max=SIZES[1])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Graph(model).eval(),
            (torch.zeros(2, 3, 48, 48),),
            dynamo=True,
            opset_version=18,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch"), 2: size, 3: size}},
        )
    program.save(folder / FP32_FILE, external_data=False)
    manifest(model).write(folder)
    return model


def manifest(model: RSNet) -> Manifest:
    return Manifest(
        arch=model.arch,
        resolutions=model.resolutions,
        sizes=SIZES,
        between="interpolate",
        num_classes=model.num_classes,
        class_names=None,
        input_dtype="float32",
        mean=model.input_mean,
        std=model.input_std,
        crop=model.val_crop,
        scale=0.875,
        filter="bilinear",
        calibration_images=0,
        checkpoint="small.pt",
        checkpoint_sha256="",
        versions={},
    )


def pixels(batch: int, size: int, seed: int = 0) -> np.ndarray:
    """[batch, 3, size, size] float32 noise."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((batch, 3, size, size), dtype=np.float32)
