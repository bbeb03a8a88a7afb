"""What is particular to a task: its loss, how its networks are scored, what of that is shown.

:func:`task_of` says all that training, validation and evaluation have to know of the task of a
run. A task has two things in a file of its own: `Scores`, which takes batches in, and `Accuracy`,
what they come to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rsfast.data import Batch, ImageIndex, open_pairs, open_split
from rsfast.losses import MultiResolutionDistillation, PixelDistillation
from rsfast.tasks import classification, segmentation

__all__ = ["Accuracy", "RowsOf", "Scores", "Task", "settings_of", "task_of"]

# Rows of a CSV file, of the n images, the resolutions (or "ensemble") and [rows, n, ...] of them.
RowsOf = Callable[[ImageIndex, Sequence[int | str], Tensor], Iterable[Mapping[str, Any]]]


class Accuracy(Protocol):
    """Percentages over a validation set."""

    @property
    def levels(self) -> Sequence[tuple[float, ...]]:
        """The task's figures at each resolution, largest first."""

    @property
    def ensemble(self) -> tuple[float, ...] | None:
        """The same of the alpha-weighted logits; None if they were not asked for."""

    @property
    def num_images(self) -> int:
        """Images counted, over all ranks."""

    @property
    def images(self) -> Tensor:
        """What is known of each image, [R + 1, n, ...], levels and ensemble along the first axis.

        n = 0 unless it was asked for.
        """

    @property
    def shares(self) -> Tensor:
        """[R, R] percentages of all that is scored: wrong at one level (row), right at another.

        Only where something is known of each image.
        """

    @property
    def score(self) -> tuple[float, float]:
        """To compare epochs."""

    def columns(self, resolutions: Sequence[int]) -> dict[str, float]:
        """Of a row of summary.csv."""

    def line(self, resolutions: Sequence[int]) -> str:
        """As it is printed after an epoch."""


class Scores(Protocol):
    """Counts what the levels of a network and their ensemble get right."""

    def add(self, logits: Any, batch: Batch) -> None:
        """Counts one batch; no synchronisation.

        Args:
            logits: what the network returns, or a sequence of what networks for one resolution do.
            batch: of a validation loader.
        """

    def read(self) -> Any:
        """An Accuracy, over all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task's own parts.

    Attributes:
        builtin: arguments of `rsfast.data.builtin.builtin_root` that make its built-in set.
        digest_of: names what is read of a data set's split, as a run's log does, given the settings
            of the run, the data set and "train" or "val".
        loss: called with the number of resolutions, the distillation mode, `backend`, and the
            settings of `loss_settings`.
        loss_settings: of a run, by the name of the argument.
        train_settings, val_settings: of a run that its loaders take, by the name of the argument.
        figures: the numbers of one resolution: column of accuracy.csv -> heading of the table.
        scores: makes a Scores; see :meth:`scores_of`.
        image_rows: rows of per_image.csv.
        class_rows: rows of per_class.csv; None for no such file.
        draw_epochs: draws accuracy.png out of the rows of summary.csv.
    """

    builtin: Mapping[str, Any]
    digest_of: Callable[[Any, str | Path, str], str]
    loss: Callable[..., Any]
    loss_settings: Mapping[str, str]
    train_settings: Mapping[str, str]
    val_settings: Mapping[str, str]
    figures: Mapping[str, str]
    scores: Callable[..., Scores]
    image_rows: RowsOf
    class_rows: RowsOf | None = None
    draw_epochs: Callable[[Sequence[Mapping[str, Any]], Sequence[int], Path], None]

    def scores_of(
        self,
        model: nn.Module,
        num_levels: int,
        device: torch.device,
        ensemble_weights: Tensor | None = None,
        num_images: int = 0,
    ) -> Scores:
        """Counts that start at nothing.

        Args:
            model: an RSNet.
            num_levels: of the logits that will come.
            device: of the counts.
            ensemble_weights: [num_levels] shares of the levels; None for no ensemble.
            num_images: of the data set, if what is known of each image is wanted.
        """
        return self.scores(model, num_levels, device, ensemble_weights, num_images)


def settings_of(settings: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Arguments out of the settings of a run or an evaluation.

    Args:
        settings: has them as attributes.
        names: of the settings, by the name of the argument, as a :class:`Task` has them.
    """
    return {argument: getattr(settings, name) for argument, name in names.items()}


def task_of(model: Any) -> Task:
    """The task of an RSNet, or of the settings of a run: whatever has a `task`."""
    return _PARTS[model.task]


def _of_images(
    model: Any, num_levels: int, device: torch.device, weights: Tensor | None, num_images: int
) -> Scores:
    return classification.Scores(num_levels, device, weights, num_images)


def _of_pixels(
    model: Any, num_levels: int, device: torch.device, weights: Tensor | None, num_images: int
) -> Scores:
    return segmentation.Scores(
        num_levels, model.num_classes, model.ignore_label, device, weights, num_images
    )


def _digest_of_images(settings: Any, data: str | Path, split: str) -> str:
    labels = settings.val_list if split == "val" else None
    return open_split(data, split, labels=labels, **settings_of(settings, _OPENING)).digest


def _digest_of_pairs(settings: Any, data: str | Path, split: str) -> str:
    ignored = settings.ignore_label
    return open_pairs(data, split, ignore_label=ignored, **settings_of(settings, _OPENING)).digest


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_OPENING = _same("strict", "tolerate_truncated", "exif")
_PARTS: dict[str, Task] = {  # by the names of rsfast.files.task_names
    "classification": Task(
        builtin={},
        digest_of=_digest_of_images,
        loss=MultiResolutionDistillation,
        loss_settings=_same("label_smoothing", "copies"),
        train_settings=_same("copies", "crop", "flip", "crop_area", "augment"),
        val_settings={"crop": "val_crop", "labels": "val_list"},
        figures={"top1": "top-1", "top5": "top-5"},
        scores=_of_images,
        image_rows=classification.image_rows,
        draw_epochs=classification.draw_epochs,
    ),
    "segmentation": Task(
        builtin={"task": "segmentation"},
        digest_of=_digest_of_pairs,
        loss=PixelDistillation,
        loss_settings=_same("label_smoothing", "ignore_label"),
        train_settings=_same("task", "flip", "scale", "ignore_label"),
        val_settings=_same("task", "ignore_label"),
        figures={"pixel": "pixel", "mean": "mean", "iou": "mean IoU"},
        scores=_of_pixels,
        image_rows=segmentation.image_rows,
        class_rows=segmentation.class_rows,
        draw_epochs=segmentation.draw_epochs,
    ),
}
