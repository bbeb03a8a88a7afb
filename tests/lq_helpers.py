"""Quantised networks whose bases and banks are as different as those of trained ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import rsfast
from lifelike import images
from rsfast.models import RSNet
from rsfast.models.lq import LQConv2d

__all__ = ["quantised_network", "same_outputs", "settled"]


def quantised_network(
    weight_bits: int = 2,
    activation_bits: int = 32,
    bn: str = "private",
    resolutions: tuple[int, ...] = (32, 16),
) -> RSNet:
    """A resnet18_lq of three classes as it is made, each convolution with bases of its own."""
    torch.manual_seed(weight_bits + 10 * activation_bits)
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    model = rsfast.create_model("resnet18_lq", resolutions, 3, bn, **bits)
    for conv in convolutions(model):
        basis = conv.quantizer.basis
        basis *= 0.5 + torch.rand_like(basis)
    return model.eval()


def convolutions(model: RSNet) -> Iterator[LQConv2d]:
    return (module for module in model.modules() if isinstance(module, LQConv2d))


@torch.no_grad()
def settled(model: RSNet) -> RSNet:
    """With statistics and bases of some images, and a bank for each resolution."""
    for norm in model.batch_norms():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
        norm.momentum = 1.0
    model.train()
    model([images(8, r, seed=1) for r in model.resolutions])
    for norm in model.batch_norms():
        norm.momentum = 0.1
        norm.running_mean += 0.2 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
        norm.weight *= 1 + 0.3 * torch.randn_like(norm.weight)
    return model.eval()


@torch.no_grad()
def same_outputs(one: RSNet, other: RSNet) -> bool:
    """Bit for bit, at all trained sizes and at one between."""
    levels = [images(2, r) for r in one.resolutions]
    between = (one.resolutions[0] + one.resolutions[-1]) // 2
    x = images(2, between)
    pairs = (one(levels), other(levels)), (one.at(between)(x), other.at(between)(x))
    return all(_same_bits(a, b) for a, b in pairs)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(a.isfinite().all()) and torch.equal(a.view(torch.int32), b.view(torch.int32))
