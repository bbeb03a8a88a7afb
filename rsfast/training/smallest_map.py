"""A batch norm needs more than one value per channel to train with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rsfast.models import RSNet
from rsfast.pyramid import Pyramid, SwitchableBatchNorm2d

__all__ = ["check_map_sizes"]


@torch.no_grad()
def check_map_sizes(model: RSNet, batch_size: int, ranks: int) -> None:
    """Refuses resolutions at which some batch norm would see one value of each channel.

    Such a norm returns its bias whatever it is given, and its variance falls to 0. Costs a forward
    of one image, and only where a batch is one image.

    Args:
        model: on its device.
        batch_size: images of a rank.
        ranks: whose images a batch norm sees together.

    Raises:
        ValueError: naming the resolution and the layer.
    """
    if batch_size * ranks > 1:
        return
    found: dict[int, str] = {}  # level -> the first layer
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, SwitchableBatchNorm2d):

            def note(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                for level, size in enumerate(inputs[0].sizes):
                    if size == (1, 1):
                        found.setdefault(level, name)

            hooks.append(module.register_forward_pre_hook(note))
    device = next(model.parameters()).device
    training = model.training
    try:
        images = [torch.zeros(1, 3, size, size, device=device) for size in model.resolutions]
        model.eval()(Pyramid.pack(images))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if found:
        level = min(found)
        raise ValueError(
            f"batch_size must be at least 2 where a map of the network is one pixel, as in front "
            f"of {found[level]} at resolution {model.resolutions[level]}: its batch norm would see "
            f"one value per channel, got {batch_size}; larger --resolutions, or --sync-bn over "
            f"several processes, do as well"
        )
