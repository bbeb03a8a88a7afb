"""A small exported network for the tests of what runs it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import rsfast
from rsfast.deploy import Manifest
from rsfast.deploy.manifest import FP32_FILE
from rsfast.export.graph import sizes_of, to_onnx
from rsfast.models import RSNet

__all__ = [
    "RESOLUTIONS",
    "Exported",
    "end_process",
    "export_small",
    "manifest",
    "pixels",
    "small_network",
    "unlike_banks",
]

RESOLUTIONS = (64, 48, 32)


class Exported(NamedTuple):
    """A network and the folder that it was exported to."""

    folder: Path
    model: RSNet


def small_network(seed: int = 0) -> RSNet:
    """Whose banks differ so much that a wrong one shows."""
    torch.manual_seed(seed)
    model = unlike_banks(rsfast.create_model("tiny:network", RESOLUTIONS, num_classes=5))
    model.input_mean, model.input_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return model


def unlike_banks(model: RSNet) -> RSNet:
    """Gives every bank its own values, and returns the network in eval mode."""
    for norm in model.batch_norms():
        for part in (norm.weight, norm.running_var):
            nn.init.uniform_(part, 0.5, 2.0)
        for part in (norm.bias, norm.running_mean):
            nn.init.normal_(part, 0.0, 0.5)
    return model.eval()


def export_small(folder: Path, preprocess: bool = False) -> RSNet:
    """Writes the files of a small network, and returns it."""
    model = small_network()
    (folder / FP32_FILE).write_bytes(to_onnx(model, preprocess).SerializeToString())
    contract = manifest(model)
    if preprocess:
        contract = dataclasses.replace(contract, input_dtype="uint8")
    contract.write(folder)
    return model


def manifest(model: RSNet) -> Manifest:
    return Manifest(
        arch=model.arch,
        resolutions=model.resolutions,
        sizes=sizes_of(model),
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


def end_process(*_: object) -> None:
    """As the system does when memory runs out."""
    os._exit(137)
