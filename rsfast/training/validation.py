"""Scores of a network at all its resolutions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.data import Batch
from rsfast.models import RSNet
from rsfast.tasks import task_of

__all__ = ["validate", "validate_all"]


def validate(
    model: RSNet,
    ensemble_weights: Tensor,
    batches: Iterable[Batch],
    dtype: torch.dtype | None = None,
    num_images: int = 0,
) -> Any:
    """:func:`validate_all` of one network."""
    return validate_all([model], ensemble_weights, batches, dtype, num_images)[0]


@torch.no_grad()
def validate_all(
    models: Sequence[RSNet],
    ensemble_weights: Tensor,
    batches: Iterable[Batch],
    dtype: torch.dtype | None = None,
    num_images: int = 0,
) -> list[Any]:
    """Runs networks over a validation loader, every level in one forward.

    Args:
        models: are put in eval mode and left in the mode they were in.
        ensemble_weights: [R] shares of the resolutions.
        batches: pyramids of all trained resolutions.
        dtype: of autocast; None for float32.
        num_images: of the data set, if what is known of each image is wanted.

    Returns:
        The `Accuracy` of each network, in its task's file.
    """
    device = ensemble_weights.device
    scores = [
        task_of(model).scores_of(model, len(ensemble_weights), device, ensemble_weights, num_images)
        for model in models
    ]
    training = [model.training for model in models]
    for model in models:
        model.eval()
    for batch in batches:
        for model, score in zip(models, scores, strict=True):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(batch.images)
            score.add(logits, batch)
    for model, was in zip(models, training, strict=True):
        model.train(was)
    return [score.read() for score in scores]
