"""What plain single-resolution networks cost and how their statistics are made anew."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["calibrate", "multiply_adds", "pooled_features"]


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimates the running statistics as plain averages over batches, in place.

    Args:
        net: a network of :meth:`rsfast.RSNet.at`.
        batches: tensors [N, 3, r, r], normalised, of training images.

    Raises:
        ValueError: if there is no batch.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    seen = False
    for batch in batches:
        net(batch)
        seen = True
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
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
