"""The logits of PyTorch that an exported network is compared with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from rsfast.deploy.manifest import Manifest
from rsfast.deploy.reference import Reference, patterns, reference_sizes
from rsfast.models import RSNet
from rsfast.models.lq import LQActivation, LQWeight

__all__ = ["activation_bits", "compute", "weight_bits"]


@torch.inference_mode()
def compute(model: RSNet, manifest: Manifest) -> Reference:
    """What `model.at(r)` says of the patterns of every size, and of the first by every bank.

    Args:
        model: on the CPU.
        manifest: of the export.
    """
    as_floats = replace(manifest, input_dtype="float32")
    nets = {r: model.at(r) for r in model.resolutions}
    logits, by_bank = {}, {}
    for size in reference_sizes(model.resolutions, manifest.sizes):
        images = torch.from_numpy(patterns(size, as_floats))
        net = nets.get(size) or model.at(size)
        logits[size] = net(images).numpy()
        if size in nets and len(nets) > 1 and model.bn == "private":
            by_bank[size] = torch.cat([net(images[:1]) for net in nets.values()]).numpy()
    return Reference(logits, by_bank, {}, steps=bool(activation_bits(model)))


def activation_bits(model: nn.Module) -> list[int]:
    """Those of quantised activations, each once, ascending; none where all have full precision.

    Looked for in the modules, so that networks of the user's own are seen, too.
    """
    return sorted({m.bits for m in model.modules() if isinstance(m, LQActivation)})


def weight_bits(model: nn.Module) -> list[int]:
    """Those of quantised weights, likewise."""
    return sorted({m.bits for m in model.modules() if isinstance(m, LQWeight)})
