"""Random images made on the device: the step's speed without a loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rsfast.data.batch import Rendered
from rsfast.data.masks import MAX_CLASSES
from rsfast.data.pixel_plan import PixelTrainPlan, PixelValPlan, label_sizes, most_labels
from rsfast.data.plan import TrainPlan, ValPlan

__all__ = ["SyntheticDecoder"]


class SyntheticDecoder:
    """The same random uint8 rows at every step.

    Args:
        plan: tells how many images a step has.
        resolutions: r of each level.
        device: where the rows live.
    """

    def __init__(
        self, plan: TrainPlan | ValPlan, resolutions: Sequence[int], *, device: torch.device
    ) -> None:
        self._plan = plan
        self._level_pixels = [r * r for r in resolutions]
        generator = torch.Generator(device).manual_seed(0)
        pixels = plan.batch_size * sum(self._level_pixels)
        self._rows = torch.randint(
            0, 256, (pixels, 3), dtype=torch.uint8, device=device, generator=generator
        )
        self._labels = torch.randint(
            0,
            min(len(plan.index.class_names), MAX_CLASSES),
            (most_labels(plan),),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(0),
        )

    def rows(self, epoch: int, steps: range) -> Iterator[Tensor | Rendered]:
        """[M, 3] uint8, once for each step; of segmentation with labels on the CPU."""
        for step in steps:
            images = self._plan.images(epoch, step)
            rows = self._head(len(images))
            if isinstance(self._plan, PixelTrainPlan | PixelValPlan):
                pixels = sum(h * w for h, w in label_sizes(self._plan, images))
                yield Rendered(rows, self._labels[:pixels])
            else:
                yield rows

    def _head(self, count: int) -> Tensor:
        """The rows of so many images."""
        if count == self._plan.batch_size:
            return self._rows
        full = [self._plan.batch_size * pixels for pixels in self._level_pixels]
        levels = zip(self._rows.split(full), self._level_pixels, strict=True)
        return torch.cat([level[: count * pixels] for level, pixels in levels])
