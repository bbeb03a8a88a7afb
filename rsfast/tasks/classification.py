"""Image classification: scores of a validation, and what the files of a run say of them.

All that a run knows about its task goes through `Scores` (batches in) and `Accuracy` (what they
come to): another task has the same two in a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsfast.data import Batch, ImageIndex
from rsfast.files import plots
from rsfast.runtime.distributed import sum_over_ranks

__all__ = ["Accuracy", "Scores", "TopK", "draw_epochs", "image_rows", "label_places"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Percentages over a validation set.

    Attributes:
        levels: (top-1, top-5) at each resolution, largest first.
        ensemble: (top-1, top-5) of the alpha-weighted logits; None if they were not asked for.
        num_images: images counted, over all ranks.
        places: [R + 1, n] the place of each image's label at each resolution and in the ensemble,
            from 1; n = 0 unless it was asked for.
    """

    levels: list[tuple[float, float]]
    ensemble: tuple[float, float] | None
    num_images: int
    places: Tensor = field(compare=False, repr=False)

    @property
    def images(self) -> Tensor:
        """What is known of each image: the places of the labels, by row."""
        return self.places

    @property
    def shares(self) -> Tensor:
        """[R, R] percentages of the images: wrong at one level (row), right at another (column)."""
        right = self.places[: len(self.levels)] == 1
        return 100 * (~right[:, None] & right[None]).double().mean(-1)

    @property
    def score(self) -> tuple[float, float]:
        """To compare epochs: top-1 at the largest resolution, ties by the mean of all figures.

        Rounded to 0.1 before comparing, as the authors' code does.
        """
        every = [value for pair in self.levels for value in pair]
        return round(self.levels[0][0], 1), round(sum(every) / len(every), 1)

    def columns(self, resolutions: Sequence[int]) -> dict[str, float]:
        """Of a row of summary.csv."""
        found = dict(zip(map(str, resolutions), self.levels, strict=True))
        if self.ensemble is not None:
            found["ensemble"] = self.ensemble
        columns: dict[str, float] = {}
        for name, (top1, top5) in found.items():
            columns |= {f"top1_{name}": top1, f"top5_{name}": top5}
        return columns

    def line(self, resolutions: Sequence[int]) -> str:
        """As it is printed after an epoch."""
        levels = zip(resolutions, self.levels, strict=True)
        text = "top-1 " + "  ".join(f"{r}: {values[0]:.1f}" for r, values in levels)
        return text if self.ensemble is None else f"{text}  ensemble: {self.ensemble[0]:.1f}"


class Scores:
    """Counts what the levels of a network and their ensemble get right.

    Args:
        num_levels: R.
        device: of the counts.
        ensemble_weights: [R] shares of the resolutions; None for no ensemble.
        num_images: of the data set, if what is known of each image is wanted.
    """

    def __init__(
        self,
        num_levels: int,
        device: torch.device,
        ensemble_weights: Tensor | None = None,
        num_images: int = 0,
    ) -> None:
        self._weights = ensemble_weights
        self._counts = TopK(num_levels + (ensemble_weights is not None), device, num_images)

    def add(self, logits: Tensor | Sequence[Tensor], batch: Batch) -> None:
        """Counts one batch; no synchronisation.

        Args:
            logits: [R, N, K], or R of [N, K].
            batch: of a validation loader.
        """
        logits = (logits if isinstance(logits, Tensor) else torch.stack(list(logits))).float()
        if self._weights is not None:
            mixed = torch.einsum("r,rnk->nk", self._weights, logits)
            logits = torch.cat([logits, mixed[None]])
        self._counts.add(logits, batch.labels, batch.indices)

    def read(self) -> Accuracy:
        """Over all ranks."""
        levels, seen = self._counts.read()
        ensemble = None if self._weights is None else levels.pop()
        return Accuracy(levels, ensemble, seen, self._counts.places())


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


def image_rows(
    index: ImageIndex, resolutions: Sequence[int | str], places: Tensor
) -> Iterator[dict[str, Any]]:
    """Rows of per_image.csv: an image's path, label, and the place of its label at each resolution.

    Args:
        index: the n images.
        resolutions: in pixels, or "ensemble".
        places: [len(resolutions), n].
    """
    names = ["image", "label", *map(str, resolutions)]
    columns = [index.paths, index.labels.tolist(), *places.tolist()]
    return (dict(zip(names, line, strict=True)) for line in zip(*columns, strict=True))


def draw_epochs(
    rows: Sequence[Mapping[str, Any]], resolutions: Sequence[int], folder: Path
) -> None:
    """Draws accuracy.png out of the rows of summary.csv."""
    plots.accuracy_over_epochs(rows, resolutions, folder / "accuracy.png")
