"""What plain single-resolution networks cost and how their statistics are made anew."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rsfast.pyramid import SwitchableBatchNorm2d

__all__ = ["calibrate", "multiply_adds", "pooled_features"]


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Any]) -> None:
    """Re-estimates the running statistics as plain averages over batches, in place.

    Args:
        net: a network of :meth:`rsfast.RSNet.at`, or an RSNet, all of whose banks are calibrated.
        batches: of training images, normalised: tensors [N, 3, r, r], or for an RSNet pyramids
            with one level for each bank. Bases of quantisers stay as they are.

    Raises:
        ValueError: if there is no batch.
    """
    kinds = nn.BatchNorm2d | nn.SyncBatchNorm | SwitchableBatchNorm2d
    norms: list[Any] = [m for m in net.modules() if isinstance(m, kinds)]
    others = [m for m in net.modules() if hasattr(m, "moved_by_forward") and m not in norms]
    before = [(norm.momentum, norm.training) for norm in norms]
    others_before = [module.training for module in others]
    seen = 0
    try:
        for module in others:
            module.eval()
        for norm in norms:
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0)
            norm.num_batches_tracked.zero_()
            norm.train()
        for batch in batches:
            seen += 1
            for norm in norms:
                norm.momentum = 1.0 / seen  # the cumulative average; 1 forgets what was there
            net(batch)
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
        for module, training in zip(others, others_before, strict=True):
            module.train(training)
    if not seen:
        raise ValueError("batches must hold at least one batch to calibrate on, got none")


def multiply_adds(net: nn.Module, resolution: int) -> int:
    """Multiply-adds of the convolutions and linear layers for one image of r x r pixels."""
    net = copy.deepcopy(net).to("meta")
    images = torch.empty(1, 3, resolution, resolution, device="meta")
    images = images.to(next(net.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(images)
    return counter.get_total_flops() // 2


@torch.no_grad()
def pooled_features(net: nn.Module, images: Tensor) -> Tensor:
    """[N, C]: what the classifier sees of images, the input of the last linear layer.

    Raises:
        ValueError: if the network has none.
    """
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"network {type(net).__name__} has no linear layer to look in front of")
    seen: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(images)
    hook.remove()
    return seen[0]
