"""What a run starts from, if not from random weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from rsfast.config import TrainConfig
from rsfast.data import Loader, prefetch
from rsfast.engine import PRECISIONS
from rsfast.models import RSNet, load_pretrained
from rsfast.models.deploy import calibrate
from rsfast.pyramid import Pyramid
from rsfast.runtime.distributed import Rank, agree, average_bn_statistics, send_from_first

__all__ = ["start_from_weights"]

_LOG = logging.getLogger("rsfast")


def start_from_weights(
    cfg: TrainConfig, rank: Rank, model: RSNet, loader: Loader
) -> dict[str, Any]:
    """Fills the network with the weights of `cfg.pretrained`, and calibrates it if asked to.

    Rank 0 reads the file, so only its machine needs to have it.

    Args:
        cfg: of the run.
        rank: this process.
        model: on the device.
        loader: of training images; its last batches of the first epoch are calibrated on.

    Returns:
        What a checkpoint and the log say about the start; empty if there is no file.

    Raises:
        ValueError: if the file does not fit the network.
    """
    if cfg.pretrained is None or cfg.continue_from is not None:  # the ancestor has begun with it
        return {}
    path = cfg.pretrained
    normalization = loader.mean, loader.std
    loaded = agree(rank, lambda: load_pretrained(model, path, None, normalization))
    send_from_first(model)
    if cfg.calibrate_first:
        dtype = PRECISIONS[cfg.precision or "fp32"]
        training = model.training
        model.eval()
        with torch.autocast(rank.device.type, dtype, enabled=dtype is not None):
            calibrate(model, _batches(cfg, rank, loader))
        model.train(training)
        average_bn_statistics(model)
        _LOG.info(
            "batch-norm statistics were estimated anew on %d batches",
            min(cfg.calibrate_first, len(loader)),
        )
    return {
        "pretrained": loaded.path,
        "pretrained_sha256": loaded.sha256,
        "pretrained_source": loaded.source,
        "pretrained_banks": loaded.banks,
        "pretrained_classifier": loaded.classifier,
    }


def _batches(cfg: TrainConfig, rank: Rank, loader: Loader) -> Iterator[Pyramid]:
    """One level for each resolution, of the last batches of an epoch: no loop is left early."""
    loader.epoch, loader.first_step = 0, max(0, len(loader) - cfg.calibrate_first)
    for batch in prefetch(loader, rank.device):
        images = batch.images
        if cfg.copies > 1:
            images = Pyramid.pack(images.levels()[:: cfg.copies])
        yield images
    loader.epoch = 0
