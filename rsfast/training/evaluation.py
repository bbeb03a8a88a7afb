"""What an evaluation has found, as the tables that people read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rsfast.data import ImageIndex
from rsfast.tasks import RowsOf

__all__ = ["Evaluation", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        resolution: in pixels, or "ensemble".
        trained: whether the resolution has a batch-norm bank of its own.
        batch_norm: where its batch-norm bank comes from.
        multiply_adds: of convolutions and classifier, for one image.
        parameters: that this row needs (all of the network for the ensemble).
        figures: of the task, in percent, by column: top1 and top5; or pixel, mean and iou.
    """

    resolution: int | str
    trained: bool
    batch_norm: str
    multiply_adds: int
    parameters: int
    figures: Mapping[str, float]

    def columns(self) -> dict[str, Any]:
        """Of a row of accuracy.csv."""
        names = ("resolution", "trained", "batch_norm", "multiply_adds", "parameters")
        return {**{name: getattr(self, name) for name in names}, **self.figures}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy of a network, in all and in detail.

    Attributes:
        rows: one per resolution, descending, then the ensemble.
        images: of each row, what its task knows of each image. Classification: [len(rows), n] the
            place of the image's label among the classes, from 1. Segmentation: [len(rows), n, K, 3]
            pixels of each class, taken for it, and both.
        shares: [R, R] of the trained resolutions, descending: the percentage of the images (or
            pixels) that are wrong at one (row) and right at another (column).
        index: the n images.
    """

    rows: list[Row]
    images: Tensor
    shares: Tensor
    index: ImageIndex

    def table(self, headings: Mapping[str, str]) -> str:
        """The rows as they are printed.

        Args:
            headings: of the figures, by column.
        """
        header = f"{'resolution':>10}  {'batch norm':<24}{'MAdds (M)':>10}{'params (M)':>12}"
        header += "".join(f"{heading:>{_width(heading)}}" for heading in headings.values())
        lines = [header, "-" * len(header)]
        for row in self.rows:
            figures = "".join(
                f"{row.figures[name]:>{_width(heading)}.2f}" for name, heading in headings.items()
            )
            lines.append(
                f"{row.resolution:>10}  {row.batch_norm:<24}{row.multiply_adds / 1e6:>10.1f}"
                f"{row.parameters / 1e6:>12.2f}{figures}"
            )
        return "\n".join(lines)

    def tabulate(self, rows_of: RowsOf) -> Iterable[Mapping[str, Any]]:
        """Rows of a file that the task makes of the images."""
        return rows_of(self.index, [row.resolution for row in self.rows], self.images)


def _width(heading: str) -> int:
    return max(8, len(heading) + 2)
