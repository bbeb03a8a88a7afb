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

    Of parameters and floating-point buffers, such as the statistics of batch norm and the bases of
    quantisers; counters are copied. Averaged bases go with averaged weights: a basis is fitted to
    weights by linear equations, so that while no weight changes its code, averaging the bases that
    were fitted in many steps gives the basis that would be fitted to the average of their weights.

    An update is a few launches for all tensors together, and the host waits for none of them:
    PyTorch's own AveragedModel reads its count from the device twice per update.

    With `warmup`, the decay of update t, from 0, is at most (1 + t) / (10 + t), as TensorFlow and
    timm have it: the average is of about the last ninth of the updates until it reaches `decay`
    (0.9999 after 90,000 of them), and never of weights from before training.

    Args:
        model: the network; the average starts as a copy of it.
        decay: in (0, 1).
        warmup: whether the decay grows to that.

    Attributes:
        module: the averaged network.
        updates: taken in so far. The first one takes the network's values as they are.
    """

    def __init__(self, model: Model, decay: float, warmup: bool = False) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.updates = 0
        self._decay = decay
        self._warmup = warmup

    def decay(self) -> float:
        """Of the next update."""
        if not self._warmup:
            return self._decay
        return min(self._decay, (1 + self.updates) / (10 + self.updates))

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
            torch._foreach_lerp_([a for a, _ in meant], [b for _, b in meant], 1 - self.decay())
        self.updates += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
