"""Averaged weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["AveragedModel"]

Model = TypeVar("Model", bound=nn.Module)


class AveragedModel(Generic[Model]):
    """An exponential moving average of a network: decay * average + (1 - decay) * network.

    Of parameters and floating-point buffers; counters are copied. An update is a few launches for
    all tensors together, and the host waits for none of them: PyTorch's own AveragedModel reads its
    count from the device twice per update.

    Args:
        model: the network; the average starts as a copy of it.
        decay: in (0, 1).

    Attributes:
        module: the averaged network.
        updates: taken in so far. The first one takes the network's values as they are.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.updates = 0
        self._decay = decay

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Takes in the network's values of this moment."""
        averaged, own = _tensors(self.module), _tensors(model)
        pairs = list(zip(averaged, own, strict=True))
        copied = [pair for pair in pairs if not self.updates or not pair[0].is_floating_point()]
        meant = [pair for pair in pairs if self.updates and pair[0].is_floating_point()]
        if copied:
            torch._foreach_copy_([a for a, _ in copied], [b for _, b in copied])
        if meant:
            torch._foreach_lerp_([a for a, _ in meant], [b for _, b in meant], 1 - self._decay)
        self.updates += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
