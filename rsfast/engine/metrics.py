"""Counters that stay on the device until they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsfast.losses import LossTerms
from rsfast.runtime.distributed import sum_over_ranks

__all__ = ["EpochMean", "LossMeter", "TopK", "label_places"]


class LossMeter:
    """Mean of the loss terms since it was last read, over the steps at which they were finite.

    Attributes:
        sums: [4] float64 on the device: of the three terms, and the steps they are of.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(LossTerms._fields) + 1, dtype=torch.float64, device=device)

    def add(self, terms: LossTerms) -> None:
        """Counts one step; no synchronisation."""
        values = torch.stack([*terms, torch.ones_like(terms.ce)])
        self.sums += torch.where(values.isfinite().all(), values, 0.0)

    def read(self) -> dict[str, float]:
        """Mean over steps and ranks of each term and of their total, in nats; starts anew.

        NaN if there was no step at which they were finite.
        """
        *sums, steps = sum_over_ranks(self.sums.clone()).tolist()
        self.sums.zero_()
        means = [value / steps if steps else math.nan for value in sums]
        return {"loss": sum(means), **dict(zip(LossTerms._fields, means, strict=True))}


def label_places(logits: Tensor, labels: Tensor) -> Tensor:
    """Place of each image's label among the K classes, from 1, in each row of logits.

    Of equal logits the lower class comes first, as argmax has it. NaN comes before every number,
    and a label that is NaN is last.

    Args:
        logits: [L, N, K].
        labels: [N].

    Returns:
        [L, N] int64.
    """
    labels = labels[None, :, None].expand(logits.shape[0], -1, 1)
    own = logits.gather(-1, labels)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    beaten = (logits < own) | ((logits == own) & (classes > labels))
    return logits.shape[-1] - beaten.sum(-1)


@dataclass
class EpochMean:
    """Mean of log lines, each as heavy as it has steps; lines without a finite step count not.

    Attributes:
        sums: of each figure.
        weight: steps in all.
    """

    sums: dict[str, float] = field(default_factory=dict)
    weight: int = 0

    def add(self, values: dict[str, float], weight: int) -> None:
        """Counts one line."""
        finite = math.isfinite(values["loss"])
        self.weight += weight if finite else 0
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + (value * weight if finite else 0.0)

    def read(self) -> dict[str, float]:
        """NaN if nothing was finite."""
        return {n: v / self.weight if self.weight else math.nan for n, v in self.sums.items()}


class TopK:
    """Top-1 and top-5 counts of L classifiers.

    Args:
        num_rows: L.
        device: of the counts.
        num_images: of the data set, over all ranks, to keep what is known of each of them.
    """

    def __init__(self, num_rows: int, device: torch.device, num_images: int = 0) -> None:
        self._hits = torch.zeros(num_rows, 2, dtype=torch.int64, device=device)
        self._images = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.zeros(num_rows, num_images, dtype=torch.int32, device=device)

    def add(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Counts one batch of [L, N, K] logits; no synchronisation.

        Args:
            logits: [L, N, K].
            labels: [N].
            indices: [N] positions of the images in the data set.
        """
        places = label_places(logits, labels)
        # Top-K where there are fewer than five classes.
        self._hits += torch.stack([(places == 1).sum(-1), (places <= 5).sum(-1)], dim=1)
        self._images += labels.shape[0]
        if self._places.shape[1]:
            self._places[:, indices.to(places.device, non_blocking=True)] = places.int()

    def read(self) -> tuple[list[tuple[float, float]], int]:
        """(top-1, top-5) in percent of each classifier over all ranks, and the images counted."""
        counts = sum_over_ranks(torch.cat([self._hits.flatten(), self._images])).tolist()
        images = counts.pop()
        return [
            (100 * a / images, 100 * b / images)
            for a, b in zip(counts[::2], counts[1::2], strict=True)
        ], images

    def places(self) -> Tensor:
        """[L, num_images] int32: the place of each image's label among the classes, from 1.

        Over all processes; 0 for images that were not seen.
        """
        return sum_over_ranks(self._places.clone()) if self._places.numel() else self._places
