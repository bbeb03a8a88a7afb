"""Averaged weights."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["AveragedModel", "average_of"]


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of parameters and buffers: decay * average + (1 - decay) * own.

    Args:
        model: the network; the average starts as a copy of it, and takes its values at each
            `update_parameters(model)`.
        decay: in (0, 1).
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
