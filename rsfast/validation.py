"""Accuracy of a network at all its resolutions, and of their ensemble."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rsfast.data import Batch
from rsfast.metrics import TopK
from rsfast.models import RSNet

__all__ = ["Accuracy", "validate"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Percentages over a validation set.

    Attributes:
        levels: (top-1, top-5) at each resolution, largest first.
        ensemble: (top-1, top-5) of the alpha-weighted logits.
        num_images: images counted, over all ranks.
    """

    levels: list[tuple[float, float]]
    ensemble: tuple[float, float]
    num_images: int

    @property
    def score(self) -> tuple[float, float]:
        """To compare epochs: top-1 at the largest resolution, ties by the mean of all figures.

        Rounded to 0.1 before comparing, as the authors' code does.
        """
        every = [value for pair in self.levels for value in pair]
        return round(self.levels[0][0], 1), round(sum(every) / len(every), 1)


@torch.no_grad()
def validate(
    model: RSNet,
    ensemble_weights: Tensor,
    batches: Iterable[Batch],
    dtype: torch.dtype | None = None,
) -> Accuracy:
    """Runs the network over a validation loader, every level in one forward.

    Args:
        model: is put in eval mode and left in the mode it was in.
        ensemble_weights: [R] shares of the resolutions.
        batches: pyramids of all trained resolutions.
        dtype: of autocast; None for float32.
    """
    device = ensemble_weights.device
    counts = TopK(len(model.resolutions) + 1, device)
    training = model.training
    model.eval()
    for batch in batches:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(batch.images)
        logits = logits.float()
        mixed = torch.einsum("r,rnk->nk", ensemble_weights, logits)
        counts.add(torch.cat([logits, mixed[None]]), batch.labels)
    model.train(training)
    (*levels, ensemble), num_images = counts.read()
    return Accuracy(levels, ensemble, num_images)
