"""Quantised networks as files of their codes: what a device needs, not what training needs."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rsfast.models import RSNet
from rsfast.models.lq_codes import LAYOUT, packed_state
from rsfast.training.checkpoint import write_weights

__all__ = ["save_packed"]


def save_packed(model: RSNet, alpha: Tensor, path: str | Path) -> None:
    """Writes a quantised network as safetensors, its quantised weights as codes.

    :mod:`rsfast.models.lq_codes` has their layout. Bases, first convolution, classifier and batch
    norms are in full precision; the metadata is that of :func:`rsfast.checkpoint.save_weights` and
    says that the file is packed. :func:`rsfast.checkpoint.load_model` reads it: in evaluation the
    network's outputs are the same, bit for bit. The weights that training moves are not in it.

    Args:
        model: with quantised convolutions, of float32.
        alpha: [R] raw ensemble scores, the tensor "ensemble.alpha".
        path: of the file, which ends in .safetensors.

    Raises:
        ValueError: if the network is in full precision, of another type or not finite, or has no
            name, as one that :func:`rsfast.convert` made of a module.
    """
    write_weights(model, packed_state(model), alpha, Path(path), packed=LAYOUT)
