"""Scores of a network at all its resolutions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rsfast.data import Batch
from rsfast.models import RSNet
from rsfast.tasks.classification import Accuracy, Scores

__all__ = ["validate"]


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
    scores = Scores(ensemble_weights, num_images)
    training = model.training
    model.eval()
    for batch in batches:
        with torch.autocast(ensemble_weights.device.type, dtype, enabled=dtype is not None):
            logits = model(batch.images)
        scores.add(logits, batch)
    model.train(training)
    return scores.read()
