"""Semantic segmentation: scores of a validation, and what the files of a run say of them.

Logits are maps of a quarter of the input's size, and images are squashed to r x r. They are scored
where people look at them: the logits of each resolution are resized (bilinear, in float32) to the
image's own mask, and the class of each pixel is the largest of them. The ensemble is the mean of
the resized logits, weighted by the softmax of alpha, as in the loss.

The figures, in percent, come from one confusion matrix over all images, not from means of images:
pixel accuracy is the share of pixels that are right, mean accuracy the mean of the classes' shares
of pixels that are right, and mean IoU the mean of the classes' intersections over unions. A class
without a pixel has no accuracy, and one that nobody has predicted either has no IoU; means are over
the classes that have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.data import Batch, ImageIndex
from rsfast.files import plots
from rsfast.pyramid import Pyramid
from rsfast.runtime.distributed import sum_over_ranks

__all__ = [
    "Accuracy",
    "Confusion",
    "Scores",
    "class_counts",
    "class_rows",
    "draw_epochs",
    "figures_of",
    "figures_of_classes",
    "image_rows",
    "predicted_classes",
]

Figures = tuple[float, float, float]
# Resized logits held at a time, of all levels together: 256 MiB of float32.
_MOST_VALUES = 2**26


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Percentages over a validation set.

    Attributes:
        levels: (pixel accuracy, mean accuracy, mean IoU) at each resolution, largest first.
        ensemble: the same of the alpha-weighted logits; None if they were not asked for.
        num_images: images counted, over all ranks.
        matrices: [R + 1, K, K] int64 pixels of a class (row) that were taken for a class (column),
            at each resolution and in the ensemble, on the CPU.
        images: [R + 1, n, K, 3] int64 pixels that each image has of a class, that were taken for
            it, and that are both, likewise; n = 0 unless it was asked for. 24 bytes for each class:
            7 MB for each resolution and 2,000 images of 150 classes.
        shares: [R, R] percentages of the pixels: wrong at one resolution (row), right at another
            (column); zeros unless it was asked for.
    """

    levels: list[Figures]
    ensemble: Figures | None
    num_images: int
    matrices: Tensor = field(compare=False, repr=False)
    images: Tensor = field(compare=False, repr=False)
    shares: Tensor = field(compare=False, repr=False)

    @property
    def score(self) -> tuple[float, float]:
        """To compare epochs: mean IoU at the largest resolution, ties by the mean of all figures.

        Rounded to 0.1 before comparing, as for classification.
        """
        every = [value for figures in self.levels for value in figures]
        return round(self.levels[0][2], 1), round(sum(every) / len(every), 1)

    def columns(self, resolutions: Sequence[int]) -> dict[str, float]:
        """Of a row of summary.csv."""
        found = dict(zip(map(str, resolutions), self.levels, strict=True))
        if self.ensemble is not None:
            found["ensemble"] = self.ensemble
        columns: dict[str, float] = {}
        for name, (pixel, mean, miou) in found.items():
            columns |= {f"miou_{name}": miou, f"pixel_{name}": pixel, f"mean_{name}": mean}
        return columns

    def line(self, resolutions: Sequence[int]) -> str:
        """As it is printed after an epoch."""
        levels = zip(resolutions, self.levels, strict=True)
        text = "mean IoU " + "  ".join(f"{r}: {figures[2]:.1f}" for r, figures in levels)
        return text if self.ensemble is None else f"{text}  ensemble: {self.ensemble[2]:.1f}"


class Scores:
    """Counts what the levels of a network and their ensemble make of the pixels.

    Args:
        num_levels: R.
        num_classes: K.
        ignore_label: of pixels that do not count.
        device: of the counts.
        ensemble_weights: [R] shares of the resolutions; None for no ensemble.
        num_images: of the data set, if what is known of each image is wanted.
    """

    def __init__(
        self,
        num_levels: int,
        num_classes: int,
        ignore_label: int,
        device: torch.device,
        ensemble_weights: Tensor | None = None,
        num_images: int = 0,
    ) -> None:
        self._weights = ensemble_weights
        rows = num_levels + (ensemble_weights is not None)
        self._counts = Confusion(rows, num_classes, ignore_label, device, num_images)

    def add(self, logits: Pyramid | Sequence[Tensor], batch: Batch) -> None:
        """Counts one batch, whose `masks` are the images' own; no synchronisation.

        Args:
            logits: levels [N, K, h, w].
            batch: of a validation loader.
        """
        levels = logits.levels() if isinstance(logits, Pyramid) else logits
        for number, mask in enumerate(batch.masks or ()):
            size = mask.shape[0], mask.shape[1]
            maps = [level[number] for level in levels]
            predicted = predicted_classes(maps, size, self._weights)
            self._counts.add(predicted, mask, int(batch.indices[number]))

    def read(self) -> Accuracy:
        """Over all ranks.

        Raises:
            ValueError: on all ranks, if no pixel counts, or a mask holds a class that is none.
        """
        matrices, num_images = self._counts.read()
        figures = [figures_of(matrix) for matrix in matrices]
        ensemble = None if self._weights is None else figures.pop()
        images, crossings = self._counts.images()
        shares = 100 * crossings[: len(figures), : len(figures)].double() / matrices[0].sum()
        return Accuracy(figures, ensemble, num_images, matrices, images, shares)


