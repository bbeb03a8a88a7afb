"""Accuracy of a network at all its resolutions, and of their ensemble."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsfast.data import Batch
from rsfast.engine.metrics import TopK
from rsfast.models import RSNet

__all__ = ["Accuracy", "validate"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Percentages over a validation set.

    Attributes:
        levels: (top-1, top-5) at each resolution, largest first.
        ensemble: (top-1, top-5) of the alpha-weighted logits.
        num_images: images counted, over all ranks.
        places: [R + 1, n] the place of each image's label at each resolution and in the ensemble,
            from 1; n = 0 unless it was asked for.
    """

    levels: list[tuple[float, float]]
    ensemble: tuple[float, float]
    num_images: int
    places: Tensor = field(compare=False, repr=False)

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
    num_images: int = 0,
) -> Accuracy:
    """Runs the network over a validation loader, every level in one forward.

    Args:
        model: is put in eval mode and left in the mode it was in.
        ensemble_weights: [R] shares of the resolutions.
        batches: pyramids of all trained resolutions.
        dtype: of autocast; None for float32.
        num_images: of the data set, if what is known of each image is wanted.
    """
    device = ensemble_weights.device
    counts = TopK(len(model.resolutions) + 1, device, num_images)
    training = model.training
    model.eval()
    for batch in batches:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(batch.images)
        logits = logits.float()
        mixed = torch.einsum("r,rnk->nk", ensemble_weights, logits)
        counts.add(torch.cat([logits, mixed[None]]), batch.labels, batch.indices)
    model.train(training)
    (*levels, ensemble), seen = counts.read()
    return Accuracy(levels, ensemble, seen, counts.places())