class Confusion:
    """Confusion matrices of L classifiers of pixels.

    Args:
        num_rows: L.
        num_classes: K.
        ignore_label: of pixels that do not count.
        device: of the counts.
        num_images: of the data set, over all ranks, to keep what is known of each of them, on the
            device until it is read.
    """

    def __init__(
        self,
        num_rows: int,
        num_classes: int,
        ignore_label: int,
        device: torch.device,
        num_images: int = 0,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        # Behind the classes: labels that are none, and the ignored one.
        self._shape = num_rows, num_classes + 2, num_classes
        self._ignore_label = ignore_label
        self._counts = zeros(*self._shape)
        self._num_seen = zeros(1)
        self._of_images = zeros(num_images, num_rows, num_classes, 3)
        self._crossings = zeros(num_rows, num_rows)

    def add(self, predicted: Tensor, mask: Tensor, position: int = 0) -> None:
        """Counts one image; no synchronisation.

        Args:
            predicted: [L, H, W] int64 classes.
            mask: [H, W] uint8 labels.
            position: of the image in the data set, if what is known of each image is kept.
        """
        num_rows, num_labels, num_classes = self._shape
        labels = torch.where(
            mask == self._ignore_label, num_classes + 1, mask.long().clamp(max=num_classes)
        )
        rows = num_labels * torch.arange(num_rows, device=mask.device).view(-1, 1, 1) + labels
        cells = (rows * num_classes + predicted).flatten()
        found = torch.zeros_like(self._counts)
        found.view(-1).scatter_add_(0, cells, torch.ones_like(cells))
        self._counts += found
        self._num_seen += 1
        if len(self._of_images):
            self._of_images[position] = class_counts(found[:, :num_classes])
            right = (predicted == labels).flatten(1)  # labels that are no class are never predicted
            wrong = ~right & (labels < num_classes).flatten()
            for row in range(num_rows):
                self._crossings[row] += (wrong[row] & right).sum(1)

    def read(self) -> tuple[Tensor, int]:
        """[L, K, K] over all ranks, on the CPU, and the images counted.

        Raises:
            ValueError: on all ranks, if no pixel counts, or a mask holds a class that is none.
        """
        flat = sum_over_ranks(torch.cat([self._counts.flatten(), self._num_seen])).cpu()
        counts, images = flat[:-1].view(self._shape), int(flat[-1])
        num_classes = self._shape[2]
        if odd := int(counts[0, num_classes].sum()):
            raise ValueError(
                f"masks must hold classes below {num_classes} or the ignored "
                f"{self._ignore_label}, and {odd} pixels of the validation images hold others: "
                f"list all classes in classes.txt, or see --ignore-label"
            )
        matrices = counts[:, :num_classes]
        if not matrices[0].any():
            raise ValueError(
                f"masks must have pixels that count, and all those of the {images} validation "
                f"images are {self._ignore_label}, which is ignored: see --ignore-label"
            )
        return matrices, images

    def images(self) -> tuple[Tensor, Tensor]:
        """What is known of each image, over all ranks, on the CPU.

        Returns:
            [L, num_images, K, 3] int64: an image's :func:`class_counts`.
            [L, L] int64: pixels of all images that are wrong in one row and right in another.
        """
        images, crossings = self._of_images, self._crossings
        if len(images):
            images, crossings = (sum_over_ranks(counts.clone()) for counts in (images, crossings))
        return images.transpose(0, 1).cpu(), crossings.cpu()


def predicted_classes(
    levels: Sequence[Tensor], size: tuple[int, int], ensemble_weights: Tensor | None = None
) -> Tensor:
    """The class of each pixel of one image, of each level and of their ensemble.

    The logits are resized some classes at a time: 150 classes of a photograph of 12 megapixels
    would take 7 GB for each level. Of equal logits the lower class is taken, and NaN before all
    others, as argmax has it.

    Args:
        levels: R maps [K, h, w].
        size: (H, W) to resize them to.
        ensemble_weights: [R] float32; None for no ensemble.

    Returns:
        [R, H, W] int64, or [R + 1, H, W] with the ensemble behind the levels.
    """
    num_classes = levels[0].shape[0]
    at_once = max(1, _MOST_VALUES // ((len(levels) + 1) * size[0] * size[1]))
    best = found = None
    for first in range(0, num_classes, at_once):
        part = [_resized(level[first : first + at_once], size) for level in levels]
        if ensemble_weights is not None:
            part.append(torch.einsum("r,rkhw->khw", ensemble_weights, torch.stack(part)))
        values, classes = (
            torch.stack(each) for each in zip(*(p.max(0) for p in part), strict=True)
        )
        if best is None or found is None:
            best, found = values, classes
        else:
            better = (values > best) | (values.isnan() & ~best.isnan())
            best = torch.where(better, values, best)
            found = torch.where(better, classes + first, found)
    assert found is not None
    return found


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """[K, H, W] float32 of [K, h, w]."""
    maps = logits[None].float()
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]


def figures_of(matrix: Tensor) -> Figures:
    """Pixel accuracy, mean accuracy and mean IoU in percent, of a [K, K] confusion matrix."""
    _, accuracies, ious = figures_of_classes(class_counts(matrix))
    right, counted = matrix.diagonal().sum().item(), matrix.sum().item()
    return 100.0 * right / counted, _mean(accuracies), _mean(ious)


def class_counts(matrices: Tensor) -> Tensor:
    """[..., K, 3] of confusion matrices [..., K, K]: pixels of a class, taken for it, and both."""
    right = matrices.diagonal(dim1=-2, dim2=-1)
    return torch.stack([matrices.sum(-1), matrices.sum(-2), right], dim=-1)


def figures_of_classes(counts: Tensor) -> tuple[list[int], list[float | None], list[float | None]]:
    """Pixels, accuracy and IoU in percent of each class, of [K, 3] :func:`class_counts`.

    A class has no accuracy without pixels, and no IoU without pixels and predictions.
    """
    labelled, predicted, right = counts.T.tolist()
    unions = [a + b - both for a, b, both in zip(labelled, predicted, right, strict=True)]
    return labelled, _percent(right, labelled), _percent(right, unions)


def _percent(parts: Sequence[int], wholes: Sequence[int]) -> list[float | None]:
    pairs = zip(parts, wholes, strict=True)
    return [100.0 * part / whole if whole else None for part, whole in pairs]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def class_rows(
    index: ImageIndex, resolutions: Sequence[int | str], images: Tensor
) -> list[dict[str, Any]]:
    """Rows of per_class.csv: a class's pixels, and its IoU and accuracy in percent.

    Args:
        index: the n images.
        resolutions: in pixels, or "ensemble", in the order of the columns.
        images: [len(resolutions), n, K, 3] :func:`class_counts`.

    Returns:
        One row for each class; "" for a figure that it does not have.
    """
    rows: list[dict[str, Any]] = [{"class": name} for name in index.class_names]
    ious: dict[str, list[float | None]] = {}
    accuracies: dict[str, list[float | None]] = {}
    pixels: list[int] = []
    for name, counts in zip(resolutions, images.sum(1), strict=True):
        pixels, accuracies[f"accuracy_{name}"], ious[f"iou_{name}"] = figures_of_classes(counts)
    for number, row in enumerate(rows):
        row["pixels"] = pixels[number]
        for column, values in (ious | accuracies).items():
            value = values[number]
            row[column] = "" if value is None else value
    return rows


def image_rows(
    index: ImageIndex, resolutions: Sequence[int | str], images: Tensor
) -> Iterator[dict[str, Any]]:
    """Rows of per_image.csv: one for each image, resolution and class that it has there.

    Sums over the images are what the figures are made of, so that any other set of images, such as
    a resampled one, has its figures, too. A class that an image neither has nor is taken for has
    no row; nor has an image without a pixel that counts.

    Args:
        index: the n images.
        resolutions: in pixels, or "ensemble".
        images: [len(resolutions), n, K, 3] :func:`class_counts`.
    """
    names = ("pixels", "predicted", "right")
    for number, path in enumerate(index.paths):
        for resolution, counts in zip(resolutions, images[:, number], strict=True):
            present = counts.any(-1).nonzero().flatten().tolist()
            for label, values in zip(present, counts[present].tolist(), strict=True):
                row = {"image": path, "resolution": resolution, "class": index.class_names[label]}
                yield row | dict(zip(names, values, strict=True))


def draw_epochs(
    rows: Sequence[Mapping[str, Any]], resolutions: Sequence[int], folder: Path
) -> None:
    """Draws accuracy.png out of the rows of summary.csv."""
    path = folder / "accuracy.png"
    plots.accuracy_over_epochs(rows, resolutions, path, "miou", "validation mean IoU (%)")
